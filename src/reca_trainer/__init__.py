"""Reconstruction Alignment (RecA) post-training for unified multimodal models."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "AutoUnifiedModel": "reca_trainer.models.auto",
    "AutoUnifiedProcessor": "reca_trainer.models.auto",
    "RecAConfig": "reca_trainer.config",
    "RecATrainer": "reca_trainer.trainer",
    "UnifiedModel": "reca_trainer.models.contract",
    "UnifiedOutput": "reca_trainer.models.contract",
    "UnifiedProcessor": "reca_trainer.models.contract",
    "register_family": "reca_trainer.models.registry",
}

__all__ = [
    "AutoUnifiedModel",
    "AutoUnifiedProcessor",
    "RecAConfig",
    "RecATrainer",
    "UnifiedModel",
    "UnifiedOutput",
    "UnifiedProcessor",
    "register_family",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from reca_trainer.config import RecAConfig
    from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
    from reca_trainer.models.contract import UnifiedModel, UnifiedOutput, UnifiedProcessor
    from reca_trainer.models.registry import register_family
    from reca_trainer.trainer import RecATrainer


# PEFT imports bitsandbytes, which then warns that it has no kernels for 4-bit weights on a CPU, whatever is done.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
