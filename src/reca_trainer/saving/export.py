"""A model in another form: our own layout or the family's published one, in another precision, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from reca_trainer.files import written_whole
from reca_trainer.models.auto import AutoUnifiedProcessor, open_lazily
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.registry import family_of
from reca_trainer.models.weights import load_strict, write_weights


def export(
    model_or_path: UnifiedModel | str | os.PathLike,
    output_dir: str | os.PathLike,
    layout: str = "published",
    dtype: torch.dtype | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    processor: UnifiedProcessor | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model in another form, one tensor at a time; arguments as for `merge_adapter`. Nothing that is not cast
    or quantised changes by a bit.

    Args:
        processor: of a model that was not loaded from anywhere.
    """
    model = open_lazily(model_or_path)
    processor = processor or AutoUnifiedProcessor.from_pretrained(model.name_or_path)
    return write_model(model, processor, output_dir, dtype, layout, quantization_config, max_shard_size)


def write_model(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    output_dir: str | os.PathLike,
    dtype: torch.dtype | None = None,
    layout: str = "transformers",
    quantization_config: BitsAndBytesConfig | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model that `open_lazily` opened; arguments as for `merge_adapter`."""
    if layout not in ("transformers", "published"):
        raise ValueError(f'layout is "transformers" or "published", not {layout!r}.')
    if layout == "published" and quantization_config is not None:
        raise ValueError('Quantised weights have no published layout: use layout="transformers".')
    family = family_of(model) if layout == "published" else None
    with written_whole(output_dir) as folder:
        if quantization_config is not None:
            config = type(model.config).from_dict(model.config.to_dict())
            config.__dict__.pop("quantization_config", None)
            options = {"dtype": dtype or torch.bfloat16, "quantization_config": quantization_config}
            loaded = load_strict(type(model), config, model.lazy_weights, model.name_or_path, **options)
            loaded.save_pretrained(folder, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
        elif layout == "transformers":
            write_weights(model, folder, dtype, max_shard_size)
            processor.save_pretrained(folder)
        else:
            (folder / "copy").mkdir()
            write_weights(model, folder / "copy", dtype, max_shard_size)
            # Its tensors are memory-mapped, so that writing them again takes no memory, and put in as they are stored:
            # loading has changed the dtype of some.
            loaded = type(model).from_pretrained(folder / "copy", dtype="auto")
            for shard in (folder / "copy").glob("*.safetensors"):
                loaded.load_state_dict(load_file(shard), strict=False, assign=True)
            family.write_published(loaded, processor, folder)
            del loaded
            shutil.rmtree(folder / "copy")
    return Path(output_dir)
