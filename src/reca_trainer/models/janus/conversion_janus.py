"""Janus' published layout, which is that of transformers (`deepseek-community/Janus-Pro-1B`, `-7B`): no key is renamed.

Unlike transformers it is read strictly: missing, unexpected or wrongly shaped weights are an error.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from reca_trainer.models.janus.configuration_janus import JanusConfig
from reca_trainer.models.janus.modeling_janus import JanusForConditionalGeneration
from reca_trainer.models.janus.processing_janus import JanusProcessor
from reca_trainer.models.weights import load_strict, open_weights, write_weights


def is_published(file_names: set[str], config: dict[str, Any]) -> bool:
    """Whether `config.json` is Janus'. Quantised weights are left to transformers' loader."""
    return config.get("model_type") == JanusConfig.model_type and "quantization_config" not in config


def read_published(folder: Path, **kwargs: Any) -> JanusForConditionalGeneration:
    """Load a transformers checkpoint of Janus; `kwargs` as for `from_pretrained`.

    Raises:
        CheckpointError: keys are missing, unexpected or wrongly shaped, or a file is damaged.
    """
    weights = open_weights(folder, "model.safetensors", "pytorch_model.bin")
    model = load_strict(
        JanusForConditionalGeneration, JanusConfig.from_pretrained(folder), weights, source=folder, **kwargs
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def read_published_processor(folder: Path, **kwargs: Any) -> JanusProcessor:
    """The processor of a transformers checkpoint of Janus; `kwargs` as for `from_pretrained`."""
    return JanusProcessor.from_pretrained(folder, **kwargs)


def write_published(
    model: JanusForConditionalGeneration,
    processor: JanusProcessor,
    folder: Path,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint from which transformers alone generates text and images."""
    write_weights(model, folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    # A model built from a configuration lacks the entries that transformers' `generate` needs.
    generation = copy.deepcopy(model.generation_config)
    generation._from_model_config = False  # otherwise transformers drops the entries that only Janus has
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(processor.tokenizer, name))
    if not getattr(generation, "generation_kwargs", None):
        generation.generation_kwargs = {"boi_token_id": processor.tokenizer.boi_token_id}
    generation.save_pretrained(folder)
