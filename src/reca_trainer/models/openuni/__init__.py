"""OpenUni: InternVL3, learnable queries, a connector and the SANA diffusion transformer."""

from reca_trainer.models.openuni.configuration_openuni import OpenUniConfig as Config
from reca_trainer.models.openuni.conversion_openuni import (
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.openuni.modeling_openuni import OpenUniModel as Model
from reca_trainer.models.openuni.processing_openuni import OpenUniProcessor as Processor

__all__ = [
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "write_published",
]
