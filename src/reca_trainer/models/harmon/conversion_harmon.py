"""Harmon's published layouts: the Hub folder (`config.json` with `llm` and `mar`, safetensors) and the training layout
(`harmon_*.pth` beside the autoencoder's `kl16.ckpt`). Only the autoencoder's keys are named differently there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer

from reca_trainer.models.harmon.configuration_harmon import HarmonConfig, HarmonMarConfig, kl_vae_config, qwen2_5
from reca_trainer.models.harmon.modeling_harmon import HarmonModel
from reca_trainer.models.harmon.processing_harmon import HarmonProcessor
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    autoencoder_from_ldm,
    autoencoder_to_ldm,
    choose_variant,
    load_strict,
    open_weights,
    read_optional_config,
    weights_of,
    write_sharded,
    write_tokenizer,
)

MAR_SIZES = {"mar_base": (768, 12, 12), "mar_large": (1024, 16, 16), "mar_huge": (1280, 20, 16)}  # width, depth, heads
MAR_FIELDS = ("embed_dim", "depth", "num_heads")
RELEASES = {896: ("0.5b", "mar_base", 1024, 6), 1536: ("1.5b", "mar_huge", 1536, 12)}  # by the LLM's hidden size
LM_HEAD = "llm.lm_head.weight"
TRAINING_KEYS = frozenset({"llm.model.norm.weight", "mar.mask_token"})


def is_published(file_names: set[str], config: dict[str, Any]) -> bool:
    """Whether a folder with these files and this `config.json` is in one of the published layouts."""
    hub = config.get("model_type") == "harmon" and {"llm", "mar"} <= config.keys()
    return hub or any(re.fullmatch(r"harmon_[^/]*\.pth", name) for name in file_names)


def read_published(folder: str | Path, variant: str | None = None, **kwargs: Any) -> HarmonModel:
    """Load a published checkpoint.

    Args:
        folder: a Hub snapshot or a training folder. The latter needs no `config.json` for the released sizes.
        variant: which of several `.pth` files of a training folder to read, see `choose_variant`.
        kwargs: as for `from_pretrained`.

    Raises:
        CheckpointError: files or keys are missing, unexpected or wrongly shaped, or the size is unknown.
    """
    folder = Path(folder)
    published = read_optional_config(folder)
    if training_files := _training_files(folder):
        weights = _open_training_weights(folder, choose_variant(training_files, variant, folder))
    else:
        weights = open_weights(folder, "model.safetensors", "pytorch_model.bin")
    config = read_config(published or _recognise(weights, folder))
    if config.tie_word_embeddings:
        weights.pop(LM_HEAD, None)
    state_dict = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")}
    vae = {key.removeprefix("vae."): tensor for key, tensor in weights.items() if key.startswith("vae.")}
    state_dict |= {f"vae.{key}": tensor for key, tensor in autoencoder_from_ldm(vae).items()}
    ignore_missing = [LM_HEAD] if config.tie_word_embeddings else []
    return load_strict(HarmonModel, config, state_dict, folder, ignore_missing, **kwargs)


def read_published_processor(folder: str | Path, variant: str | None = None, **kwargs: Any) -> HarmonProcessor:
    """Load the processor of a published checkpoint, the same for every `variant`; the tokenizer is Qwen2.5-Instruct's.

    Raises:
        CheckpointError: the folder has no tokenizer (training layout).
    """
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer. Put the files of the Qwen2.5-Instruct tokenizer there.")
    return HarmonProcessor(Qwen2Tokenizer.from_pretrained(folder, **kwargs))


def write_published(
    model: HarmonModel, processor: HarmonProcessor, folder: str | Path, max_shard_size: int | str = "5GB"
) -> None:
    """Write the Hub layout: `config.json`, safetensors and the tokenizer, without the model code that the release has beside
    them for loading with transformers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_of(model)
    vae = {key.removeprefix("vae."): tensor for key, tensor in weights.items() if key.startswith("vae.")}
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")}
    if model.config.tie_word_embeddings:
        weights.pop(LM_HEAD, None)
    weights |= {f"vae.{key}": tensor for key, tensor in autoencoder_to_ldm(vae).items()}
    write_sharded(weights, folder, "model.safetensors", max_shard_size, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(model.config), indent=2) + "\n")
    write_tokenizer(processor.tokenizer, folder)


def read_config(published: dict[str, Any]) -> HarmonConfig:
    """`HarmonConfig` from a published `config.json`. Dimensions under `mar` override those of its `type`; the
    autoencoder is KL-16 unless there is a `vae`.

    Raises:
        CheckpointError: an unknown `type` or key, or patches of several latents.
    """
    mar = dict(published["mar"])
    size = mar.pop("type", "mar_base")
    if size not in MAR_SIZES:
        raise CheckpointError(f"config.json: mar.type is {size!r}; known are {', '.join(MAR_SIZES)}.")
    if mar.pop("patch_size", 1) != 1:
        raise CheckpointError("config.json: mar.patch_size must be 1.")
    for side in ("encoder", "decoder"):
        for field, value in zip(MAR_FIELDS, MAR_SIZES[size], strict=True):
            mar.setdefault(f"{side}_{field}", value)
    for unused in ("label_drop_prob", "grad_checkpointing"):
        mar.pop(unused, None)
    known = set(HarmonMarConfig().to_dict())
    if unknown := sorted(set(mar) - known):
        raise CheckpointError(f"config.json: unknown keys under mar: {', '.join(unknown)}.")

    vae = {"scaling_factor": published.get("vae_scale", 0.2325)}
    for key, argument in (("embed_dim", "latent_channels"), ("ch", "width"), ("ch_mult", "multipliers"),
                          ("num_res_blocks", "layers_per_block")):  # fmt: skip
        if key in published.get("vae", {}):
            vae[argument] = published["vae"][key]
    return HarmonConfig(text_config=published["llm"], mar_config=mar, vae_config=kl_vae_config(**vae))


def write_config(config: HarmonConfig) -> dict[str, Any]:
    """The published `config.json`; inverse of `read_config`."""
    fields = [f"{side}_{field}" for side in ("encoder", "decoder") for field in MAR_FIELDS]
    mar = {key: value for key, value in config.mar_config.to_diff_dict().items() if key in HarmonMarConfig().to_dict()}
    for generic in ("model_type", "transformers_version", "dtype", "architectures", "_name_or_path"):
        mar.pop(generic, None)
    dimensions = tuple(getattr(config.mar_config, field) for field in fields)
    # A size says the same of encoder and decoder.
    size = next((name for name, values in MAR_SIZES.items() if values * 2 == dimensions), "mar_base")
    explicit = {} if MAR_SIZES[size] * 2 == dimensions else dict(zip(fields, dimensions, strict=True))
    mar = {
        "type": size,
        **{key: value for key, value in mar.items() if key not in fields},
        **explicit,
        "patch_size": 1,
    }
    vae = config.vae_config
    width = vae["block_out_channels"][0]
    return {
        "architectures": ["HarmonModel"],
        "model_type": "harmon",
        "llm": config.text_config.to_dict(),
        "mar": mar,
        "vae": {
            "embed_dim": vae["latent_channels"],
            "ch": width,
            "ch_mult": [channels // width for channels in vae["block_out_channels"]],
            "num_res_blocks": vae["layers_per_block"],
        },
        "vae_scale": vae["scaling_factor"],
    }


def _training_files(folder: Path) -> list[str]:
    """The training code's checkpoints: a release is called `harmon_<size>.pth`, a step of a run `iter_5000.pth`."""
    files = [path.name for path in folder.glob("*.pth")]
    if (folder / "config.json").is_file() and next(folder.glob("model*.safetensors"), None):
        files = [name for name in files if name.startswith("harmon_")]
    return files


def _open_training_weights(folder: Path, name: str) -> dict[str, LazyTensor]:
    weights = open_weights(folder, name)
    # The file has keys of the autoencoder's training beside its weights.
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    vae = open_weights(folder, "kl16.ckpt")
    return weights | {f"vae.{key}": tensor for key, tensor in vae.items() if key.startswith(parts)}


def _recognise(weights: dict[str, LazyTensor], folder: Path) -> dict[str, Any]:
    """The `config.json` of a released size, known by the language model's width."""
    norm = weights.get("llm.model.norm.weight")
    width = None if norm is None else len(norm[...])
    if width not in RELEASES:
        raise CheckpointError(
            f"{folder} has no config.json and its language model has width {width}, which is no released size "
            f"({', '.join(map(str, RELEASES))}). Put the config.json of the Hub layout beside the weights."
        )
    size, mar, head_width, head_depth = RELEASES[width]
    return {"llm": qwen2_5(size), "mar": {"type": mar, "diffloss_w": head_width, "diffloss_d": head_depth}}
