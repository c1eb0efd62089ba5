"""Janus and Janus-Pro: next-token prediction of text and of VQ image tokens in one language model.

Built on transformers' Janus. The classes keep transformers' names, so what they save is a plain transformers
checkpoint.
"""

from reca_trainer.models.janus.checkpoint_janus import (
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.janus.configuration_janus import JanusConfig, tiny_config
from reca_trainer.models.janus.modeling_janus import JanusForConditionalGeneration
from reca_trainer.models.janus.processing_janus import JanusProcessor, tiny_processor

Config, Model, Processor = JanusConfig, JanusForConditionalGeneration, JanusProcessor

__all__ = [
    "Config",
    "JanusConfig",
    "JanusForConditionalGeneration",
    "JanusProcessor",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "tiny_config",
    "tiny_processor",
    "write_published",
]
