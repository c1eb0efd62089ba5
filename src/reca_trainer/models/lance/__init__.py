"""Lance (arXiv:2605.18678): a mixture of transformers that understands with Qwen2.5-VL's vision transformer and generates by
flow matching in Wan2.2's latents."""

from reca_trainer.models.lance.configuration_lance import LanceConfig as Config
from reca_trainer.models.lance.conversion_lance import (
    is_published,
    read_published,
    read_published_processor,
    variants,
    write_published,
)
from reca_trainer.models.lance.modeling_lance import LanceModel as Model
from reca_trainer.models.lance.processing_lance import LanceProcessor as Processor

__all__ = [
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "variants",
    "write_published",
]
