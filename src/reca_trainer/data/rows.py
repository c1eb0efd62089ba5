"""From a row of a dataset to what the collator takes: whole, upright RGB images and their text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import fsspec
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load

from reca_trainer.data.columns import Columns, check_columns, first_image, needed_columns, undecoded
from reca_trainer.data.edits import edit_of
from reca_trainer.data.sampling import Draw, mixed_hash
from reca_trainer.data.texts import text_of
from reca_trainer.images import ImageError, decode_image, image_size, list_problems
from reca_trainer.models.contract import Conversation

# So many unreadable images one after the other mean that something else is wrong than a few bad files.
MAX_BAD_IN_A_ROW = 1000
SHAPE_TOLERANCE = 0.03  # share by which the ratios of sides of an edit's images may differ

ConversationProblem = Callable[[Conversation], str | None]


@dataclass(frozen=True)
class Row:
    """A sample: what was drawn for it, and what was read.

    Attributes:
        draw: task, target size, seed, instruction, and the draws of crop and dropout.
        source: where it stands, for messages: its number, file and archive.
        image: whole and upright, RGB; `None` where `tensors` stand for it.
        text: a caption, the messages of a conversation, or `None`.
        source_images: the pictures that an edit starts from, whole and upright, RGB; none for the other tasks.
        tensors: what the frozen encoders make of the image, where that is kept on disk (see `latent_cache` and `encoded_shards`).
        skipped: what was wrong with the rows that this one stands in for.
    """

    draw: Draw
    source: str
    image: Image.Image | None = None
    text: str | Conversation | None = None
    source_images: tuple[Image.Image, ...] = ()
    tensors: dict[str, torch.Tensor] | None = None
    skipped: tuple[str, ...] = ()


class UnusableConversation(ValueError):
    """A conversation that the family cannot learn from; the message names its row."""


class RowDataset(torch.utils.data.Dataset[Row]):
    """The rows that a `TaskBatchSampler` draws, decoded: `dataset[draw]`.

    Args:
        datasets: each task's `datasets.Dataset` (two tasks may share one).
        columns: each task's `Columns`.
        on_bad_image: `"raise"` an `ImageError` that names row and file, or `"skip"`: put another row in its
            place, drawn from all, and list what was wrong in `Row.skipped`.
        conversation_problem: why a family cannot learn from a conversation (`UnifiedProcessor.conversation_problem`);
            another row takes its place, listed in `Row.skipped`.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        columns: Mapping[str, Columns],
        on_bad_image: str = "raise",
        conversation_problem: ConversationProblem | None = None,
    ):
        check_on_bad_image(on_bad_image)
        check_columns(columns)
        self.columns = dict(columns)
        self.on_bad_image = on_bad_image
        self.conversation_problem = conversation_problem
        self.datasets = {
            task: undecoded(dataset, needed_columns(dataset, columns[task]), *columns[task].images)
            for task, dataset in datasets.items()
        }

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, draw: Draw) -> Row:
        """A row, ready for the collator.

        Raises:
            ImageError: the image cannot be used; with `"skip"`, neither can any of those drawn in its place, up to all
                rows or `MAX_BAD_IN_A_ROW`.
            ValueError: what should be a caption or a conversation is something else.
        """
        dataset, columns = self.datasets[draw.task], self.columns[draw.task]
        skipped: list[str] = []
        for number in with_substitutes(draw.row, len(dataset)):
            record = dataset[number]
            source = source_name(number, record[columns.image], record.get("__url__"))
            try:
                return read_row(draw, record, columns, source, self.conversation_problem, skipped)
            except UnusableConversation as error:
                skipped.append(str(error))
            except ImageError as error:
                if self.on_bad_image == "raise":
                    raise
                skipped.append(str(error))
        raise ImageError(list_problems(skipped, f"None of {len(skipped)} rows, one after the other, can be used"))


def with_substitutes(wanted: int, rows: int) -> Iterator[int]:
    """The wanted row, then what stands in for it: others of all `rows`, in an order that hangs on it alone, none twice. A
    damaged shard so is not replaced by its one neighbour."""
    tried = {wanted}
    yield wanted
    for attempt in count():
        if len(tried) == min(rows, MAX_BAD_IN_A_ROW):
            return
        row = mixed_hash(5, wanted, attempt) % rows
        if row not in tried:
            tried.add(row)
            yield row


def read_row(
    draw: Draw,
    record: dict[str, Any],
    columns: Columns,
    source: str,
    conversation_problem: ConversationProblem | None = None,
    skipped: Sequence[str] = (),
) -> Row:
    """Decode the record of a dataset.

    Raises:
        ImageError: the image cannot be used, or the images of an edit differ in shape.
        UnusableConversation: the conversation has no image, or `conversation_problem` says why not to learn from it.
        ValueError: what should be a caption or a conversation is something else.
    """
    if draw.task == "edit":
        return _read_edit(draw, record, columns, source, skipped)
    if draw.task == "reconstruct" and columns.encoded:
        return Row(draw, source, tensors=load(record[columns.encoded]), skipped=tuple(skipped))
    text = text_of(draw, record, columns, source)
    if isinstance(text, list):
        problem = "no image" if has_no_image(record[columns.image]) else None
        if problem is None and conversation_problem is not None:
            problem = conversation_problem(text)
        if problem is not None:
            raise UnusableConversation(f"{source}: the conversation is left out: {problem}.")
    image = decode_image(read_source(record[columns.image], source), source)
    return Row(draw, source, image, text, skipped=tuple(skipped))


def _read_edit(draw: Draw, record: dict[str, Any], columns: Columns, source: str, skipped: Sequence[str] = ()) -> Row:
    edit = edit_of(draw, record, columns, source)
    before, after = (
        decode_image(read_source(cell, f"{source}, {role}"), f"{source}, {role}")
        for role, cell in (("source image", edit.source), ("target image", edit.target))
    )
    # The size of a sample is that of its row's first image, and its source is made at the size of its target.
    first = image_size(read_source(record[columns.image], source), source) if columns.has_chains else after.size
    for size in (before.size, after.size):
        if abs(size[0] * first[1] - size[1] * first[0]) > SHAPE_TOLERANCE * size[1] * first[0]:
            shapes = ", ".join(
                f"{width} x {height}" for width, height in dict.fromkeys((first, before.size, after.size))
            )
            raise ImageError(f"{source}: the images of an edit have one shape, and these are of {shapes} pixels.")
    return Row(draw, source, after, edit.instruction, source_images=(before,), skipped=tuple(skipped))


def has_no_image(image: Any) -> bool:
    """Whether an undecoded image cell is empty."""
    image = first_image(image)
    if isinstance(image, Mapping):
        return image.get("bytes") is None and not image.get("path")
    return image is None or image == ""


def read_source(image: Any, source: str) -> Any:
    """What `decode_image` can open: rows may point into an archive or, streamed, into a Hub repository."""
    image = first_image(image)
    path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
    if not isinstance(path, str) or "://" not in path:
        return image
    if not {part.split("://")[0] for part in path.split("::") if "://" in part} <= {"hf", "zip", "tar", "file"}:
        raise ImageError(f"{source}: the image is a remote address; download it first.")
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:
        raise ImageError(f"{source}: cannot be read ({type(error).__name__}: {error}).") from error


def source_name(row: int, image: Any, archive: str | None = None) -> str:
    image = first_image(image)
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    where = " in ".join(part for part in (path, archive) if part)
    return f"row {row} ({where})" if where else f"row {row}"


def check_on_bad_image(on_bad_image: str) -> None:
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image is 'raise' or 'skip', got {on_bad_image!r}.")
