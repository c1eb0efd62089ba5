"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import torch


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Predictions extrapolated from the unconditional through the conditional ones, which `scale` 1 gives."""
    return unconditional + scale * (conditional - unconditional)


def limit_norm(guided: torch.Tensor, conditional: torch.Tensor, dim: tuple[int, ...], minimum: float) -> torch.Tensor:
    """`guided`, scaled down where its norm over the dimensions `dim` exceeds that of `conditional`, by a factor of at least
    `minimum` (BAGEL's guidance renormalisation, arXiv:2505.14683)."""
    norm, reference = (torch.linalg.vector_norm(v, dim=dim, keepdim=True) for v in (guided, conditional))
    return guided * (reference / (norm + 1e-8)).clamp(minimum, 1.0)
