"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import torch


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Predictions led away from the unconditional ones: at `scale` 1 the conditional ones, more above."""
    return unconditional + scale * (conditional - unconditional)


def no_longer(guided: torch.Tensor, conditional: torch.Tensor, dim: tuple[int, ...], minimum: float) -> torch.Tensor:
    """`guided` shortened to the length, over the dimensions `dim`, of what it was guided from, by a factor of at least
    `minimum` (the renormalisation of BAGEL, arXiv:2505.14683)."""
    norm, reference = (torch.linalg.vector_norm(v, dim=dim, keepdim=True) for v in (guided, conditional))
    return guided * (reference / (norm + 1e-8)).clamp(minimum, 1.0)
