"""A model in another form: our own layout or the family's published one, in another precision, one tensor at a time."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from reca_trainer.files import written_whole
from reca_trainer.models.auto import AutoUnifiedProcessor, adapter_base, open_lazily, resolve
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.registry import detect, family_of, is_adapter
from reca_trainer.models.tensor_files import size_of
from reca_trainer.models.weights import cast, load_strict, write_weights


def export(
    model_or_path: UnifiedModel | str | os.PathLike,
    output_dir: str | os.PathLike,
    layout: str = "published",
    dtype: torch.dtype | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    processor: UnifiedProcessor | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a model in another form, one tensor at a time; arguments as for `merge_adapter`. Nothing that is not cast
    or quantised changes by a bit. An adapter is written in the form that its family's other tools load.

    Args:
        processor: for a model that was not loaded from anywhere.
    """
    if not isinstance(model_or_path, UnifiedModel) and is_adapter(folder := resolve(model_or_path)):
        if layout != "published" or any(choice is not None for choice in (dtype, quantization_config, max_shard_size)):
            raise ValueError(f"{model_or_path} is an adapter: layout, dtype and sizes of files are not for choice.")
        return _export_adapter(folder, Path(output_dir))
    model = open_lazily(model_or_path)
    processor = processor or AutoUnifiedProcessor.from_pretrained(model.name_or_path)
    return write_model(model, processor, output_dir, dtype, layout, quantization_config, max_shard_size)


def _export_adapter(adapter: Path, output_dir: Path) -> Path:
    base, hub = adapter_base(adapter, None, {})
    package, _ = detect(resolve(base, **hub))
    if not hasattr(package, "write_published_adapter"):
        raise ValueError(f"No other tool loads adapters of {base}: merge {adapter} into it, see `reca-trainer merge`.")
    with written_whole(output_dir) as folder:
        package.write_published_adapter(adapter, folder)
    return output_dir


def write_model(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    output_dir: str | os.PathLike,
    dtype: torch.dtype | None = None,
    layout: str = "transformers",
    quantization_config: BitsAndBytesConfig | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a model that `open_lazily` opened; arguments as for `merge_adapter`."""
    if layout not in ("transformers", "published"):
        raise ValueError(f'layout is "transformers" or "published", not {layout!r}.')
    if layout == "published" and quantization_config is not None:
        raise ValueError('Quantised weights have no published layout: use layout="transformers".')
    family = family_of(model) if layout == "published" else None
    if quantization_config is not None:
        dtype = dtype or torch.bfloat16
    model.lazy_weights = cast(model, dtype)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with written_whole(output_dir, _size_written(model, quantization_config)) as folder:
        if family is not None:
            family.write_published(model, processor, folder, **sharding)
        elif quantization_config is None:
            write_weights(model, folder, **sharding)
            processor.save_pretrained(folder)
        else:
            config = type(model.config).from_dict(model.config.to_dict())
            config.__dict__.pop("quantization_config", None)
            options = {"dtype": dtype, "quantization_config": quantization_config}
            loaded = load_strict(type(model), config, model.lazy_weights, model.name_or_path, **options)
            loaded.save_pretrained(folder, **sharding)
            processor.save_pretrained(folder)
    return Path(output_dir)


def _size_written(model: UnifiedModel, quantization_config: BitsAndBytesConfig | None) -> int:
    """Bytes that a model takes up on disk."""
    sizes = {name: float(size_of(tensor)) for name, tensor in model.lazy_weights.items()}
    if quantization_config is not None:
        skipped = quantization_config.llm_int8_skip_modules or ()
        model.check_skipped([entry for entry in skipped if not entry.startswith("(?!")])
        for name in sizes:
            if name.endswith(".weight") and model.quantizes(name.removesuffix(".weight"), skipped):
                sizes[name] *= 0.5 if quantization_config.load_in_8bit else 0.27  # of bfloat16, with scales of blocks
    return int(sum(sizes.values()))
