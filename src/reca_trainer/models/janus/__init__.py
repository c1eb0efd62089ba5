"""Janus and Janus-Pro: next-token prediction of text and of VQ image tokens in one language model.

Built on transformers' Janus. The classes keep transformers' names, so what they save is a plain transformers
checkpoint.
"""

from reca_trainer.models.janus.configuration_janus import JanusConfig as Config
from reca_trainer.models.janus.conversion_janus import (
    is_published,
    read_published,
    read_published_processor,
    write_published,
)
from reca_trainer.models.janus.modeling_janus import JanusForConditionalGeneration as Model
from reca_trainer.models.janus.processing_janus import JanusProcessor as Processor

__all__ = [
    "Config",
    "Model",
    "Processor",
    "is_published",
    "read_published",
    "read_published_processor",
    "write_published",
]
