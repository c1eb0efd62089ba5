"""Qwen-Image-Edit (arXiv:2508.02324): Qwen2.5-VL, a diffusion transformer of 20B parameters and Qwen-Image's autoencoder."""

from reca_trainer.models.qwen_image.configuration_qwen_image import QwenImageConfig as Config
from reca_trainer.models.qwen_image.conversion_qwen_image import (
    is_published,
    read_published,
    read_published_processor,
    write_published,
    write_published_adapter,
)
from reca_trainer.models.qwen_image.modeling_qwen_image import QwenImageModel as Model
from reca_trainer.models.qwen_image.processing_qwen_image import QwenImageProcessor as Processor

__all__ = [
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "write_published",
    "write_published_adapter",
]
