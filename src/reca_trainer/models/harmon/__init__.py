"""Harmon: a masked autoregressive image model around Qwen2.5 that understands and generates with the same weights."""

from reca_trainer.models.harmon.configuration_harmon import HarmonConfig as Config
from reca_trainer.models.harmon.conversion_harmon import (
    TRAINING_KEYS,
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.harmon.modeling_harmon import HarmonModel as Model
from reca_trainer.models.harmon.processing_harmon import HarmonProcessor as Processor

__all__ = [
    "TRAINING_KEYS",
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "write_published",
]
