"""Which columns of a dataset hold the image, the caption and the conversation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from transformers.utils import logging

from reca_trainer.tasks import TASKS

logger = logging.get_logger(__name__)

Rows = TypeVar("Rows", Dataset, IterableDataset, Dataset | IterableDataset)

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt", "description")
# Of edits. In BAGEL's layout a row is a chain of images, each made from the one before, with the wordings of every step's
# instruction; in others it is a source, an instruction and a target.
EDIT_CHAIN = ("image_list", "instruction_list")
SOURCE_COLUMNS = ("source_image", "input_image", "original_image", "source_img", "src_img", "input", "source")
INSTRUCTION_COLUMNS = ("instruction", "edit_instruction", "edit_prompt", "edit", "edited_prompt_list", "prompt")
TARGET_COLUMNS = ("target_image", "edited_image", "output_image", "target_img", "edited_img", "output", "target")
IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "picture", "images"),
    *TARGET_COLUMNS,  # where nothing but edits is there, their targets are images like others
    "image_list",
)
CONVERSATION_COLUMNS = ("conversations", "conversation", "messages", "texts")

# The description of a dataset some of whose images have no captions: no fault, since RecA needs none.
SOME_CAPTIONS = "Images, some of them with captions."


class Columns(NamedTuple):
    """Names of the columns that are used; `None` for what the dataset has not.

    Attributes:
        image: what is learned to be made or described: of edits the target, or the chain.
        instruction: that of an edit, in one or several wordings; of a chain, those of each step.
        source: what an edit starts from; `image` itself where that holds chains.
        encoded: tensors that stand for the images of reconstructions, see `encoded_shards`.
    """

    image: str
    caption: str | None = None
    conversation: str | None = None
    instruction: str | None = None
    source: str | None = None
    encoded: str | None = None

    @property
    def images(self) -> list[str]:
        return [*dict.fromkeys(name for name in (self.image, self.source) if name)]

    @property
    def texts(self) -> list[str]:
        return [name for name in (self.caption, self.conversation, self.instruction) if name]

    @property
    def has_chains(self) -> bool:
        return self.source == self.image

    def serve(self, task: str) -> bool:
        """Whether a task finds what it learns from here."""
        texts = TASKS[task].columns
        return not texts or any(getattr(self, name) for name in texts)


def find_columns(
    dataset: Dataset | IterableDataset,
    image_column: str | None = None,
    caption_column: str | None = None,
    conversation_column: str | None = None,
) -> Columns:
    """Find the image column by its type, else by its usual names; captions and conversations by their usual names.

    Where a row has a list of images, the first is used, and the log says so.

    Raises:
        ValueError: a named column is missing, there is no image column, or there are several and none has a usual
            name. The message lists the columns there are.
    """
    features = dataset.features or dict.fromkeys(next(iter(dataset.take(1)), {}))
    available = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items()) or "none"
    for asked in (image_column, caption_column, conversation_column):
        if asked is not None and asked not in features:
            raise ValueError(f"The dataset has no column {asked!r}. Its columns: {available}.")

    possible = [name for name, feature in features.items() if _may_hold_images(feature)]
    if image_column is None:
        typed = [name for name in possible if isinstance(_item(features[name]), (Image, dict))]
        usual_names = [name for name in IMAGE_COLUMNS if name in (typed or possible)]
        if not usual_names and len(typed) != 1:
            problem = "several image columns" if typed else "no image column"
            raise ValueError(f"The dataset has {problem}; name the one to use. Its columns: {available}.")
        image_column = (usual_names or typed)[0]
    elif image_column not in possible:
        raise ValueError(f"The column {image_column!r} does not hold images. The dataset's columns: {available}.")
    if isinstance(features[image_column], List):
        logger.warning(f"The column {image_column!r} holds lists of images; the first of each row is used.")
    if caption_column is not None and not _may_hold_captions(features[caption_column]):
        raise ValueError(f"The column {caption_column!r} does not hold text. The dataset's columns: {available}.")

    captions = [name for name in CAPTION_COLUMNS if name in features and _may_hold_captions(features[name])]
    conversations = [
        name for name in CONVERSATION_COLUMNS if name in features and _may_hold_turns(name, features[name])
    ]
    return Columns(
        image=image_column,
        caption=caption_column or next(iter(captions), None),
        conversation=conversation_column or next(iter(conversations), None),
    )


def find_edit_columns(dataset: Dataset | IterableDataset) -> Columns:
    """The columns of edits, by their usual names.

    Raises:
        ValueError: there is no source, no instruction or no target. The message lists the columns there are.
    """
    features = dataset.features or dict.fromkeys(next(iter(dataset.take(1)), {}))
    chain, instructions = EDIT_CHAIN
    if {chain, instructions} <= features.keys():
        return Columns(chain, instruction=instructions, source=chain)
    source, instruction, target = (
        next((name for name in names if name in features and may_hold(features[name])), None)
        for names, may_hold in (
            (SOURCE_COLUMNS, _may_hold_images),
            (INSTRUCTION_COLUMNS, _may_hold_captions),
            (TARGET_COLUMNS, _may_hold_images),
        )
    )
    if source is None or instruction is None or target is None:
        available = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items()) or "none"
        raise ValueError(
            f"The task 'edit' learns from a source ({', '.join(SOURCE_COLUMNS)}), an instruction "
            f"({', '.join(INSTRUCTION_COLUMNS)}) and a target ({', '.join(TARGET_COLUMNS)}), or from chains "
            f"({' and '.join(EDIT_CHAIN)}). Rename the dataset's columns, pass a dataset for the task "
            f"({{'reconstruct': …, 'edit': …}}), or set edit_weight=0. Its columns: {available}."
        )
    return Columns(target, instruction=instruction, source=source)


def _may_hold_images(feature: Any) -> bool:
    """Images by type, or what can be cast to them: encoded bytes, paths, `{bytes, path}`, lists of these, or a type not
    known yet."""
    feature = _item(feature)
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return feature is None or isinstance(feature, Image) or _type_name(feature).endswith(("string", "binary"))


def _may_hold_captions(feature: Any) -> bool:
    text = _item(feature)
    return text is None or _type_name(text).endswith("string")


def _may_hold_turns(name: str, feature: Any) -> bool:
    """Lists of turns, objects, JSON text, or a type not known yet; `texts` may as well be captions."""
    if name == "texts":
        return isinstance(_item(feature), dict)
    return feature is None or isinstance(feature, (List, dict)) or _type_name(feature).endswith("string")


def _item(feature: Any) -> Any:
    return feature.feature if isinstance(feature, List) else feature


def _type_name(feature: Any) -> str:
    if isinstance(feature, List):
        return f"list of {_type_name(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def check_columns(columns: Mapping[str, Columns]) -> None:
    """Raises `ValueError` for a task whose dataset has no column it can learn from."""
    for task, names in columns.items():
        if not names.serve(task):
            wanted = " or ".join(f"{name}s" for name in reversed(TASKS[task].columns))
            raise ValueError(
                f"The task {task!r} learns from {wanted}, but its dataset has no column of them; name it."
            )


def under_root(
    dataset: Dataset | IterableDataset, columns: Columns, image_root: str | os.PathLike[str] | None
) -> Dataset | IterableDataset:
    """Relative image paths taken from the folder `image_root`, as LLaVA's conversations need it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a path leads out of it.
    """
    if image_root is None:
        return dataset
    root = Path(image_root).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"image_root={image_root} is no folder.")
    for column in columns.images:
        dataset = _under_root(dataset, column, root)
    return dataset


def _under_root(dataset: Rows, column: str, root: Path) -> Rows:
    def joined(image: Any) -> Any:
        if isinstance(image, (list, tuple)):
            return [joined(item) for item in image]
        image = image if isinstance(image, Mapping) else {"bytes": None, "path": image}
        path = image.get("path")
        if path and image.get("bytes") is None and "://" not in path and not os.path.isabs(path):
            path = os.path.normpath(root / path)
            if not Path(path).is_relative_to(root):
                raise ValueError(f"The image path {image['path']!r} leads out of image_root={root}.")
        return {"bytes": image.get("bytes"), "path": path}

    if dataset.features is not None and not isinstance(_item(dataset.features[column]), Value):
        return dataset  # images, not paths to them
    if isinstance(dataset, IterableDataset):
        if dataset.features is not None:
            dataset = dataset.cast_column(column, encoded_as(dataset.features[column]))
        return dataset.map(lambda image: {column: joined(image)}, input_columns=[column])
    images = undecoded(dataset, [column], column).map(
        lambda image: {column: joined(image)},
        input_columns=[column],
        features=Features({column: encoded_as(dataset.features[column])}),
        desc="Joining image paths",
    )
    return concatenate_datasets([dataset.remove_columns(column), images], axis=1)


def with_images(dataset: Dataset | IterableDataset, columns: Columns) -> Dataset | IterableDataset:
    """Without the text-only conversations, whose number is logged; a stream leaves them out as it goes.

    Raises:
        ValueError: no conversation has an image.
    """
    if columns.conversation is None or isinstance(dataset, IterableDataset):
        return dataset
    has_image: list[bool] = []
    for table in undecoded(dataset, [columns.image], columns.image).with_format("arrow").iter(batch_size=1000):
        cells = pa.chunked_array(table.column(columns.image)).combine_chunks()
        if pa.types.is_list(cells.type):
            has_image += [bool(length) for length in pc.list_value_length(cells).to_pylist()]
            continue
        empty = pc.and_(pc.struct_field(cells, "bytes").is_null(), pc.struct_field(cells, "path").is_null())
        has_image += pc.invert(empty).to_pylist()
    if all(has_image):
        return dataset
    rows = [row for row, present in enumerate(has_image) if present]
    if not rows:
        raise ValueError(f"None of {len(dataset)} conversations has an image in the column {columns.image!r}.")
    logger.warning(f"Left out {len(has_image) - len(rows)} of {len(has_image)} conversations: they have no image.")
    return dataset.select(rows)


def undecoded(dataset: Rows, columns: Sequence[str], *image_columns: str) -> Rows:
    """Only the named columns, as plain Python values, images still encoded."""
    dataset = dataset.with_format(None).select_columns([name for name in columns if name])
    if dataset.features is None:  # a stream of unknown types decodes nothing by itself
        return dataset
    for column in image_columns:
        dataset = dataset.cast_column(column, encoded_as(dataset.features[column]))
    return dataset


def encoded_as(feature: Any) -> Image | List:
    """The type of an image column, or of one of lists, whose cells are not decoded."""
    return List(Image(decode=False)) if isinstance(feature, List) else Image(decode=False)


def first_image(cell: Any) -> Any:
    """The image of a cell, the first of a list; `None` of an empty one."""
    return next(iter(cell), None) if isinstance(cell, (list, tuple)) else cell


def needed_columns(dataset: Dataset | IterableDataset, columns: Columns) -> list[str]:
    names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    return [*dict.fromkeys(name for name in columns if name), *(n for n in ("__url__",) if n in names)]
