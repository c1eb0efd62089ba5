"""Qwen-Image-Edit's published layout, the folders of diffusers' `QwenImageEditPlusPipeline`.

| folder | content |
|---|---|
| `transformer`, `vae`, `scheduler` | as diffusers saves them |
| `text_encoder` | Qwen2.5-VL, `visual.…`, `model.…` and `lm_head`, the older key names of transformers |
| `tokenizer`, `processor` | Qwen2's tokenizer; the same once more, with how Qwen2.5-VL takes pictures |

The names of `text_encoder` are those that DiffSynth-Studio, a trainer of Qwen-Image, renames (`QwenImageTextEncoderStateDictConverter` at
3ee3cc3); the newer ones are read as well. An adapter's published layout is one file, which `load_lora_weights` of diffusers and
ComfyUI read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reca_trainer.models.qwen_image.configuration_qwen_image import QwenImageConfig
from reca_trainer.models.qwen_image.modeling_qwen_image import QwenImageModel
from reca_trainer.models.qwen_image.processing_qwen_image import QwenImageProcessor
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    load_strict,
    open_weights,
    weights_of,
    write_sharded,
    write_tokenizer,
)

INDEX, PIPELINE = "model_index.json", "QwenImageEditPlusPipeline"
PARTS = {  # folder → library and class, as `model_index.json` has them
    "processor": ("transformers", "Qwen2VLProcessor"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "QwenImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
}
WEIGHTS = {"text_encoder": "model.safetensors"} | dict.fromkeys(
    ("transformer", "vae"), "diffusion_pytorch_model.safetensors"
)
CONFIGS = {"scheduler": "scheduler_config.json"} | dict.fromkeys(WEIGHTS, "config.json")


def is_published(file_names: set[str], config: dict[str, Any]) -> bool:
    """Whether a checkpoint's files are those of a diffusers pipeline around Qwen2.5-VL that edits pictures. Which one,
    `read_published` looks up."""
    parts = {f"{part}/{file}" for part, file in CONFIGS.items()}
    return parts | {INDEX, "processor/preprocessor_config.json"} <= file_names


def read_published(folder: Path, **kwargs: Any) -> QwenImageModel:
    """Load Qwen-Image-Edit as published.

    Args:
        kwargs: as for `PreTrainedModel.from_pretrained`.

    Raises:
        CheckpointError: it is another pipeline's, or keys are missing, unexpected or wrongly shaped.
    """
    folder = Path(folder)
    state_dict = {}
    for part, name in WEIGHTS.items():
        for key, tensor in open_weights(folder / part, name).items():
            if part == "text_encoder":
                key = re.sub(r"^visual\.", "model.visual.", key)
                key = re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", key)
            state_dict[f"{part}.{key}"] = tensor
    return load_strict(QwenImageModel, read_config(folder), state_dict, folder, **kwargs)


def read_config(folder: Path) -> QwenImageConfig:
    """The configuration, from those of the parts."""
    name = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")
    if name != PIPELINE:
        raise CheckpointError(
            f"{folder} is a checkpoint of {name}. Of Qwen-Image those of {PIPELINE} are supported: Qwen-Image-Edit-2509 and "
            "-2511."
        )
    parts = {part: json.loads((folder / part / file).read_text(encoding="utf-8")) for part, file in CONFIGS.items()}
    return QwenImageConfig(**{f"{part}_config": config for part, config in parts.items()})


def read_published_processor(folder: Path, **kwargs: Any) -> QwenImageProcessor:
    """The processor of a published checkpoint; `kwargs` are arguments of it in place of its own."""
    stride = read_config(Path(folder)).understanding_stride
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    return QwenImageProcessor(tokenizer, **{"understanding_stride": stride, **kwargs})


def write_published(
    model: QwenImageModel, processor: QwenImageProcessor, folder: Path, max_shard_size: int | str = "5GB"
) -> None:
    """Write `model` as diffusers' pipeline reads it. `folder` must exist."""
    folder, config = Path(folder), model.config
    for part in PARTS:
        (folder / part).mkdir(exist_ok=True)
    weights = weights_of(model)
    for part, name in WEIGHTS.items():
        tensors: dict[str, LazyTensor] = {}
        for key in [key for key in weights if key.startswith(f"{part}.")]:
            renamed = key.removeprefix(f"{part}.")
            if part == "text_encoder":
                renamed = re.sub(r"^model\.(visual\.)", r"\1", renamed)
                renamed = re.sub(r"^model\.language_model\.", "model.", renamed)
            tensors[renamed] = weights[key]
        write_sharded(tensors, folder / part, name, max_shard_size, {"format": "pt"})
    model.transformer.save_config(folder / "transformer")
    model.vae.save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler.from_config(config.scheduler_config).save_pretrained(folder / "scheduler")
    text_encoder = config.text_encoder_config.to_dict() | {"architectures": [PARTS["text_encoder"][1]]}
    rope = text_encoder["text_config"].pop("rope_parameters")
    text_encoder["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    vision = config.text_encoder_config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 4 * processor.understanding_stride**2, "longest_edge": 12845056},
    )
    pictures.save_pretrained(folder / "processor")
    for part in ("tokenizer", "processor"):
        write_tokenizer(processor.tokenizer, folder / part)
    index = {"_class_name": PIPELINE, "_diffusers_version": diffusers.__version__, **PARTS}
    for path, values in ((folder / "text_encoder" / "config.json", text_encoder), (folder / INDEX, index)):
        path.write_text(json.dumps(values, indent=2) + "\n")


def write_published_adapter(adapter: Path, folder: Path) -> None:
    """Write a LoRA adapter as diffusers and ComfyUI read it, with its scale `lora_alpha / r` in its weights: ComfyUI reads no
    scale from PEFT's configuration.

    Raises:
        ValueError: the adapter is no LoRA, or one with parts that the layout does not have.
    """
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none" or config.modules_to_save:
        raise ValueError(
            f"{adapter} is no plain LoRA, which is all that diffusers and ComfyUI load into Qwen-Image: merge it instead."
        )
    tensors = {}
    for key, tensor in open_weights(adapter, SAFETENSORS_WEIGHTS_NAME).items():
        name, _, side = key.removeprefix("base_model.model.transformer.").rpartition(".lora_")
        values = tensor[...].float()
        if side == "B.weight":
            rank, layer = values.shape[1], f"transformer.{name}"
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha)
            values = values * (alpha / (math.sqrt(rank) if config.use_rslora else rank))
        tensors[f"{name}.lora_{side}"] = values
    QwenImageEditPlusPipeline.save_lora_weights(folder, transformer_lora_layers=tensors)
