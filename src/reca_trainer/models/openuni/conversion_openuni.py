"""OpenUni's published layout.

A checkpoint is one `.pth` file of the weights that OpenUni trains: `meta_queries`, `connector.*`, `projector.*` and, after
fine-tuning, `transformer.*`. The other parts have checkpoints of their own: InternVL3 (in transformers' layout or its
original one), SANA and DC-AE. A path or Hub id names each, else a sub-folder beside the file holds it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import snapshot_download
from transformers import Qwen2Tokenizer

from reca_trainer.models.openuni.configuration_openuni import OpenUniConfig
from reca_trainer.models.openuni.modeling_openuni import OpenUniModel
from reca_trainer.models.openuni.processing_openuni import OpenUniProcessor
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    choose_variant,
    load_strict,
    open_weights,
    weights_of,
    write_tokenizer,
)

CHECKPOINT_NAME = "openuni_finetune.pth"
CONFIG_NAME = "openuni_config.json"
CONNECTOR_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
TRAINED = ("meta_queries", "connector.", "projector.", "transformer.")
FROZEN = ("lmm.", "vae.")
TRAINING_KEYS = frozenset({"meta_queries", "connector.layers.0.mlp.fc1.bias"})

VAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
SANA_1024 = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
PARTS = {  # width of the language model → InternVL3, SANA
    896: ("OpenGVLab/InternVL3-1B-hf", "Efficient-Large-Model/Sana_600M_512px_diffusers"),
    1536: ("OpenGVLab/InternVL3-2B-hf", "Efficient-Large-Model/Sana_1600M_512px_diffusers"),
}
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_FILES = ["config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors"]

# The original InternVL3 → transformers' names on the Hub → transformers' names in memory.
ORIGINAL_KEYS = {
    r"^vision_model\.embeddings\.class_embedding": "vision_tower.embeddings.cls_token",
    r"^vision_model\.embeddings\.patch_embedding": "vision_tower.embeddings.patch_embeddings.projection",
    r"^vision_model\.embeddings\.position_embedding": "vision_tower.embeddings.position_embeddings",
    r"^vision_model\.encoder\.layers\.": "vision_tower.encoder.layer.",
    r"(encoder\.layer\.\d+)\.attn\.proj\.": r"\1.attention.projection_layer.",
    r"(encoder\.layer\.\d+)\.norm1\.": r"\1.layernorm_before.",
    r"(encoder\.layer\.\d+)\.norm2\.": r"\1.layernorm_after.",
    r"(encoder\.layer\.\d+)\.ls([12])$": r"\1.lambda_\2",
    r"^mlp1\.0\.": "multi_modal_projector.layer_norm.",
    r"^mlp1\.1\.": "multi_modal_projector.linear_1.",
    r"^mlp1\.3\.": "multi_modal_projector.linear_2.",
}
HUB_KEYS = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^(vision_tower|multi_modal_projector)\.": r"model.\1.",
}


def is_published(file_names: set[str], config: dict[str, Any]) -> bool:
    """Whether a folder holds an OpenUni checkpoint, `openuni*.pth`. `TRAINING_KEYS` identify files of other names."""
    return any(re.fullmatch(r"openuni[^/]*\.pth", name) for name in file_names)


def read_published(
    folder: str | Path,
    variant: str | None = None,
    internvl: str | Path | None = None,
    sana: str | Path | None = None,
    vae: str | Path | None = None,
    **kwargs: Any,
) -> OpenUniModel:
    """Load an OpenUni checkpoint and the published models it builds on.

    Args:
        folder: where the `.pth` file is.
        variant: which of several `.pth` files, see `choose_variant`; by default `openuni_finetune.pth`.
        internvl, sana, vae: folder or Hub id of InternVL3 (either layout), SANA and DC-AE. By default the sub-folders
            `internvl3-hf` or `internvl3`, `sana` and `dc-ae`, else the repositories that OpenUni was trained with. SANA's
            weights are read only for a checkpoint without `transformer.*`.
        kwargs: as for `from_pretrained`: `dtype`, `device_map`, `quantization_config`, …

    Raises:
        CheckpointError: a part is missing, or keys are missing, unexpected or wrongly shaped.
    """
    parts = _Parts(Path(folder), variant, internvl, sana, vae)
    state_dict = {key: tensor for key, tensor in parts.trained.items() if not key.startswith(FROZEN)}
    if parts.sana_is_frozen:
        weights = open_weights(parts.sana / "transformer", DIFFUSERS_WEIGHTS)
        state_dict |= {f"transformer.{key}": tensor for key, tensor in weights.items()}
    weights = _rename_internvl(open_weights(parts.internvl, "model.safetensors"))
    state_dict |= {f"internvl.{key}": tensor for key, tensor in weights.items()}
    weights = open_weights(parts.vae, DIFFUSERS_WEIGHTS)
    state_dict |= {f"vae.{key}": tensor for key, tensor in weights.items()}
    return load_strict(OpenUniModel, parts.config(), state_dict, parts.checkpoint, **kwargs)


def read_published_processor(
    folder: str | Path,
    variant: str | None = None,
    internvl: str | Path | None = None,
    sana: str | Path | None = None,
    vae: str | Path | None = None,
    **kwargs: Any,
) -> OpenUniProcessor:
    """The processor of a published checkpoint; arguments as for `read_published`."""
    parts = _Parts(Path(folder), variant, internvl, sana, vae)
    names = {"image_size": "image_size", "caption_max_length": "max_caption_length"}
    settings = {argument: parts.settings[key] for key, argument in names.items() if key in parts.settings}
    return OpenUniProcessor.from_config(parts.config(), Qwen2Tokenizer.from_pretrained(parts.internvl), **settings)


def write_published(
    model: OpenUniModel, processor: OpenUniProcessor, folder: str | Path, max_shard_size: int | str = "5GB"
) -> None:
    """Write `model` as an OpenUni checkpoint, with the parts it builds on in sub-folders, as `read_published` and the
    original code read them. The layout has the trained weights as one pickle, which is in memory while it is written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_of(model)
    trained = {key: tensor[...].cpu().contiguous() for key, tensor in weights.items() if key.startswith(TRAINED)}
    with open(folder / CHECKPOINT_NAME, "wb") as file:  # a path would hide from the user that the disk is full
        torch.save(trained, file)
    connector = {key: getattr(model.config.connector_config, key) for key in CONNECTOR_SETTINGS}
    settings = {
        "num_queries": model.config.num_queries,
        "connector": connector,
        "image_size": processor.image_size,
        "caption_max_length": processor.max_caption_length,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2))
    for name, part in (("internvl.", model.internvl), ("vae.", model.vae)):
        if any(parameter.is_meta for parameter in part.parameters()):
            values = {key.removeprefix(name): weights[key][...] for key in weights if key.startswith(name)}
            part.load_state_dict(values, strict=False, assign=True)  # tied weights are in the file once
    model.internvl.tie_weights()
    model.internvl.save_pretrained(folder / "internvl3-hf", max_shard_size=max_shard_size)
    write_tokenizer(processor.tokenizer, folder / "internvl3-hf")
    model.transformer.save_config(folder / "sana" / "transformer")
    scheduler = DPMSolverMultistepScheduler.from_config(model.config.scheduler_config)
    scheduler.save_pretrained(folder / "sana" / "scheduler")
    model.vae.save_pretrained(folder / "dc-ae")


class _Parts:
    """Where the parts of a published OpenUni are, on this machine."""

    def __init__(
        self,
        folder: Path,
        variant: str | None,
        internvl: str | Path | None,
        sana: str | Path | None,
        vae: str | Path | None,
    ):
        self.folder = folder
        self.checkpoint = folder / _choose_checkpoint(folder, variant)
        self.trained = open_weights(folder, self.checkpoint.name)
        missing = TRAINING_KEYS - set(self.trained)
        if missing:
            raise CheckpointError(
                f"{self.checkpoint} is no OpenUni checkpoint: it lacks {', '.join(sorted(missing))}."
            )
        self.num_queries, self.width = self.trained["meta_queries"].shape
        path = folder / CONFIG_NAME  # not published, but written here: what the shapes in the file do not say
        self.settings = json.loads(path.read_text()) if path.is_file() else {}
        self.sana_is_frozen = not any(key.startswith("transformer.") for key in self.trained)
        default_internvl, default_sana = PARTS.get(self.width, (None, None))
        if "_1024_" in self.checkpoint.name or any(key.endswith(".norm_q.weight") for key in self.trained):
            default_sana = default_sana and SANA_1024
        sana_files = DIFFUSERS_FILES if self.sana_is_frozen else DIFFUSERS_FILES[:1]
        sana_files = ["scheduler/*.json", *(f"transformer/{name}" for name in sana_files)]
        internvl_files = ["*.json", "*.txt", "model*.safetensors"]
        self.internvl = self._locate(
            "internvl", internvl, ("internvl3-hf", "internvl3"), default_internvl, internvl_files
        )
        self.sana = self._locate("sana", sana, ("sana",), default_sana, sana_files)
        self.vae = self._locate("vae", vae, ("dc-ae",), VAE, DIFFUSERS_FILES)

    def _locate(
        self, part: str, given: str | Path | None, subfolders: tuple[str, ...], default: str | None, files: list[str]
    ) -> Path:
        for path in [Path(given)] if given else [self.folder / name for name in subfolders]:
            if path.is_dir():
                return path
        if not (given or default):
            raise CheckpointError(
                f"{self.folder} holds no {' or '.join(subfolders)}, and no published model is {self.width} wide: "
                f"pass {part}=<folder or Hub id>."
            )
        return Path(snapshot_download(str(given or default), allow_patterns=files))

    def config(self) -> OpenUniConfig:
        """The configuration, from those of the parts and from the shapes in the checkpoint."""
        connector = self.settings.get("connector", {})
        layers = {key.split(".")[2] for key in self.trained if key.startswith("connector.layers.")}
        return OpenUniConfig(
            internvl_config=_internvl_config(json.loads((self.internvl / "config.json").read_text()), self.internvl),
            connector_config={
                "hidden_size": self.width,
                "intermediate_size": self.trained["connector.layers.0.mlp.fc1.bias"].shape[0],
                "num_hidden_layers": len(layers),
                # Published connectors have heads of 64 channels, which their file does not say.
                "num_attention_heads": connector.get("num_attention_heads", max(1, self.width // 64)),
                "hidden_act": connector.get("hidden_act", "gelu_pytorch_tanh"),
                "layer_norm_eps": connector.get("layer_norm_eps", 1e-6),
            },
            transformer_config=json.loads((self.sana / "transformer" / "config.json").read_text()),
            vae_config=json.loads((self.vae / "config.json").read_text()),
            scheduler_config=json.loads((self.sana / "scheduler" / "scheduler_config.json").read_text()),
            num_queries=self.num_queries,
        )


def _choose_checkpoint(folder: Path, variant: str | None) -> str:
    names = [path.name for path in folder.glob("*.pth")]
    if variant is None and CHECKPOINT_NAME in names:
        return CHECKPOINT_NAME
    return choose_variant(names, variant, folder)


def _internvl_config(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Arguments of transformers' `InternVLConfig`, from either layout's `config.json`.

    Raises:
        CheckpointError: the file describes no InternVL3.
    """
    if config.get("model_type") == "internvl":
        return config
    if config.get("model_type") != "internvl_chat":
        raise CheckpointError(f"{source} is no InternVL3: its model_type is {config.get('model_type')!r}.")
    if config.get("ps_version") != "v2" or config.get("select_layer") != -1:
        raise CheckpointError(f"{source}: only pixel shuffle v2 on the last vision layer is supported (InternVL3's).")
    vision, text = config["vision_config"], config["llm_config"]
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "image_size")
    same += ("layer_norm_eps", "num_channels", "patch_size", "norm_type", "attention_dropout")
    size, patch = vision["image_size"], vision["patch_size"]
    tokenizer = json.loads((source / "added_tokens.json").read_text())
    return {
        "vision_config": {
            **{key: vision[key] for key in same},
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "use_mean_pooling": True,  # in transformers this means that no norm follows the last layer
        },
        "text_config": text,
        "downsample_ratio": config["downsample_ratio"],
        "image_seq_length": int(size // patch * config["downsample_ratio"]) ** 2,
        "image_token_id": tokenizer["<IMG_CONTEXT>"],
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


def _rename_internvl(weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Weights of either layout of InternVL3 under the module names of transformers."""
    renamed = {}
    for key, tensor in weights.items():
        for pattern, name in ORIGINAL_KEYS.items():
            key = re.sub(pattern, name, key)
        for pattern, name in HUB_KEYS.items():
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for index, name in enumerate("qkv"):
                part = tensor.map(lambda fused, index=index: fused.chunk(3)[index])
                renamed[key.replace(".attn.qkv.", f".attention.{name}_proj.")] = part
        else:
            renamed[key] = tensor
    return renamed
