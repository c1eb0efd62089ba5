"""To and from the Hub: adapters and merged models with their cards, and exports to a family's published layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from reca_trainer.adapters import write_model
from reca_trainer.models.auto import AutoUnifiedProcessor, open_lazily
from reca_trainer.models.unified import UnifiedModel, UnifiedProcessor


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
