"""OpenUni: InternVL3, learnable queries, a connector and the SANA diffusion transformer."""

from reca_trainer.models.openuni.configuration_openuni import OpenUniConfig as Config
from reca_trainer.models.openuni.conversion_openuni import (
    TRAINING_KEYS,
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.openuni.modeling_openuni import OpenUniModel as Model
from reca_trainer.models.openuni.processing_openuni import OpenUniProcessor as Processor

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
