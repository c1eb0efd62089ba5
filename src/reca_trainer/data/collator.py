"""Dataset rows to one rectangular batch of one task."""

from __future__ import annotations

from typing import Any, cast

import torch
from PIL.Image import Image
from torch.nn.utils.rnn import pad_sequence

from reca_trainer.data.rows import Row
from reca_trainer.models.contract import UnifiedProcessor

# Entries of a batch that are for the trainer and not the model.
NOTES = ("seeds", "sources", "skipped", "lost_rows", "texts_cut", "repeated")


class UnifiedCollator:
    """Calls a family's processor on the rows of one micro-batch.

    `processor` gets whole pictures and, for every row, what its `Draw` says: instruction, crop and whether its text is
    dropped (see `UnifiedProcessor.__call__`).

    Args:
        processor (`UnifiedProcessor`): turns images and strings into one task's batch.
    """

    def __init__(self, processor: UnifiedProcessor):
        self.processor = processor

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Build one batch of rows.

        Returns:
            The processor's batch and, for the trainer: `seeds` (one corruption seed per sample), `sources` (what each
            sample is called in messages), `skipped` (what was wrong with the rows these stand in for), `texts_cut` (how many
            texts were longer than the family takes) and `repeated` (whether another process has the same samples).

        Raises:
            ValueError: rows of different tasks or sizes, or a row without the caption its task learns from.
        """
        if not rows:
            raise ValueError("A batch needs at least one row.")
        draws = [row.draw for row in rows]
        task, size = draws[0].task, draws[0].size
        for row in rows:
            if (row.draw.task, row.draw.size) != (task, size):
                raise ValueError(
                    f"{row.source} ({row.draw.task}, {row.draw.size}) cannot share a batch with "
                    f"{rows[0].source} ({task}, {size}); use TaskBatchSampler."
                )
            if task != "reconstruct" and not row.text:
                raise ValueError(
                    f"{row.source}: no caption, but the task {task!r} learns from it. Fill in or drop "
                    "such rows, name another column, or give this task the weight 0."
                )
        encoded = [row.tensors for row in rows if row.tensors is not None]  # of all rows or of none
        texts_cut = getattr(self.processor, "texts_cut", 0)
        images: list[Any] | None = None if encoded else [cast(Image, row.image) for row in rows]
        of_edits: dict[str, Any] = {}
        if task == "edit":
            images = [(*row.source_images, row.image) for row in rows]
            of_edits["dropped_sources"] = [draw.dropped_sources for draw in draws]
        batch = self.processor(
            images=images,
            text=None if task == "reconstruct" else cast("list[str]", [row.text for row in rows]),
            instruction=[draw.instruction for draw in draws],
            task=task,
            size=size,
            crop=[draw.crop for draw in draws],
            dropped=[draw.dropped for draw in draws],
            **of_edits,
        )
        if encoded:
            batch.update(pad_encoded(encoded))
        return {
            **batch,
            "seeds": [draw.seed for draw in draws],
            "sources": [row.source for row in rows],
            "skipped": [problem for row in rows for problem in row.skipped],
            "texts_cut": getattr(self.processor, "texts_cut", 0) - texts_cut,
            "repeated": draws[0].repeated,
        }


def pad_encoded(encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack what `UnifiedModel.encode_batch` gave of single images; embeddings `condition_embeds` `[S, D]` of different
    lengths are padded with zeros, and `condition_attention_mask` `[B, S]` bool says which are real."""
    batch = {name: pad_sequence([tensors[name] for tensors in encoded], batch_first=True) for name in encoded[0]}
    lengths = [len(tensors["condition_embeds"]) for tensors in encoded if "condition_embeds" in tensors]
    if len(set(lengths)) > 1:
        batch["condition_attention_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return batch
