"""What a checkpoint or an adapter is, without reading its weights."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from reca_trainer.adapters import read_quantization
from reca_trainer.models.auto import open_lazily, resolve
from reca_trainer.models.registry import detect, is_adapter
from reca_trainer.models.weights import open_weights


def describe(model_or_path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint or adapter is, by name: kind, family or base, modules, number of parameters. No weights are
    read.

    Raises:
        CheckpointError: it is neither.
    """
    folder = resolve(model_or_path)
    if is_adapter(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = open_weights(folder, "adapter_model.safetensors")
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config["peft_type"], "lora_")
        pattern = rf"(?:^|\.)((?:[^.]+\.)*?([^.]+\.[^.]+))\.(?:token_adapter\.)?{prefix}"
        layers = {match[1]: match[2] for key in weights if (match := re.search(pattern, key))}
        rank, alpha = config.get("r"), config.get("lora_alpha", config.get("alpha"))
        trained, _ = read_quantization(folder)
        description = {
            "kind": f"{config['peft_type']} adapter",
            "base model": config.get("base_model_name_or_path"),
            "base revision": config.get("revision") or "not pinned",
            "base in training": "not quantised" if trained is None else f"{4 if trained.load_in_4bit else 8} bits",
            "rank, alpha": None if rank is None else f"{rank}, {alpha}",
            "layers": f"{len(layers)}: {', '.join(sorted(set(layers.values())))}" if layers else None,
            "trained in full": ", ".join(config.get("modules_to_save") or ()) or "none",
            "parameters": f"{sum(tensor.shape.numel() for tensor in weights.values()):,}",
        }
        return {name: value for name, value in description.items() if value is not None}
    package, published = detect(folder)
    model = open_lazily(model_or_path)
    names = tuple(f"{name}." for name in model.generation_modules)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    generator = sum(size for name, size in sizes.items() if name.startswith(names) or name + "." in names)
    quantization = getattr(model.config, "quantization_config", None)
    return {
        "kind": "model",
        "family": package.Config.model_type,
        "layout": "published" if published else "transformers",
        "quantised": "no" if quantization is None else "4 bits" if quantization.get("load_in_4bit") else "8 bits",
        "parameters": f"{sum(sizes.values()):,}",
        "of its generator": f"{generator:,} ({', '.join(sorted({name.split('.')[0] for name in names}))})",
        "experts": "shared weights" if model.shares_weights else "separate weights",
    }
