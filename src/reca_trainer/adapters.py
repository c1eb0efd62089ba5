"""LoRA on a generator: which layers, in which precision, and the check that it is those and no others."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig

from reca_trainer.models.contract import UnifiedModel
from reca_trainer.models.weights import CheckpointError

QUANTIZATION_FILE = "quantization_config.json"  # beside an adapter: how the base it was trained on was quantised


def attach(model: UnifiedModel, peft_config: PeftConfig) -> PeftModel:
    """Put a new adapter on `model`'s generator.

    Where `peft_config` leaves `target_modules` open, they become `model.lora_target_modules`; `layers_to_transform` then
    picks layers among those. Trainable weights are float32 whatever the base is in: bfloat16 masters lose updates of
    about 1e-4.

    `modules_to_save` is left as it is, so that by default nothing but the adapter is trained. Training BAGEL's `vae2llm`,
    `llm2vae` and `time_embedder` in full beside it brought nothing on the embedded default: after 200 steps the held-out
    reconstruction loss was 0.344 with and 0.337 without them at a learning rate of 1e-3, and 0.398 and 0.399 at 1e-4
    (`benchmarks/adapters.py modules`); and PEFT does not combine adapters that have such modules.

    Raises:
        ValueError: no module matches; the message names what could have.
    """
    config: Any = copy.deepcopy(peft_config)  # every PEFT method has fields of its own
    config.task_type = None  # PEFT's task classes expect a language model's forward
    if getattr(config, "target_modules", None) is None:
        config.target_modules = model.lora_target_modules
        if getattr(config, "layers_to_transform", None) is not None:  # PEFT takes it for lists of names only
            config.target_modules = _targets_in_layers(model, config)
            config.layers_to_transform = config.layers_pattern = None
    if getattr(config, "revision", None) is None:
        config.revision = getattr(model.config, "_commit_hash", None)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"target_modules={config.target_modules!r}: {error} The generator's linear layers are "
            f"{_some(_generator_linears(model))}."
        ) from error
    return _prepare_to_train(peft_model)


def load_adapter(model: UnifiedModel, folder: str | os.PathLike[str], is_trainable: bool = False) -> PeftModel:
    """Put the adapter saved in `folder` on `model`. Further ones are loaded, weighted and switched with PEFT's own
    `load_adapter`, `add_weighted_adapter` and `set_adapter`.

    Raises:
        CheckpointError: `folder` has no safetensors, or was trained on another model or another revision of it.
    """
    folder = Path(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
            + (
                f"; {', '.join(others)} is a pickle, which can run code when it is read, and is refused."
                if others
                else "."
            )
        )
    config = PeftConfig.from_pretrained(str(folder))
    commit = getattr(model.config, "_commit_hash", None)
    if (
        config.revision
        and commit
        and config.revision != commit
        and config.base_model_name_or_path == model.name_or_path
    ):
        raise CheckpointError(
            f"The adapter in {folder} was trained on revision {config.revision} of {model.name_or_path}, and the model "
            f"given is revision {commit}. Load the former: AutoUnifiedModel.from_pretrained({str(folder)!r})."
        )
    misfit = f"The adapter in {folder} does not fit {model.name_or_path or type(model).__name__}: "
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            stored = set(file.keys())
        peft_model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(misfit + str(error)) from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if stored != expected:
        raise CheckpointError(
            misfit + f"it lacks {_some(expected - stored)}, and has {_some(stored - expected)} besides."
        )
    if is_trainable:
        peft_model = _prepare_to_train(peft_model)
        set_peft_model_state_dict(peft_model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))  # again, now unrounded
    return peft_model


def _prepare_to_train(model: PeftModel) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    # Embeddings are never resized here; left to decide that itself, PEFT asks the Hub for the base's config.
    save = functools.partial(model.save_pretrained, save_embedding_layers=False)

    def save_pretrained(save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        save(os.fspath(save_directory), **kwargs)
        base = unwrap(model)
        quantization = getattr(base.config, "quantization_config", None)
        if quantization is not None and kwargs.get("is_main_process", True):
            settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
            settings = {**settings, "dtype": str(base.config.dtype or base.dtype).removeprefix("torch.")}
            (Path(save_directory) / QUANTIZATION_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    # PEFT's model card shows the base's path; `hub.model_card` is ours.
    vars(model).update(save_pretrained=save_pretrained, create_or_update_model_card=lambda output_dir: None)
    return model


def _generator_linears(model: UnifiedModel) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)]


def _targets_in_layers(model: UnifiedModel, peft_config: Any) -> list[str]:
    layers = peft_config.layers_to_transform
    layers = {layers} if isinstance(layers, int) else set(layers)
    pattern = rf"(?:^|\.){peft_config.layers_pattern or r'[^.]*'}\.(\d+)\."
    indices = {name: re.search(pattern, name) for name in _generator_linears(model)}
    targets = [name for name, match in indices.items() if match and int(match[1]) in layers]
    if not targets:
        known = sorted({int(match[1]) for match in indices.values() if match})
        raise ValueError(f"layers_to_transform={sorted(layers)} names no layer of the generator; it has {known}.")
    return targets


def _some(names: Any, count: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if names[count:] else "") or "nothing"


def unwrap(model: nn.Module) -> UnifiedModel:
    """The family's model behind a `PeftModel`, or `model` itself."""
    return cast(UnifiedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def check_trainable(model: nn.Module) -> tuple[int, int]:
    """Make sure that a run trains the generator and only it.

    Returns:
        Number of trainable parameters and of all parameters.

    Raises:
        ValueError: nothing is trainable, or something outside the generator is; the message names it.
    """
    base = unwrap(model)
    trainable = [
        (name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if not trainable:
        raise ValueError(
            "Nothing would be trained: no parameter requires a gradient. Give a peft_config whose target_modules match "
            f"the generator ({base.lora_target_modules!r} does), or no peft_config to train all of it."
        )
    generator = tuple(f"{name}." for name in base.generation_modules)
    if wrong := {name for name, _ in trainable if not f"{name}.".startswith(generator)}:
        raise ValueError(
            f"RecA trains the generator, but {len(wrong)} weights outside of it would be trained too: {_some(wrong)}. "
            f"Use target_modules={base.lora_target_modules!r}."
        )
    return sum(p.numel() for _, p in trainable), sum(p.numel() for p in model.parameters())


def default_dtype(bf16: bool, has_adapter: bool) -> torch.dtype:
    """Of a model given by name: what is trained needs float32 masters, a frozen base does not."""
    return torch.bfloat16 if bf16 and has_adapter else torch.float32


def read_quantization(adapter: Path) -> tuple[BitsAndBytesConfig | None, torch.dtype | None]:
    """How the base of an adapter was quantised in training, and what dtype it had before; `None` if it was not."""
    path = adapter / QUANTIZATION_FILE
    if not path.is_file():
        return None, None
    settings = json.loads(path.read_text())
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    return BitsAndBytesConfig.from_dict(settings), dtype
