"""Show-o (arXiv 2408.12528): masked prediction of discrete image tokens in a language model, which also reads images."""

from reca_trainer.models.show_o.configuration_show_o import ShowOConfig as Config
from reca_trainer.models.show_o.conversion_show_o import (
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.show_o.modeling_show_o import ShowOModel as Model
from reca_trainer.models.show_o.processing_show_o import ShowOProcessor as Processor

__all__ = [
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "write_published",
]
