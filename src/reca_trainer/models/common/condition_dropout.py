"""Dropout of condition embeddings in training, so that a generator cannot copy its condition."""

from __future__ import annotations

import torch

from reca_trainer.models.contract import Generators, per_sample


def draw_condition_dropout(share: float, batch_size: int, generator: Generators) -> dict[str, torch.Tensor]:
    """The draws that `drop_condition` reads: `condition_seeds` `[B]` int64, one from each sample's generator, and
    `condition_dropout` `[B]` int64, the share to drop in millionths."""
    seeds = per_sample(lambda g: torch.randint(2**62, (), generator=g), batch_size, generator)
    return {"condition_seeds": seeds, "condition_dropout": torch.full((batch_size,), round(share * 1e6))}


def drop_condition(
    corruption: dict[str, torch.Tensor], mask: torch.Tensor | None, places: torch.Tensor
) -> torch.Tensor | None:
    """Hide a share of the condition's embeddings behind an attention mask, as IOMM (arXiv:2603.16139) does.

    Exactly the share of a sample's embeddings, rounded, is hidden. The sample's seed and the embeddings' order alone decide
    which ones.

    Args:
        corruption: the draws, with those of `draw_condition_dropout` where embeddings are dropped.
        mask: `[B, T]`, 0 at padding; `None` where nothing is padded.
        places: `[B, T]` bool, where the condition's embeddings are.

    Returns:
        The mask, 0 at hidden embeddings too, or `mask` itself where the draws drop nothing.
    """
    if "condition_seeds" not in corruption:
        return mask
    seeds, share = (corruption[name].to(places.device) for name in ("condition_seeds", "condition_dropout"))
    # splitmix64 in signed integers: the same numbers on every device.
    state = seeds[:, None] + (places.cumsum(1) - 1) * -0x61C8864680B583EB  # [B, T]
    state = (state ^ (state >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    state = (state ^ (state >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    scores = (state ^ (state >> 31 & 2**33 - 1)) >> 1 & 2**62 - 1  # [B, T]
    rank = scores.masked_fill(~places, 2**62).argsort(dim=1).argsort(dim=1)  # [B, T]
    dropped = (places.sum(1) * share + 500_000) // 1_000_000  # [B]
    hidden = places & (rank < dropped[:, None])
    mask = torch.ones_like(places, dtype=torch.long) if mask is None else mask.expand(len(places), -1)
    return mask.masked_fill(hidden, 0)
