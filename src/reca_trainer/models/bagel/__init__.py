"""BAGEL (arXiv 2505.14683): a mixture of transformers that understands with SigLIP and generates by flow matching."""

from reca_trainer.models.bagel.configuration_bagel import BagelConfig as Config
from reca_trainer.models.bagel.conversion_bagel import (
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.bagel.modeling_bagel import BagelModel as Model
from reca_trainer.models.bagel.processing_bagel import BagelProcessor as Processor

__all__ = [
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "write_published",
]
