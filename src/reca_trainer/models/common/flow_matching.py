"""Rectified flow (arXiv:2209.03003): a model predicts the velocity `ε - x` of `x_t = (1 - t) x + t ε`."""

from __future__ import annotations

import torch

from reca_trainer.models.contract import UnifiedOutput


def interpolate(clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """`x_t` `[B, ...]` at `time` `[B]`, 0 for the clean `x` and 1 for noise, in the dtype of `clean`."""
    time = time.to(clean).view(-1, *[1] * (clean.ndim - 1))
    return (1 - time) * clean + time * noise


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """`t <- s t / (1 + (s - 1) t)`: a `shift` `s` above 1 moves timesteps towards noise (arXiv:2403.03206, equation 23)."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def flow_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    repeats: int = 1,
    understanding_embeds: torch.Tensor | None = None,
) -> UnifiedOutput:
    """Mean squared error, in float32, of velocities `[B · repeats, ...]`; the `repeats` of a sample are in a row."""
    squares = (prediction.float() - target.float()).square()
    errors = squares.mean(dim=tuple(range(1, squares.ndim)))  # [B · repeats]
    return UnifiedOutput(
        loss=errors.mean(),
        per_sample_loss=errors.detach().view(-1, repeats).mean(1),
        prediction=prediction,
        target=target,
        understanding_embeds=understanding_embeds,
    )
