"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import torch


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Predictions led away from the unconditional ones: at `scale` 1 the conditional ones, more above."""
    return unconditional + scale * (conditional - unconditional)
