"""Which rows a training step sees, in which order, and how a row becomes an upright RGB image with its text.

Order and randomness are pure functions of (seed, epoch): nothing here remembers a position, so skipping the first
micro-batches of an epoch resumes a run exactly, and the number of processes only decides who gets which part of a
global micro-batch (`batch_size * num_processes` rows of one task and one aspect-ratio bucket).
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch.utils.data import Sampler, get_worker_info

from reca_trainer.images import ImageError, decode_image, fit_to_size, image_size, nearest_bucket
from reca_trainer.instructions import CAPTION_QUESTIONS, INSTRUCTIONS
from reca_trainer.models.unified import TASKS

logger = logging.getLogger(__name__)

# By default `load_dataset` reports even the reading of a local folder to a server that counts.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt", "description")
CONVERSATION_COLUMNS = ("conversations", "conversation", "messages")

# So many unreadable images one after the other mean that something else is wrong than a few bad files.
MAX_BAD_IN_A_ROW = 1000

_FILE_KINDS = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".zip": "imagefolder",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
_IMAGE_SUFFIXES = set(ImageFolder.EXTENSIONS)
_SPLIT_FOLDERS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


# --- where rows come from ---


def load_image_dataset(
    name_or_path: str | os.PathLike,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    **hub: Any,
) -> Dataset | IterableDataset:
    """Open any image source that `datasets` reads.

    Args:
        name_or_path: a folder of images (with `metadata.jsonl` or `.csv` for captions, if any), a folder of `.tar`
            shards or one of them (WebDataset), a `.parquet`, `.arrow`, `.jsonl`, `.csv` or `.zip` file, a folder made
            by `Dataset.save_to_disk`, or a dataset's id on the Hub. Archives are read in place or unpacked into the
            `datasets` cache, never beside themselves.
        split: which split; a folder without split subfolders is one split, whatever it is called.
        config_name: the dataset's configuration, where it has several.
        streaming: give an `IterableDataset` that reads as it goes.
        hub: further arguments of `datasets.load_dataset` (`revision`, `token`, `cache_dir`, …).

    Raises:
        FileNotFoundError: nothing at that path.
        ValueError: a local source that cannot be read (unknown kind, damaged archive, no such split) or without rows.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.exists():
        try:
            load = _load_folder if path.is_dir() else _load_file
            dataset = load(path, config_name, {"split": split, "streaming": streaming, **hub})
        except Exception as error:  # what `datasets` says of a damaged archive does not name it
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            raise ValueError(f"Cannot read {name} as a dataset: {reason or error}") from error
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix.lower() in _FILE_KINDS:
        raise FileNotFoundError(f"There is no file or folder {name} to read images from.")
    else:
        try:
            dataset = load_dataset(name, config_name, split=split, streaming=streaming, **hub)
        except OSError as error:
            raise type(error)(f"There is no file or folder {name}, and no such dataset on the Hub: {error}") from error
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The split {split!r} of {name} has no rows.")
    return dataset


def _load_file(path: Path, config_name: str | None, options: dict[str, Any]):
    kind = _FILE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"expected a folder of images or one of {', '.join(_FILE_KINDS)}.")
    return load_dataset(kind, config_name, data_files={options["split"]: str(path)}, **options)


def _load_folder(path: Path, config_name: str | None, options: dict[str, Any]):
    split = options["split"]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if not isinstance(saved, Dataset):
            if split not in saved:
                raise ValueError(f"there is no split {split!r}, but {', '.join(saved)}.")
            saved = saved[split]
        return saved.to_iterable_dataset() if options["streaming"] else saved
    files = [file for file in path.rglob("*") if not file.is_dir()]
    kinds = {file.suffix.lower() for file in files if file.is_file()}
    if not kinds & (_IMAGE_SUFFIXES | set(_FILE_KINDS)):
        raise ValueError(f"there are no images, and no {', '.join(_FILE_KINDS)} files, in this folder.")
    # `datasets` takes splits from file names too: of a plain folder of pictures, it would put test_1.jpg elsewhere.
    if config_name is None and not any(child.name.lower() in _SPLIT_FOLDERS for child in path.iterdir()):
        if shards := sorted(str(file) for file in path.glob("*.tar")):
            return load_dataset("webdataset", data_files={split: shards}, **options)
        if kinds & _IMAGE_SUFFIXES:
            read = {*_IMAGE_SUFFIXES, *_FILE_KINDS}
            ignored = [str(file) for file in files if file.suffix.lower() not in read or not file.is_file()]
            if ignored:
                logger.warning(
                    _list_problems(sorted(ignored), f"{len(ignored)} files in {path} are not read as images")
                )
            options = {"data_files": {split: "**"}, "drop_labels": True, **options}
            return load_dataset("imagefolder", data_dir=str(path), **options)
    return load_dataset(str(path), config_name, **options)


class Columns(NamedTuple):
    """Names of the columns that are used; `None` for what the dataset has not."""

    image: str
    caption: str | None = None
    conversation: str | None = None


def find_columns(
    dataset: Dataset | IterableDataset,
    image_column: str | None = None,
    caption_column: str | None = None,
    conversation_column: str | None = None,
) -> Columns:
    """Find the image column by its type, else by its usual names; captions and conversations by their usual names.

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
        typed = [name for name in possible if isinstance(features[name], (Image, dict))]
        usual_names = [name for name in IMAGE_COLUMNS if name in (typed or possible)]
        if not usual_names and len(typed) != 1:
            problem = "several image columns" if typed else "no image column"
            raise ValueError(f"The dataset has {problem}; name the one to use. Its columns: {available}.")
        image_column = (usual_names or typed)[0]
    elif image_column not in possible:
        raise ValueError(
            f"The column {image_column!r} does not hold one image a row. The dataset's columns: {available}."
        )
    if caption_column is not None and not _may_hold_captions(features[caption_column]):
        raise ValueError(f"The column {caption_column!r} does not hold text. The dataset's columns: {available}.")

    captions = [name for name in CAPTION_COLUMNS if name in features and _may_hold_captions(features[name])]
    conversations = [name for name in CONVERSATION_COLUMNS if isinstance(features.get(name), (List, dict, type(None)))]
    return Columns(
        image=image_column,
        caption=caption_column or next(iter(captions), None),
        conversation=conversation_column or next((name for name in conversations if name in features), None),
    )


def _may_hold_images(feature: Any) -> bool:
    """Images by type, or what can be cast to them: encoded bytes, paths, `{bytes, path}`, or a type not known yet."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return feature is None or isinstance(feature, Image) or _type_name(feature).endswith(("string", "binary"))


def _may_hold_captions(feature: Any) -> bool:
    one = feature.feature if isinstance(feature, List) else feature
    return one is None or _type_name(one).endswith("string")


def _type_name(feature: Any) -> str:
    if isinstance(feature, List):
        return f"list of {_type_name(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def row_sizes(
    dataset: Dataset, column: str, on_bad_image: str = "raise", num_proc: int | None = None
) -> list[tuple[int, int]]:
    """`(width, height)` in pixels of every row: from columns of those names, else from the images' headers.

    Headers are read once, with a progress bar; `datasets` caches the result beside the dataset.

    Args:
        column: the image column.
        on_bad_image: what to do where a header cannot be read: `"raise"`, or `"skip"`: count the row as square, for
            `RowDataset` to replace, unless there is no other.
        num_proc: processes that read headers.

    Raises:
        ImageError: rows whose header cannot be read, each named.
    """
    _check_on_bad_image(on_bad_image)
    features = dataset.features
    if all(isinstance(features.get(n), Value) and "int" in features[n].dtype for n in ("width", "height")):
        sizes = list(zip(dataset["width"], dataset["height"], strict=True))
        if all(width and height and width > 0 and height > 0 for width, height in sizes):
            return sizes
    headers = _raw(dataset, [column], column).map(
        _read_header,
        with_indices=True,
        input_columns=[column],
        remove_columns=[column],
        features=Features({"size": List(Value("int64")), "problem": Value("string")}),
        num_proc=num_proc,
        desc="Reading image sizes",
    )
    problems = [problem for problem in headers["problem"] if problem]
    if problems and (on_bad_image == "raise" or len(problems) == len(dataset)):
        raise ImageError(_list_problems(problems, f"{len(problems)} of {len(dataset)} images cannot be used"))
    return [tuple(size) for size in headers["size"]]


def _read_header(image: Any, row: int) -> dict[str, Any]:
    source = _source_name(row, image)
    try:
        return {"size": image_size(_readable(image, source), source), "problem": ""}
    except ImageError as error:
        return {"size": (1, 1), "problem": str(error)}


def _raw(dataset: Dataset | IterableDataset, columns: Sequence[str], image_column: str):
    """Only the named columns, as plain Python values, images still encoded."""
    dataset = dataset.with_format(None).select_columns([name for name in columns if name])
    if dataset.features is None:  # a stream of unknown types decodes nothing by itself
        return dataset
    return dataset.cast_column(image_column, Image(decode=False))


def _wanted(dataset: Dataset | IterableDataset, columns: Columns) -> list[str]:
    names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    return [*dict.fromkeys(name for name in columns if name), *(n for n in ("__url__",) if n in names)]


# --- which rows, in which order ---


class Draw(NamedTuple):
    """One sample of one micro-batch.

    Attributes:
        task: one of `TASKS`.
        row: index into that task's dataset (in a stream: position in the epoch's order).
        size: `(height, width)` in pixels of the target.
        seed: seeds this sample's corruption; differs for every (seed, epoch, position in the epoch), 63 bits.
        instruction: the micro-batch's reconstruction instruction or caption question; empty where it was dropped.
    """

    task: str
    row: int
    size: tuple[int, int]
    seed: int
    instruction: str


@dataclass(frozen=True)
class _Plan:
    """What a micro-batch's draws depend on besides its rows; the same on all processes but for `process_index`."""

    weights: Mapping[str, int]
    batch_size: int
    num_processes: int
    process_index: int
    seed: int
    shuffle: bool
    instructions: Mapping[str, Sequence[str]] | None
    instruction_dropout: float
    pattern: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        for task, weight in self.weights.items():
            if task not in TASKS or weight != int(weight) or weight < 0:
                raise ValueError(f"Task weights are whole numbers for {', '.join(TASKS)}; got {task!r}: {weight}.")
        pattern = tuple(task for task, weight in self.weights.items() for _ in range(int(weight)))
        if not pattern:
            raise ValueError("No task has a positive weight.")
        if self.batch_size < 1 or not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"batch_size {self.batch_size} and process {self.process_index} of {self.num_processes} do not fit."
            )
        if not 0 <= self.instruction_dropout <= 1:
            raise ValueError(f"instruction_dropout is a probability, got {self.instruction_dropout}.")
        default = {"reconstruct": INSTRUCTIONS, "caption": CAPTION_QUESTIONS}
        object.__setattr__(self, "instructions", {**default, **(self.instructions or {})})
        object.__setattr__(self, "pattern", pattern)

    @property
    def anchor(self) -> str:
        """The task whose rows make an epoch, where sizes do not decide."""
        return "reconstruct" if "reconstruct" in self.pattern else self.pattern[0]

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.num_processes

    def draws(self, task: str, size: tuple[int, int], rows: Sequence[int], step: int, epoch: int) -> list[Draw]:
        """This process's contiguous share of the global micro-batch `step`.

        A short micro-batch is split as evenly as it goes; with fewer rows than processes some draw the same sample.
        """
        start = self.process_index * len(rows) // self.num_processes
        stop = max((self.process_index + 1) * len(rows) // self.num_processes, start + 1)
        instruction = self._instruction(task, step, epoch)
        draws = []
        for offset in range(start, stop):
            row = int(rows[offset])
            if self.shuffle:
                seed = _hash(self.seed, 0, epoch, step * self.global_batch_size + offset)
            else:
                seed = _hash(self.seed, 1, TASKS.index(task), row)
            draws.append(Draw(task, row, size, seed, instruction))
        return draws

    def _instruction(self, task: str, step: int, epoch: int) -> str:
        choices = self.instructions.get(task) or [""]
        if not self.shuffle:
            return choices[0]
        dropped = _hash(self.seed, 2, epoch, step) < self.instruction_dropout * 2**63
        return "" if dropped and task == "reconstruct" else choices[_hash(self.seed, 3, epoch, step) % len(choices)]


class TaskBatchSampler(Sampler[list[Draw]]):
    """Micro-batches of `Draw`s for one process: each of one task, one bucket, one instruction.

    Tasks follow each other in a fixed pattern, `weights["reconstruct"]` micro-batches of the first, and so on, so that
    all processes always work on the same task. An epoch is one pass over the reconstruct rows (without that task: over
    the task with most micro-batches); other tasks go round their own rows, reshuffled each time, and go on in the next
    epoch where they stopped.

    Give it to a `DataLoader(RowDataset(…), batch_sampler=…)`; `accelerate.skip_first_batches` then resumes exactly and
    reads no image for it.

    Args:
        buckets: for each task, the `(height, width)` target of every row.
        weights: micro-batches of each task per turn of the pattern, in the order they come; by default one of each.
        batch_size: rows per micro-batch and process.
        num_processes, process_index: the process layout; only `batch_size * num_processes` decides what is drawn.
        seed: of everything drawn.
        shuffle: `False` for evaluation: rows in order, the task's first instruction, no dropout, and seeds that depend
            on the row alone, so that losses compare between checkpoints, runs and batch sizes.
        drop_last: leave out a bucket's last rows where they do not fill a global micro-batch.
        instructions: for each task, what to choose from; by default `INSTRUCTIONS` and `CAPTION_QUESTIONS`.
        instruction_dropout: probability that a reconstruct micro-batch gets the empty instruction.

    Raises:
        ValueError: a task without rows, fewer rows than a global micro-batch with `drop_last`, or arguments out of
            range.
    """

    def __init__(
        self,
        buckets: Mapping[str, Sequence[tuple[int, int]]],
        weights: Mapping[str, int] | None = None,
        *,
        batch_size: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        instructions: Mapping[str, Sequence[str]] | None = None,
        instruction_dropout: float = 0.0,
    ):
        weights = dict.fromkeys(buckets, 1) if weights is None else weights
        self._plan = _Plan(
            weights, batch_size, num_processes, process_index, seed, shuffle, instructions, instruction_dropout
        )
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self._sizes, self._bucket_of_row, self._batches_per_pass = {}, {}, {}
        for task in dict.fromkeys(self._plan.pattern):
            if not len(buckets.get(task, ())):
                raise ValueError(f"The task {task!r} has weight {weights[task]} but no rows.")
            sizes, bucket_of_row, rows = np.unique(
                np.asarray(buckets[task], dtype=np.int64), axis=0, return_inverse=True, return_counts=True
            )
            self._sizes[task] = [(int(height), int(width)) for height, width in sizes]
            self._bucket_of_row[task] = bucket_of_row.reshape(-1)
            full, rest = np.divmod(rows, self._plan.global_batch_size)
            self._batches_per_pass[task] = int(full.sum() + (0 if drop_last else (rest > 0).sum()))
            if not self._batches_per_pass[task]:
                raise ValueError(
                    f"With drop_last, no bucket of the task {task!r} ({rows.sum()} rows in {len(rows)} buckets) "
                    f"fills a micro-batch of {batch_size} rows on each of {num_processes} processes."
                )
        self._batches_per_epoch = self._count_batches_per_epoch()

    def _count_batches_per_epoch(self) -> dict[str, int]:
        pattern, per_pass = self._plan.pattern, self._batches_per_pass
        anchor = "reconstruct" if "reconstruct" in per_pass else max(per_pass, key=per_pass.get)
        turns, rest = divmod(per_pass[anchor], pattern.count(anchor))
        places = [place for place, task in enumerate(pattern) if task == anchor]
        last_turn = pattern[: places[rest - 1] + 1] if rest else ()
        return {task: turns * pattern.count(task) + last_turn.count(task) for task in per_pass}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches per epoch, the same in every epoch and on every process."""
        return sum(self._batches_per_epoch.values())

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, pattern = self.epoch, self._plan.pattern
        batches = {task: self._batches(task, epoch if self._plan.shuffle else 0) for task in self._batches_per_pass}
        for step in range(len(self)):
            task = pattern[step % len(pattern)]
            size, rows = next(batches[task])
            yield self._plan.draws(task, size, rows, step, epoch)

    def _batches(self, task: str, epoch: int) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """The task's global micro-batches from where `epoch` begins, pass after pass without end."""
        number, start = divmod(epoch * self._batches_per_epoch[task], self._batches_per_pass[task])
        while True:
            yield from self._pass(task, number)[start:]
            number, start = number + 1, 0

    def _pass(self, task: str, number: int) -> list[tuple[tuple[int, int], np.ndarray]]:
        bucket_of_row, batch_size = self._bucket_of_row[task], self._plan.global_batch_size
        rows = np.arange(len(bucket_of_row))
        if self._plan.shuffle:
            rng = np.random.default_rng(_hash(self._plan.seed, 4, TASKS.index(task), number))
            rng.shuffle(rows)
        batches = []
        for bucket, size in enumerate(self._sizes[task]):
            members = rows[bucket_of_row[rows] == bucket]
            stop = len(members) // batch_size * batch_size if self.drop_last else len(members)
            batches += [(size, members[start : start + batch_size]) for start in range(0, stop, batch_size)]
        if self._plan.shuffle:
            return [batches[index] for index in rng.permutation(len(batches))]
        return sorted(batches, key=lambda batch: batch[1][0])


def _hash(*numbers: int) -> int:
    """63 well-mixed bits of a few integers (splitmix64): one-to-one in the last of them but for the bit dropped."""
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


# --- from a row to an image and its text ---


class RowDataset(torch.utils.data.Dataset):
    """The rows that a `TaskBatchSampler` draws, decoded: `dataset[draw]`.

    Args:
        datasets: each task's `datasets.Dataset` (two tasks may share one).
        columns: each task's `Columns`.
        on_bad_image: `"raise"` an `ImageError` that names row and file, or `"skip"`: put the next good row in its
            place and list what was wrong in `skipped`.
    """

    def __init__(self, datasets: Mapping[str, Dataset], columns: Mapping[str, Columns], on_bad_image: str = "raise"):
        _check_on_bad_image(on_bad_image)
        _check_texts(columns)
        self.columns = dict(columns)
        self.on_bad_image = on_bad_image
        self.datasets = {
            task: _raw(dataset, _wanted(dataset, columns[task]), columns[task].image)
            for task, dataset in datasets.items()
        }

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """One row, ready for the collator.

        Returns:
            `task`, `image` (RGB, cut to `draw.size`), `text` (caption or answer, or `None`), `question` (or `None`),
            `draw`, `source` (row and file), `skipped` (what was wrong with the rows this one stands in for).

        Raises:
            ImageError: the image cannot be used; with `"skip"`, neither can any of the rows after it, up to all
                rows or `MAX_BAD_IN_A_ROW`.
        """
        dataset = self.datasets[draw.task]
        rows = ((draw.row + step) % len(dataset) for step in range(min(len(dataset), MAX_BAD_IN_A_ROW)))
        candidates = ((row, dataset[row]) for row in rows)
        return _first_good_row(draw, candidates, self.columns[draw.task], self.on_bad_image)


class StreamingRows(torch.utils.data.IterableDataset):
    """Micro-batches of rows from sources that can only be read in order; for `DataLoader(…, batch_size=None)`.

    Rows gather in their bucket until it holds a global micro-batch, which is then split over the processes as
    `TaskBatchSampler` does, and micro-batches go round the DataLoader's workers. Every process and worker walks the
    whole stream and decodes only its own share: nothing is lost or used twice, and neither the number of processes nor
    of workers changes what a global micro-batch contains. The price is that each of them reads all encoded bytes.

    An epoch is one pass over the reconstruct stream (without that task: the first one's); the others start over when
    they end. Each pass is reshuffled, with a buffer.

    Args:
        datasets: each task's `IterableDataset` (or `Dataset`).
        columns: each task's `Columns`.
        buckets: the `(height, width)` targets to choose from.
        endless: go on with the next, reshuffled pass instead of ending the epoch. `Trainer` counts the steps of a source
            without a length from its beginning, so this is what lets a run of several passes resume exactly.
        buffer_size: rows in the shuffle buffer, encoded.
        on_bad_image: `"raise"`, or `"skip"`: rows without a readable header are left out, and a neighbour takes the
            place of one that turns out damaged later.

    The other arguments are those of `TaskBatchSampler`. Without shuffling, `Draw.row` and the seeds follow the
    stream's own order.
    """

    def __init__(
        self,
        datasets: Mapping[str, IterableDataset | Dataset],
        columns: Mapping[str, Columns],
        buckets: Sequence[tuple[int, int]],
        weights: Mapping[str, int] | None = None,
        *,
        batch_size: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        instructions: Mapping[str, Sequence[str]] | None = None,
        instruction_dropout: float = 0.0,
        endless: bool = False,
        buffer_size: int = 1000,
        on_bad_image: str = "raise",
    ):
        _check_on_bad_image(on_bad_image)
        weights = dict.fromkeys(datasets, 1) if weights is None else weights
        self._plan = _Plan(
            weights, batch_size, num_processes, process_index, seed, shuffle, instructions, instruction_dropout
        )
        _check_texts({task: columns[task] for task in self._plan.pattern})
        self.columns = dict(columns)
        self.buckets = list(buckets)
        self.drop_last = drop_last
        self.endless = endless
        self.buffer_size = buffer_size
        self.on_bad_image = on_bad_image
        self.datasets = {}
        for task in dict.fromkeys(self._plan.pattern):
            if task not in datasets:
                raise ValueError(f"The task {task!r} has weight {weights[task]} but no dataset.")
            dataset = _raw(datasets[task], _wanted(datasets[task], columns[task]), columns[task].image)
            self.datasets[task] = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
        # Shared, because persistent workers keep their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        epoch, pattern, anchor = int(self._epoch), self._plan.pattern, self._plan.anchor
        worker = get_worker_info()
        workers, this_worker = (worker.num_workers, worker.id) if worker else (1, 0)
        batches = {task: self._passes(task, epoch) for task in self.datasets}
        if not self.endless:
            batches[anchor] = self._pass(anchor, epoch, 0)
        for step in count():
            batch = next(batches[pattern[step % len(pattern)]], None)
            if batch is None:
                return
            if step % workers == this_worker:
                yield self._decode(pattern[step % len(pattern)], *batch, step, epoch)

    def _passes(self, task: str, epoch: int) -> Iterator[tuple]:
        for number in count():
            yield from self._pass(task, epoch, number)

    def _pass(self, task: str, epoch: int, number: int) -> Iterator[tuple]:
        """Global micro-batches of one pass: `(size, {row: record}, spare rows around them, problems)`."""
        gathering: dict[tuple[int, int], dict[int, dict]] = {size: {} for size in self.buckets}
        ahead, recent = deque(), deque(maxlen=2 * self._plan.global_batch_size)
        problems: list[str] = []
        rows, emitted, usable = self._rows_with_headers(task, epoch, number, problems), False, 0
        ahead.extend(islice(rows, 16))
        while ahead:
            row, record, size = ahead.popleft()
            ahead.extend(islice(rows, 1))
            usable += 1
            bucket = gathering[size]
            bucket[row] = record
            recent.append((row, record))
            if len(bucket) == self._plan.global_batch_size:
                emitted = True
                yield size, bucket, [*(item[:2] for item in ahead), *recent], problems[:]
                problems.clear()
                gathering[size] = {}
        for size, bucket in gathering.items():
            if bucket and not self.drop_last:
                emitted = True
                yield size, bucket, list(recent), problems[:]
                problems.clear()
        if not emitted:
            size = f" of {self._plan.global_batch_size} rows of one shape, as drop_last asks" if self.drop_last else ""
            headline = f"The stream of the task {task!r} gave no micro-batch{size}: it has {usable} usable rows"
            raise ImageError(_list_problems(problems, headline))

    def _rows_with_headers(
        self, task: str, epoch: int, number: int, problems: list[str]
    ) -> Iterator[tuple[int, dict, tuple[int, int]]]:
        stream = self.datasets[task]
        if self._plan.shuffle:
            seed = _hash(self._plan.seed, 4, TASKS.index(task), epoch, number)
            # One shard at a time: reading several takes threads, which `datasets` waits seconds for after each pass.
            stream = stream.shuffle(seed=seed % 2**32, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        bad = 0
        # Not `iter(stream)`: inside a worker that would leave out the shards of the other workers.
        for row, batch in enumerate(stream.iter(batch_size=1)):
            record = {name: values[0] for name, values in batch.items()}
            image = record[self.columns[task].image]
            source = _source_name(row, image, record.get("__url__"))
            try:
                width, height = image_size(_readable(image, source), source)
            except ImageError as error:
                if self.on_bad_image == "raise":
                    raise
                problems.append(str(error))
                bad += 1
                if bad == MAX_BAD_IN_A_ROW:
                    raise ImageError(_list_problems(problems, f"{bad} unreadable images in a row")) from error
                continue
            bad = 0
            yield row, record, nearest_bucket(width, height, self.buckets)

    def _decode(
        self,
        task: str,
        size: tuple[int, int],
        records: dict[int, dict],
        spare: list[tuple[int, dict]],
        problems: list[str],
        step: int,
        epoch: int,
    ) -> list[dict[str, Any]]:
        order = list(records)
        decoded = []
        for draw in self._plan.draws(task, size, order, step, epoch):
            place = order.index(draw.row)
            neighbours = dict([*((row, records[row]) for row in order[place:] + order[:place]), *spare])
            decoded.append(_first_good_row(draw, neighbours.items(), self.columns[task], self.on_bad_image))
        if self._plan.process_index == 0:
            decoded[0]["skipped"] = problems + decoded[0]["skipped"]
        return decoded


def _first_good_row(draw: Draw, candidates, columns: Columns, on_bad_image: str) -> dict[str, Any]:
    skipped = []
    for row, record in candidates:
        source = _source_name(row, record[columns.image], record.get("__url__"))
        try:
            image = fit_to_size(decode_image(_readable(record[columns.image], source), source), draw.size)
        except ImageError as error:
            if on_bad_image == "raise":
                raise
            skipped.append(str(error))
            continue
        question, text = _question_and_text(draw, record, columns, source)
        return {
            "task": draw.task,
            "image": image,
            "text": text,
            "question": question,
            "draw": draw,
            "source": source,
            "skipped": skipped,
        }
    raise ImageError(_list_problems(skipped, f"None of {len(skipped)} images in a row can be used"))


def _question_and_text(draw: Draw, record: dict, columns: Columns, source: str) -> tuple[str | None, str | None]:
    if draw.task == "reconstruct":
        return None, None
    if draw.task == "caption" and columns.conversation and record[columns.conversation]:
        return _first_exchange(record[columns.conversation], source)
    caption = record[columns.caption] if columns.caption else None
    if isinstance(caption, list) and caption:
        caption = caption[draw.seed % len(caption)]
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{source}: the caption in column {columns.caption!r} is {type(caption).__name__}, not text.")
    return None, (caption or "").strip() or None


def check_texts(dataset: Dataset, task: str, columns: Columns) -> None:
    """Raises `ValueError` naming the rows that have no caption or answer for `task` to learn from."""
    if task == "reconstruct":
        return
    texts = dataset.with_format(None).select_columns([name for name in columns[1:] if name])
    records = (
        dict(zip(batch, values, strict=True))
        for batch in texts.iter(batch_size=1000)
        for values in zip(*batch.values(), strict=True)
    )
    missing = [
        f"row {row}"
        for row, record in enumerate(records)
        if _question_and_text(Draw(task, row, (1, 1), 0, ""), record, columns, f"row {row}")[1] is None
    ]
    if missing:
        headline = (
            f"{len(missing)} of {len(texts)} rows have no caption, which the task {task!r} learns from; fill in or drop "
            "such rows, name another column, or give this task the weight 0"
        )
        raise ValueError(_list_problems(missing, headline))


def _first_exchange(turns: Any, source: str) -> tuple[str | None, str | None]:
    """First question and its answer, of `{from, value}` or `{role, content}` turns, without image placeholders."""
    if isinstance(turns, dict):  # a column of lists, as older `datasets` stored lists of dicts
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{source}: a conversation is a list of {{from, value}} or {{role, content}} turns.")
    question = None
    for turn in turns:
        speaker, words = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        if isinstance(words, list):
            words = " ".join(part.get("text") or "" for part in words if isinstance(part, dict))
        words = re.sub(r"\s*<image>\s*", " ", words).strip() or None
        if speaker in ("human", "user") and question is None:
            question = words
        elif speaker in ("gpt", "assistant"):
            return question, words
    return question, None


def _readable(image: Any, source: str) -> Any:
    """What `decode_image` can open: rows may point into an archive or, streamed, into a Hub repository."""
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


def _source_name(row: int, image: Any, archive: str | None = None) -> str:
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    where = " in ".join(part for part in (path, archive) if part)
    return f"row {row} ({where})" if where else f"row {row}"


def _list_problems(problems: list[str], headline: str) -> str:
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "".join([headline, ":" if problems else ".", *(f"\n  {problem}" for problem in problems[:10]), more])


def _check_texts(columns: Mapping[str, Columns]) -> None:
    for task, (_, caption, conversation) in columns.items():
        if not (task == "reconstruct" or caption or (task == "caption" and conversation)):
            wanted = "captions" if task == "generate" else "captions or conversations"
            raise ValueError(
                f"The task {task!r} learns from {wanted}, but its dataset has no column of them; name it."
            )


def _check_on_bad_image(on_bad_image: str) -> None:
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image is 'raise' or 'skip', got {on_bad_image!r}.")
