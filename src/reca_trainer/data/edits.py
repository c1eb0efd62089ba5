"""Edits: which images of a row a sample learns from, and in which words."""

from __future__ import annotations

from typing import Any, NamedTuple

from reca_trainer.data.columns import Columns
from reca_trainer.data.sampling import Draw, mixed_hash
from reca_trainer.images import ImageError


class Edit(NamedTuple):
    """What a row gives a sample.

    Attributes:
        source, target: undecoded images.
        instruction: from the one to the other; `None` where there are no words.
    """

    source: Any
    target: Any
    instruction: str | None


def wordings_of(cell: Any, has_chains: bool) -> list[list[str]]:
    """The wordings of every step's instruction, blank ones left out: of a text, of a list of wordings or, for chains, of a
    list with the one wording or the list of them of each step."""
    steps = cell if has_chains and isinstance(cell, (list, tuple)) else [cell]
    lists = [step if isinstance(step, (list, tuple)) else [step] for step in steps]
    return [[words for words in step if isinstance(words, str) and words.strip()] for step in lists]


def has_instructions(cell: Any, has_chains: bool) -> bool:
    steps = wordings_of(cell, has_chains)
    return bool(steps) and all(steps)


def edit_of(draw: Draw, record: dict[str, Any], columns: Columns, source: str) -> Edit:
    """The edit that a sample's seed picks from a row.

    From a chain it is a step, or two steps with both instructions, with the probabilities of BAGEL's loader
    (`UnifiedEditIterableDataset`). Where that loader learns two steps in turn, one of them is drawn: a sample has one target.

    Raises:
        ImageError: a chain of one image, or with fewer instructions than steps; several sources or targets in other layouts.
    """
    steps = wordings_of(record[columns.instruction or ""], columns.has_chains)

    def words(step: int) -> str | None:
        choices = steps[step]
        return choices[mixed_hash(draw.seed, 10, step) % len(choices)] if choices else None

    if not columns.has_chains:
        cells = [record[columns.source or ""], record[columns.image]]
        for index, cell in enumerate(cells):
            if isinstance(cell, (list, tuple)):
                if len(cell) != 1:
                    raise ImageError(f"{source}: an edit has one source and one target, and this row has {len(cell)}.")
                cells[index] = cell[0]
        return Edit(cells[0], cells[1], words(0))

    images = record[columns.image] or []
    count = len(images)
    if count < 2 or len(steps) < count - 1:
        raise ImageError(
            f"{source}: a chain of edits has two images or more and an instruction for every step, and this one has "
            f"{count} images and {len(steps)} instructions."
        )
    start = mixed_hash(draw.seed, 6) % (count - 1)
    length = 1 + mixed_hash(draw.seed, 7) % (min(start + 3, count) - start - 1)
    if length == 1:
        return Edit(images[start], images[start + 1], words(start))
    if mixed_hash(draw.seed, 8) % 2:
        start += mixed_hash(draw.seed, 9) % 2
        return Edit(images[start], images[start + 1], words(start))
    # As in the original, joined steps never reach the last image.
    end = start + length - (start + length == count - 1)
    parts = [words(step) for step in range(start, end)]
    joined = None if None in parts else " ".join(f"{part}." for part in parts)
    return Edit(images[start], images[end], joined)
