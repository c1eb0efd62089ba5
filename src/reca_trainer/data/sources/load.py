"""Where rows come from: folders of images, archives, tables, saved datasets, the Hub."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from reca_trainer.data.sources.archives import load_archives
from reca_trainer.data.sources.files import (
    ARCHIVES,
    KNOWN,
    TABLES,
    SourceFile,
    Unused,
    files_of_split,
    has_configs,
    matching,
    plain_folder,
    printable,
    source_file,
    tables_of_split,
    walk,
)
from reca_trainer.data.sources.pictures import load_pictures
from reca_trainer.data.sources.request import Request, part_of_split
from reca_trainer.data.sources.tables import load_dataset, load_saved, load_tables_of_folders
from reca_trainer.images import list_problems

logger = logging.getLogger(__name__)

# By default `load_dataset` reports even the reading of a local folder to a server that counts.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def load_image_dataset(
    name_or_path: str | os.PathLike[str],
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    *,
    data_files: str | Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> Dataset | IterableDataset:
    """Open any source of images: a folder, an archive, a table, a saved dataset, a dataset on the Hub.

    A path means itself, whatever characters are in its name; patterns go into `data_files`. Of a folder and all its
    subfolders, linked ones included, one kind of file gives the rows; what else is there is named in the log, with the
    reason:

    1. Pictures, if there are any: one row each. Their captions come from `.json`, `.jsonl`, `.csv` files (and
       `metadata.parquet`) that name them, by paths relative to that file or to an `images` folder beside it (a row per
       entry), else from a `.txt`, `.caption` or `.json` file of the picture's name. A picture without a caption is a row
       all the same; tasks that learn from captions leave it out and count it.
    2. Else archives, read in place: `.tar` (also `.tar.gz`, `.tgz`, `.tar.bz2`, `.tar.xz`; WebDataset's names) and
       `.zip`. The pictures of a sample stand in the column `image`, one row each, whatever their format; where all first
       samples have the same several (`jpg` and `mask.png`), each has a column of its own.
    3. Else tables: `.parquet`, else `.arrow`, else `.jsonl` and `.json`, else `.csv`. Relative image paths in them start
       from the table's folder or an `images` folder beside it, where such a file exists.

    A subfolder called `train`, `test`, `eval`, `validation`, … is a split if it is the one that is asked for, or if there is
    nothing but such folders; tables may have splits in their names too. Otherwise the folder is one split, whatever
    `split` says. A folder whose README.md has `configs` is read as these say. Names that begin with a dot are not read.

    Args:
        name_or_path: the source; a folder made by `Dataset.save_to_disk` or a dataset's id on the Hub are others.
        split: which split.
        config_name: the dataset's configuration, where it has several.
        streaming: give an `IterableDataset` that reads as it goes. Pictures are listed first all the same, and so are the
            entries that name them; archives and tables are read in order. `train[:100]` cannot be streamed.
        data_files: patterns (`"*.png"`, `["a/**/*.tar", "b.tar.gz"]`), relative to the folder, or to the repository on
            the Hub: only what they match is read.
        image_root: where relative paths in tables start from, if not from the table; the caller joins them
            (`data.columns.under_root`).
        hub: further arguments of `datasets.load_dataset` (`revision`, `token`, `cache_dir`, …).

    Raises:
        FileNotFoundError: nothing at that path, or nothing that `data_files` matches.
        ValueError: a local source that cannot be read (unknown kind, damaged archive, no such split) or without rows.
    """
    name = os.fspath(name_or_path)
    patterns = [data_files] if isinstance(data_files, str) else None if data_files is None else list(data_files)
    request = Request(split, config_name, streaming, patterns, image_root, hub)
    path = name if os.path.exists(name) else os.path.expanduser(name)
    if os.path.exists(path):
        try:
            dataset = _load_local(os.path.abspath(path), request)
        except FileNotFoundError:
            raise
        except Exception as error:  # what `datasets` says of a damaged archive does not name it
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            raise ValueError(f"Cannot read {printable(name)} as a dataset: {reason or error}") from error
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in KNOWN:
        raise FileNotFoundError(f"There is no file or folder {printable(name)} to read images from.{_hint(name)}")
    elif _hint(name):
        raise FileNotFoundError(f"There is no file or folder {printable(name)}.{_hint(name)}")
    else:
        if patterns is not None:
            hub = {"data_files": {request.split_name: patterns}, **hub}
        try:
            dataset = load_dataset(name, config_name, split=split, streaming=streaming, **hub)
        except OSError as error:
            raise type(error)(f"There is no file or folder {name}, and no such dataset on the Hub: {error}") from error
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The split {split!r} of {printable(name)} has no rows.")
    return dataset


def _hint(name: str) -> str:
    return " Patterns go into data_files." if glob.has_magic(name) else ""


def _load_local(path: str, request: Request) -> Dataset | IterableDataset:
    unused: Unused = []
    if os.path.isfile(path):
        files = [source_file(path, os.path.basename(path), os.stat(path))]
    elif not os.path.isdir(path):
        raise ValueError("it is neither a file nor a folder.")
    elif request.data_files is None and any(
        os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")
    ):
        dataset = load_saved(path, request, unused)
        _report(path, dataset, "a saved dataset", unused)
        return dataset
    elif request.config_name is not None or (request.data_files is None and has_configs(path)):
        patterns = {} if request.data_files is None else {"data_files": {request.split_name: request.data_files}}
        logger.info(f"{printable(path)} is read as its README.md says.")
        plain = plain_folder(path, request.cache_dir)
        return load_dataset(
            plain, request.config_name, split=request.split, streaming=request.streaming, **patterns, **request.hub
        )
    elif request.data_files is None:
        files = files_of_split(walk(path, unused), request.split_name, unused)
    else:
        files = matching(path, request.data_files, unused)
    kinds: dict[str, list[SourceFile]] = {kind: [] for kind in ("picture", "archive", "table", "other")}
    for file in files:
        kinds[file.kind].append(file)
    if kinds["picture"]:
        others = [file for file in files if file.kind != "picture"]
        dataset, where = load_pictures(kinds["picture"], others, request, unused)
    elif kinds["archive"]:
        unused += [(file.name, f"a {file.kind} beside archives") for file in kinds["table"]]
        unused += [(file.name, "no archive") for file in kinds["other"]]
        dataset, where = load_archives(kinds["archive"], request)
    elif kinds["table"]:
        unused += [(file.name, "no table") for file in kinds["other"]]
        tables = tables_of_split(kinds["table"], request.split_name, unused)
        dataset = load_tables_of_folders(tables, request)
        where = f"{len(tables):,} {tables[0].suffix} {'file' if len(tables) == 1 else 'files'}"
    else:
        formats = ", ".join([*ARCHIVES, *TABLES])
        names = list_problems([printable(f"{name}: {why}") for name, why in unused], "Not read") if unused else ""
        raise ValueError(f"there are no images, and no {formats} files, here. {names}".strip())
    if "[" in request.split and kinds["picture"] + kinds["archive"]:
        dataset = part_of_split(dataset, request)
    _report(path, dataset, where, unused)
    return dataset


def _report(path: str, dataset: Dataset | IterableDataset, where: str, unused: Unused) -> None:
    count = f"Rows: {len(dataset):,}" if isinstance(dataset, Dataset) else "A stream of rows"
    line = f"{count}, from {where} in {printable(path)}"
    if not unused:
        logger.info(f"{line}.")
        return
    # What may hold images stands first.
    minor = ("no picture", "no archive", "no table", "a hidden name")
    problems = [printable(f"{name}: {why}") for name, why in sorted(unused, key=lambda item: item[1] in minor)]
    logger.warning(list_problems(problems, f"{line}; not used there ({len(unused):,})"))
