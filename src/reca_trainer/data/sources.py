"""Where rows come from: folders of images, archives, tables, saved datasets, the Hub."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, IterableDataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from reca_trainer.images import list_problems

logger = logging.getLogger(__name__)

# By default `load_dataset` reports even the reading of a local folder to a server that counts.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

# Of a named split, one dataset; whether it is a stream is known only at run time, which its overloads do not foresee.
load_dataset = cast("Callable[..., Dataset | IterableDataset]", datasets.load_dataset)

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


def load_image_dataset(
    name_or_path: str | os.PathLike[str],
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


def _load_file(path: Path, config_name: str | None, options: dict[str, Any]) -> Dataset | IterableDataset:
    kind = _FILE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"expected a folder of images or one of {', '.join(_FILE_KINDS)}.")
    try:
        return load_dataset(kind, config_name, data_files={options["split"]: str(path)}, **options)
    except DatasetGenerationError:
        rows = _json_rows(path) if kind == "json" else None
        if rows is None:
            raise
    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if options["streaming"] else dataset


def _json_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a JSON file whose columns mix numbers and text, which Arrow refuses (LLaVA's ids do): such columns
    become text. `None` if the file is broken otherwise."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix.lower() == ".jsonl"
            else None
        )
        rows = json.loads(text) if rows is None else rows
    except ValueError:
        return None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                kinds.setdefault(name, set()).add(type(value))
    mixed = {
        name for name, types in kinds.items() if str in types and types <= {str, int, float, bool} and len(types) > 1
    }
    if not mixed:
        return None
    return [
        {name: str(row[name]) if name in mixed and row.get(name) is not None else row.get(name) for name in kinds}
        for row in rows
    ]


def _load_folder(path: Path, config_name: str | None, options: dict[str, Any]) -> Dataset | IterableDataset:
    split = options["split"]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if not isinstance(saved, Dataset):
            if split not in saved:
                raise ValueError(f"there is no split {split!r}, but {', '.join(map(str, saved))}.")
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
                    list_problems(sorted(ignored), f"{len(ignored)} files in {path} are not read as images")
                )
            options = {"data_files": {split: "**"}, "drop_labels": True, **options}
            return load_dataset("imagefolder", data_dir=str(path), **options)
    return load_dataset(str(path), config_name, **options)
