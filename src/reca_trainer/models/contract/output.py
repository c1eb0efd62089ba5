"""What a task's forward pass returns, and the loss that all families share: cross-entropy of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput


@dataclass
class UnifiedOutput(ModelOutput):
    """What one task's forward pass returns.

    Args:
        loss (`torch.Tensor`): scalar float32, the mean over the batch's supervised tokens.
        per_sample_loss (`torch.Tensor`): `[B]` float32, the same mean taken sample by sample, detached.
        prediction (`torch.Tensor`): what the generator predicted (velocity, noise or logits), in the family's shape.
        target (`torch.Tensor`): what the prediction was compared with.
        understanding_embeds (`torch.Tensor`): `[B, S, D]`, the dense prompt of a reconstruction.
    """

    loss: torch.Tensor | None = None
    per_sample_loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    target: torch.Tensor | None = None
    understanding_embeds: torch.Tensor | None = None


def token_cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    understanding_embeds: torch.Tensor | None = None,
    supervised: torch.Tensor | None = None,
) -> UnifiedOutput:
    """Cross-entropy of the supervised labels, of which a batch has L.

    Args:
        head: output layer, `[L, D]` -> `[L, V]`. Only supervised positions go through it: all logits would fill the memory.
        hidden: `[B, T, D]`, the states that predict the labels at the same places. Next-token prediction passes
            `hidden[:, :-1]` and `labels[:, 1:]`.
        labels: `[B, T]` int64.
        supervised: `[B, T]` bool, which labels count; by default those that are not -100.

    Returns:
        `UnifiedOutput` with `prediction` the logits `[L, V]` and `target` the labels `[L]` of the supervised positions.

    Raises:
        ValueError: no label is supervised.
    """
    supervised = labels != -100 if supervised is None else supervised
    target = labels[supervised]
    if not len(target):
        raise ValueError("No token of this batch is supervised; are its questions so long that the answers are cut?")
    logits = head(hidden[supervised])
    losses = F.cross_entropy(logits.float(), target, reduction="none")  # [L]
    rows = losses.new_zeros(supervised.shape).masked_scatter(supervised, losses.detach())  # [B, T]
    return UnifiedOutput(
        loss=losses.mean(),
        per_sample_loss=rows.sum(1) / supervised.sum(1).clamp(min=1),
        prediction=logits,
        target=target,
        understanding_embeds=understanding_embeds,
    )


def count_answer_tokens(labels: torch.Tensor) -> int:
    """Number of targets in next-token labels `[B, T]`, whose first column nothing predicts."""
    return int((labels[:, 1:] != -100).sum())
