"""Rows of different lengths as one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

Side = Literal["left", "right"]


def pad_rows(rows: Sequence[list[int]], value: int, side: Side = "right", length: int | None = None) -> torch.Tensor:
    """Rows of ids as `[B, T]` int64, padded with `value` on one side to `length`, by default that of the longest row."""
    length = max(map(len, rows)) if length is None else length
    filled = [[value] * (length - len(row)) for row in rows]
    pairs = zip(rows, filled, strict=True)
    return torch.tensor([[*fill, *row] if side == "left" else [*row, *fill] for row, fill in pairs], dtype=torch.long)


def padding_mask(rows: Sequence[list[int]], side: Side = "right", length: int | None = None) -> torch.Tensor:
    """The attention mask `[B, T]` int64 of `pad_rows`: 1 at ids, 0 at padding."""
    return pad_rows([[1] * len(row) for row in rows], 0, side, length)


def padded_batch(
    rows: Sequence[list[int]], value: int, labels: Sequence[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Rows of ids as `input_ids` `[B, T]`, padded on the right with `value`, with an `attention_mask` if any row is padded,
    and their `labels`, padded with -100, if there are any."""
    batch = {"input_ids": pad_rows(rows, value)}
    if len(set(map(len, rows))) > 1:
        batch["attention_mask"] = padding_mask(rows)
    if labels is not None:
        batch["labels"] = pad_rows(labels, -100)
    return batch


def stack_padded(parts: Sequence[torch.Tensor], value: float = 0, side: Side = "right") -> torch.Tensor:
    """Batches `[B, T, ...]` of different T, concatenated along B and padded with `value` on one side to the longest T."""
    longest = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        missing = longest - part.shape[1]
        pads = (missing, 0) if side == "left" else (0, missing)
        filled.append(F.pad(part, (*[0] * (2 * part.ndim - 4), *pads), value=value))
    return torch.cat(filled)
