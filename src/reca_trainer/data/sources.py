"""Where rows come from: folders of images, archives, tables, saved datasets, the Hub."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import json
import logging
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import datasets
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    NamedSplit,
    Value,
    concatenate_datasets,
    load_from_disk,
)
from datasets.data_files import DataFilesList
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import features as pillow

from reca_trainer.data.columns import CAPTION_COLUMNS, CONVERSATION_COLUMNS, SOME_CAPTIONS
from reca_trainer.images import list_problems

logger = logging.getLogger(__name__)

# By default `load_dataset` reports even the reading of a local folder to a server that counts.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

# Of a named split, one dataset; whether it is a stream is known only at run time, which its overloads do not foresee.
load_dataset = cast("Callable[..., Dataset | IterableDataset]", datasets.load_dataset)

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_ARCHIVES = (*_TARS, ".zip")
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_PICTURES = {*ImageFolder.EXTENSIONS, *([".avif"] if pillow.check("avif") else [])} - {*_ARCHIVES, *_TABLES}
_CAPTIONS = (".txt", ".caption")
_KNOWN = {*_PICTURES, *_TABLES, *_ARCHIVES, ".gz"}
_SPLITS = [
    {"train", "training"},
    {"test", "testing", "eval", "evaluation"},
    {"validation", "valid", "val", "dev"},
]
_PATH_COLUMNS = (
    "file_name",
    "filename",
    "image",
    "img",
    "image_path",
    "file_path",
    "path",
    "file",
    "images",
    "picture",
)
_METADATA = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
_LARGEST = 2**31 - 1  # bytes that Arrow holds in a cell

IMAGE = Features({"image": Image()})


class _File(NamedTuple):
    """A regular file of a source."""

    path: str
    name: str  # below the source's folder
    stamp: str  # another one when the contents change
    suffix: str  # in lower case
    kind: str  # picture, archive, table or other

    @property
    def stem(self) -> str:
        return self.path[: len(self.path) - len(self.suffix)]


def _file(path: str, name: str, status: os.stat_result) -> _File:
    suffix = os.path.splitext(path)[1].lower()
    return _File(path, name, f"{status.st_size}-{status.st_mtime_ns}", suffix, _kind(path, suffix))


def _kind(path: str, suffix: str) -> str:
    if path.lower().endswith(_ARCHIVES):
        return "archive"
    return "picture" if suffix in _PICTURES else "table" if suffix in _TABLES else "other"


class _Options(NamedTuple):
    split: str
    config_name: str | None
    streaming: bool
    data_files: list[str] | None
    image_root: str | os.PathLike[str] | None
    hub: dict[str, Any]

    @property
    def split_name(self) -> str:
        """Without the range of `train[:100]`."""
        return self.split.partition("[")[0]

    @property
    def cache_dir(self) -> str | None:
        return self.hub.get("cache_dir")


Unused = list[tuple[str, str]]  # names, and why they are not read


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
    options = _Options(split, config_name, streaming, patterns, image_root, hub)
    path = name if os.path.exists(name) else os.path.expanduser(name)
    if os.path.exists(path):
        try:
            dataset = _load_local(os.path.abspath(path), options)
        except FileNotFoundError:
            raise
        except Exception as error:  # what `datasets` says of a damaged archive does not name it
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            raise ValueError(f"Cannot read {_printable(name)} as a dataset: {reason or error}") from error
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in _KNOWN:
        raise FileNotFoundError(f"There is no file or folder {_printable(name)} to read images from.{_hint(name)}")
    elif _hint(name):
        raise FileNotFoundError(f"There is no file or folder {_printable(name)}.{_hint(name)}")
    else:
        if patterns is not None:
            hub = {"data_files": {options.split_name: patterns}, **hub}
        try:
            dataset = load_dataset(name, config_name, split=split, streaming=streaming, **hub)
        except OSError as error:
            raise type(error)(f"There is no file or folder {name}, and no such dataset on the Hub: {error}") from error
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The split {split!r} of {_printable(name)} has no rows.")
    return dataset


def _hint(name: str) -> str:
    return " Patterns go into data_files." if glob.has_magic(name) else ""


def _load_local(path: str, options: _Options) -> Dataset | IterableDataset:
    unused: Unused = []
    if os.path.isfile(path):
        files = [_file(path, os.path.basename(path), os.stat(path))]
    elif not os.path.isdir(path):
        raise ValueError("it is neither a file nor a folder.")
    elif options.data_files is None and any(
        os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")
    ):
        return _load_saved(path, options)
    elif options.config_name is not None or (options.data_files is None and _has_configs(path)):
        patterns = {} if options.data_files is None else {"data_files": {options.split_name: options.data_files}}
        logger.info(f"{_printable(path)} is read as its README.md says.")
        plain = _plain_folder(path, options.cache_dir)
        return load_dataset(
            plain, options.config_name, split=options.split, streaming=options.streaming, **patterns, **options.hub
        )
    elif options.data_files is None:
        files = _of_split(_walk(path, unused), options.split_name, unused)
    else:
        files = _matching(path, options.data_files, unused)
    kinds: dict[str, list[_File]] = {kind: [] for kind in ("picture", "archive", "table", "other")}
    for file in files:
        kinds[file.kind].append(file)
    if kinds["picture"]:
        others = [file for file in files if file.kind != "picture"]
        dataset, where = _load_pictures(kinds["picture"], others, options, unused)
    elif kinds["archive"]:
        unused += [(file.name, f"a {file.kind} beside archives") for file in kinds["table"]]
        unused += [(file.name, "no archive") for file in kinds["other"]]
        dataset, where = _load_archives(kinds["archive"], options)
    elif kinds["table"]:
        unused += [(file.name, "no table") for file in kinds["other"]]
        tables = _tables_of_split(kinds["table"], options.split_name, unused)
        dataset = _load_tables_of_folders(tables, options)
        where = f"{len(tables):,} {tables[0].suffix} {'file' if len(tables) == 1 else 'files'}"
    else:
        formats = ", ".join([*_ARCHIVES, *_TABLES])
        names = list_problems([_printable(f"{name}: {why}") for name, why in unused], "Not read") if unused else ""
        raise ValueError(f"there are no images, and no {formats} files, here. {names}".strip())
    if "[" in options.split and kinds["picture"] + kinds["archive"]:
        dataset = _part(dataset, options)
    _report(path, dataset, where, unused)
    return dataset


def _report(path: str, dataset: Dataset | IterableDataset, where: str, unused: Unused) -> None:
    count = f"Rows: {len(dataset):,}" if isinstance(dataset, Dataset) else "A stream of rows"
    line = f"{count}, from {where} in {_printable(path)}"
    if not unused:
        logger.info(f"{line}.")
        return
    # What may hold images stands first.
    minor = ("no picture", "no archive", "no table", "a hidden name")
    problems = [_printable(f"{name}: {why}") for name, why in sorted(unused, key=lambda item: item[1] in minor)]
    logger.warning(list_problems(problems, f"{line}; not used there ({len(unused):,})"))


# --- files ---


def _walk(folder: str, unused: Unused) -> list[_File]:
    """All regular files below a folder, by name. Links are followed, and every folder is read once."""
    files: list[_File] = []
    seen: set[tuple[int, int]] = set()
    linked: list[tuple[str, str]] = []
    waiting = [(folder, "")]
    while waiting or linked:
        path, name = waiting.pop() if waiting else linked.pop(0)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            unused.append((name, "a link to a folder that is read already"))
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                below = f"{name}{entry.name}"
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    unused.append((below, "a hidden name"))
                elif _is_folder(entry):
                    (linked if entry.is_symlink() else waiting).append((entry.path, f"{below}/"))
                else:
                    with contextlib.suppress(OSError):
                        if entry.is_file():
                            files.append(_file(entry.path, below, entry.stat()))
                            continue
                    unused.append((below, "no regular file"))
        linked.sort()
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _matching(folder: str, patterns: Sequence[str], unused: Unused) -> list[_File]:
    """The files that patterns match, relative to a folder; a folder that matches stands for all its files."""
    files: dict[str, _File] = {}
    real = lru_cache(os.path.realpath)  # of folders: links may lead `**` round in circles
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), root_dir=folder, recursive=True))
        if not matches:
            raise FileNotFoundError(f"data_files={pattern!r} matches nothing in {_printable(folder)}.")
        for match in matches:
            path = os.path.normpath(os.path.join(folder, match))
            inside: list[_File] = []
            if os.path.isfile(path):
                inside = [_file(path, match, os.stat(path))]
            elif os.path.isdir(path) and "**" not in pattern:
                below = _walk(path, unused)
                inside = [file._replace(name=os.path.join(match, file.name)) for file in below]
            for file in inside:
                parent, base = os.path.split(file.path)
                files.setdefault(os.path.join(real(parent), base), file)
    return sorted(files.values())


def _of_split(files: list[_File], split: str, unused: Unused) -> list[_File]:
    """The files in the subfolder of a split, if that is what the subfolders are."""

    def top(file: _File) -> str | None:
        folder, slash, _ = file.name.partition("/")
        return folder if slash else None

    names = _names_of(split)
    inside = [file for file in files if (top(file) or "").lower() in names and file.kind != "other"]
    if inside:
        # Entries that name the pictures of all splits may stand above them.
        above = (".json", ".jsonl", ".csv")
        chosen, left = [], set()
        for file in files:
            folder = top(file)
            if (folder or "").lower() in names or (folder is None and file.suffix in above):
                chosen.append(file)
            else:
                left.add(file.name if folder is None else f"{folder}/")
        unused += [(name, f"not in the folder of the split {split!r}") for name in sorted(left)]
        return chosen
    tops = {top(file) for file in files if file.kind != "other"}
    if tops and all(name is not None and name.lower() in set().union(*_SPLITS) for name in tops):
        raise ValueError(f"there is no split {split!r}, but {', '.join(sorted(map(str, tops)))}.")
    return files


def _names_of(split: str) -> set[str]:
    return {split.lower(), *(name for names in _SPLITS if split.lower() in names for name in names)}


def _tables_of_split(files: list[_File], split: str, unused: Unused) -> list[_File]:
    """Tables of one kind and, where their names tell splits, of one split."""
    kind = next(kind for kind in dict.fromkeys(_TABLES.values()) if any(_TABLES[f.suffix] == kind for f in files))
    unused += [(file.name, f"a table beside {kind} files") for file in files if _TABLES[file.suffix] != kind]
    files = [file for file in files if _TABLES[file.suffix] == kind]
    if len(files) == 1 and "/" not in files[0].name:
        return files
    all_splits = set().union(*_SPLITS)
    words = {file: set("".join(c if c.isalnum() else " " for c in file.name.lower()).split()) for file in files}
    chosen = [file for file in files if words[file] & _names_of(split)]
    if not chosen and any(words[file] & all_splits for file in files):
        chosen = [file for file in files if not words[file] & all_splits]
        if not chosen:
            raise ValueError(f"there is no split {split!r} among {', '.join(file.name for file in files[:10])}.")
    if chosen:
        unused += [(file.name, f"not of the split {split!r}") for file in files if file not in set(chosen)]
    return chosen or files


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_text(path: str) -> bool:
    """Whether a path can stand in a table: file names need not be UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(path: str) -> bool:
    """Whether `datasets` takes a path as it is, not for a pattern or an address."""
    return _is_text(path) and not set("*?[]{}$~#%") & set(path) and "::" not in path and "://" not in path


def _plain(path: str, cache_dir: str | None = None) -> str:
    """The path, or a link to it from the cache if it is not plain."""
    if _is_plain(path):
        return path
    suffix = os.path.splitext(path)[1].lower() if os.path.isfile(path) else ""
    link = _links(cache_dir) / (hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + suffix)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return str(link)


def _plain_folder(path: str, cache_dir: str | None = None) -> str:
    """The folder, or one of links to its files: `datasets` follows a link to a folder before it reads its name."""
    if _is_plain(path):
        return path
    files = _walk(path, [])
    folder = _links(cache_dir) / hashlib.sha256(ascii((path, files)).encode()).hexdigest()[:32]
    for file in files:
        link = folder / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(file.path)
    return str(folder)


def _links(cache_dir: str | None) -> Path:
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "links"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _has_configs(folder: str) -> bool:
    """Whether README.md begins with YAML that has `configs`, as datasets on the Hub do."""
    with (
        contextlib.suppress(OSError),
        open(os.path.join(folder, "README.md"), encoding="utf-8", errors="replace") as card,
    ):
        if card.readline().strip() == "---":
            for line in card:
                if line.strip() == "---":
                    return False
                if line.startswith("configs:"):
                    return True
    return False


# --- saved datasets and tables ---


def _load_saved(path: str, options: _Options) -> Dataset | IterableDataset:
    saved = load_from_disk(_plain(path, options.cache_dir))
    if not isinstance(saved, Dataset):
        if options.split not in saved:
            raise ValueError(f"there is no split {options.split!r}, but {', '.join(map(str, saved))}.")
        saved = saved[options.split]
    files = _walk(path, unused := [])
    unused += [(file.name, "beside a saved dataset") for file in files if file.suffix not in (".arrow", ".json")]
    _report(path, saved, "a saved dataset", unused)
    return saved.to_iterable_dataset() if options.streaming else saved


def _load_tables(files: Sequence[_File], options: _Options) -> Dataset | IterableDataset:
    kind = _TABLES[files[0].suffix]
    # `datasets` takes names for patterns, except in a list of this type.
    paths = DataFilesList([_plain(file.path, options.cache_dir) for file in files], [(file.stamp,) for file in files])
    sources = {"data_files": {options.split_name: paths}, **options.hub}
    try:
        return load_dataset(kind, split=options.split, streaming=options.streaming, **sources)
    except DatasetGenerationError:
        rows = _json_rows([file.path for file in files]) if kind == "json" else None
        if rows is None:
            raise
    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if options.streaming else dataset


def _load_tables_of_folders(files: Sequence[_File], options: _Options) -> Dataset | IterableDataset:
    """Tables whose relative paths start from the folder of each."""
    folders: dict[str, list[_File]] = {}
    for file in files:
        folders.setdefault(os.path.dirname(file.path), []).append(file)
    if len(folders) > 1 and (_TABLES[files[0].suffix] not in ("json", "csv") or "[" in options.split):
        return _load_tables(files, options)
    parts = [_beside_table(_load_tables(group, options), folder, options) for folder, group in folders.items()]
    return parts[0] if len(parts) == 1 else concatenate_datasets(cast("list[Dataset]", parts))


def _json_rows(paths: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows of JSON files whose columns mix numbers and text, which Arrow refuses (LLaVA's ids do): such columns
    become text. `None` if a file is broken otherwise."""
    rows: list[Any] = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
            lines = path.lower().endswith(".jsonl")
            part = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        except ValueError:
            return None
        if not isinstance(part, list) or not all(isinstance(row, dict) for row in part):
            return None
        rows += part
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


def _beside_table(dataset: Dataset | IterableDataset, folder: str, options: _Options) -> Dataset | IterableDataset:
    """Relative paths of files beside a table, or in `images` beside it, made whole."""
    if options.image_root is not None:
        return dataset
    folder = folder if _is_text(folder) else _plain(folder, options.cache_dir)
    head = list(dataset.take(100)) if dataset.features is None or _paths_in(dataset.features) else []
    names = {
        name
        for row in head
        for name, cell in row.items()
        for path in (cell if isinstance(cell, list) else [cell])
        if isinstance(path, str) and _placed(path, folder) != path
    }
    for name in sorted(names):
        place = partial(_place, name=name, folder=folder)
        if isinstance(dataset, IterableDataset):
            dataset = dataset.map(place, input_columns=[name], features=dataset.features)
            continue
        order = dataset.column_names
        column = dataset.select_columns([name]).map(place, input_columns=[name], desc="Joining image paths")
        dataset = concatenate_datasets([dataset.remove_columns(name), column], axis=1).select_columns(order)
    return dataset


def _paths_in(features: Features) -> list[str]:
    """Columns that may hold paths: text, and lists of it."""
    texts = (Value("string"), Value("large_string"))
    return [n for n, kind in features.items() if (kind.feature if isinstance(kind, List) else kind) in texts]


def _place(cell: Any, name: str, folder: str) -> dict[str, Any]:
    if isinstance(cell, list):
        return {name: [_placed(path, folder) if isinstance(path, str) else path for path in cell]}
    return {name: _placed(cell, folder) if isinstance(cell, str) else cell}


def _placed(path: str, folder: str) -> str:
    if not path or len(path) > 1000 or os.path.isabs(path) or "://" in path or "\0" in path:
        return path
    for base in (folder, os.path.join(folder, "images")):
        whole = os.path.normpath(os.path.join(base, path))
        if whole.startswith(os.path.join(folder, "")) and os.path.isfile(whole):
            return whole
    return path


# --- pictures ---


def _load_pictures(
    pictures: list[_File], others: list[_File], options: _Options, unused: Unused
) -> tuple[Dataset | IterableDataset, str]:
    """A row for every entry that names a picture, and for every picture that none names."""
    listed = {file.path for file in pictures}
    stems = {file.stem for file in pictures}
    texts: dict[str, list[_File]] = {}
    parts: list[Dataset] = []
    named: set[str] = set()
    for file in others:
        if file.suffix in (*_CAPTIONS, ".json") and file.stem in stems:
            texts.setdefault(file.stem, []).append(file)
        elif file.kind == "table" and (
            file.suffix in (".json", ".jsonl", ".csv") or file.name.endswith("metadata.parquet")
        ):
            part, names = _entries(file, listed, options, unused)
            if part is not None:
                parts.append(part)
                named |= names
        else:
            reason = f"{'an' if file.kind == 'archive' else 'a'} {file.kind} beside pictures"
            unused.append((file.name, "no picture" if file.kind == "other" else f"{reason}; data_files can choose it"))
    rest = [file for file in pictures if file.path not in named]
    captioned = {file.stem for file in rest}
    unused += [
        (text.name, "its picture is named in a table")
        for stem in texts
        if stem not in captioned
        for text in texts[stem]
    ]
    if rest:
        parts.append(_listed(rest, texts, parts, options))
    dataset = concatenate_datasets(_of_one_type(parts)) if len(parts) > 1 else parts[0]
    images: Dataset | IterableDataset = dataset
    if options.streaming:  # as many shards as any number of readers could share
        images = dataset.to_iterable_dataset(num_shards=min(len(dataset), 1024))
    if set(dataset.column_names) != {"image"}:
        images.info.description = SOME_CAPTIONS
    return images, f"{len(pictures):,} pictures"


def _of_one_type(parts: list[Dataset]) -> list[Dataset]:
    """Tables whose columns of one name have one type: where numbers and text differ, text."""
    kinds: dict[str, list[Any]] = {}
    for part in parts:
        for name, kind in part.features.items():
            kinds.setdefault(name, []).append(kind)
    mixed = {
        name
        for name, types in kinds.items()
        if any(kind != types[0] for kind in types) and all(isinstance(kind, Value) for kind in types)
    }
    texts = Value("string")
    return [
        part.cast(Features({name: texts if name in mixed else kind for name, kind in part.features.items()}))
        if mixed & set(part.column_names)
        else part
        for part in parts
    ]


def _entries(file: _File, listed: set[str], options: _Options, unused: Unused) -> tuple[Dataset | None, set[str]]:
    """The rows of a table that name pictures of the folder, with those in `image`, and which they are."""
    try:
        plain = options._replace(split="train", streaming=False, hub={"cache_dir": options.cache_dir})
        rows = cast(Dataset, _load_tables([file], plain))
    except Exception:
        unused.append((file.name, "cannot be read as a table of captions"))
        return None, set()
    folder = os.path.dirname(file.path)
    for column in _PATH_COLUMNS:
        if column not in _paths_in(rows.features):
            continue
        cells = [(cell[0] if cell else None) if isinstance(cell, list) else cell for cell in rows[column]]
        paths = [_listed_path(cell, folder, listed) for cell in cells]
        if not any(paths):
            continue
        absent = [str(cell) for cell, path in zip(cells, paths, strict=True) if cell and path is None]
        empty = sum(not cell for cell in cells)
        if absent:
            unused.append((file.name, f"{len(absent):,} entries name no picture here ({', '.join(absent[:3])}, …)"))
        if empty:
            unused.append((file.name, f"{empty:,} entries have no picture"))
        chosen = [path for path in paths if path is not None]
        rows = rows.select([row for row, path in enumerate(paths) if path is not None])
        rows = rows.remove_columns([name for name in {column, "image"} if name in rows.column_names])
        images = Dataset.from_dict({"image": [_cell(path) for path in chosen]}, features=IMAGE)
        return concatenate_datasets([images, rows], axis=1) if rows.column_names else images, set(chosen)
    unused.append((file.name, "names no picture here"))
    return None, set()


def _listed_path(cell: Any, folder: str, listed: set[str]) -> str | None:
    if not isinstance(cell, str) or not cell:
        return None
    whole = (os.path.normpath(os.path.join(base, cell)) for base in (folder, os.path.join(folder, "images")))
    return next((path for path in whole if path in listed), None)


def _listed(
    pictures: list[_File], texts: Mapping[str, list[_File]], entries: Sequence[Dataset], options: _Options
) -> Dataset:
    """A row for every picture, and the captions in files of their names."""
    rows = tuple((file.path, tuple(text.path for text in texts.get(file.stem, ()))) for file in pictures)
    columns = dict(IMAGE)
    if any(text.suffix in _CAPTIONS for files in texts.values() for text in files):
        columns["text"] = Value("string")
    for path in islice((t.path for files in texts.values() for t in files if t.suffix == ".json"), 5):
        columns |= dict.fromkeys(_texts(Path(path).read_bytes()), Value("string"))
    stamps = [(file, texts.get(file.stem)) for file in pictures]
    dataset = _generated(
        _picture_rows, {"pictures": rows, "columns": tuple(columns)}, Features(columns), stamps, options
    )
    captions = [name for part in entries for name in CAPTION_COLUMNS if part.features.get(name) == Value("string")]
    if "text" in columns and captions and captions[0] != "text":
        dataset = dataset.rename_column("text", captions[0])
    return cast(Dataset, dataset)


def _picture_rows(pictures: Sequence[tuple[str, Sequence[str]]], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path, files in pictures:
        texts: dict[str, str] = {}
        for file in files:
            with open(file, "rb") as opened:
                texts = _caption_file(file, opened.read()) | texts
        yield {name: _cell(path) if name == "image" else texts.get(name) for name in columns}


def _cell(path: str) -> dict[str, Any]:
    if _is_text(path):
        return {"bytes": None, "path": path}
    return {"bytes": Path(path).read_bytes(), "path": _printable(path)}


def _caption_file(name: str, contents: bytes) -> dict[str, str]:
    if name.lower().endswith(".json"):
        return _texts(contents)
    try:
        return {"text": contents.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError:
        logger.warning(f"{_printable(name)}: not a caption in UTF-8.")
        return {}


def _texts(contents: bytes | Mapping[str, Any]) -> dict[str, str]:
    """Caption and conversation of a JSON object, those that are not text as JSON."""
    try:
        record = json.loads(contents) if isinstance(contents, bytes) else contents
    except (ValueError, RecursionError):
        return {}
    texts = {}
    for column, names in (("text", CAPTION_COLUMNS), ("conversations", CONVERSATION_COLUMNS)):
        value = (
            next((record[name] for name in names if record.get(name)), None) if isinstance(record, Mapping) else None
        )
        if value is not None:
            texts[column] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return texts


def _generated(
    rows: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    features: Features,
    stamps: Iterable[Any],
    options: _Options,
) -> Dataset | IterableDataset:
    """What a generator gives, in the cache of `datasets` under a name that changes with the files."""
    digest = hashlib.sha256(rows.__name__.encode())
    for item in (tuple(features.items()), *stamps):
        digest.update(repr(item).encode("utf-8", "backslashreplace"))
    return Dataset.from_generator(
        rows,
        features=features,
        cache_dir=cast(str, options.cache_dir),
        gen_kwargs=arguments,
        split=NamedSplit(options.split_name),
        fingerprint=digest.hexdigest()[:32],
    )


def _part(dataset: Dataset | IterableDataset, options: _Options) -> Dataset:
    """The range of `train[:100]`."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"a part of a split ({options.split!r}) cannot be streamed.")
    [part] = datasets.ReadInstruction.from_spec(options.split).to_absolute({options.split_name: len(dataset)})
    return dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))


# --- archives ---


class _Member(NamedTuple):
    name: str
    contents: bytes

    @property
    def is_picture(self) -> bool:
        return os.path.splitext(self.name)[1].lower() in _PICTURES


def _load_archives(files: list[_File], options: _Options) -> tuple[Dataset | IterableDataset, str]:
    columns, layouts = dict(IMAGE), set()
    for file in files:
        for _, members in islice(_samples(file.path, headers_only=True), 5):
            layouts.add(tuple(_field(member.name) for member in members if member.is_picture))
            texts = {name: text for m in members for name, text in _archive_texts(m).items()}
            columns |= dict.fromkeys(texts, Value("string"))
        if file.suffix == ".zip":
            with _named(file.path), zipfile.ZipFile(file.path) as archive:
                for texts in islice(_zip_entries(archive).values(), 5):
                    columns |= dict.fromkeys(texts, Value("string"))
    layouts.discard(())
    if len(layouts) == 1 and len(fields := next(iter(layouts))) > 1 and len(set(fields)) == len(fields):
        columns = dict.fromkeys(fields, Image()) | {name: kind for name, kind in columns.items() if name != "image"}
    columns |= dict.fromkeys(("__key__", "__url__"), Value("string"))
    arguments = {"archives": [file.path for file in files], "columns": tuple(columns)}
    where = f"{len(files):,} {'archive' if len(files) == 1 else 'archives'}"
    features = Features(columns)
    if options.streaming:
        split = NamedSplit(options.split_name)
        dataset: Dataset | IterableDataset = IterableDataset.from_generator(
            _archive_rows, features=features, gen_kwargs=arguments, split=split
        )
    else:
        dataset = _generated(_archive_rows, arguments, features, files, options)
    if {"text", "conversations"} & set(columns):
        dataset.info.description = SOME_CAPTIONS
    return dataset, where


def _archive_rows(archives: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in archives:
        unused: list[str] = []
        for key, members in _samples(path, unused=unused):
            texts: dict[str, str] = {}
            for member in members:
                texts = _archive_texts(member) | texts
            # Not the bare name: `datasets` would take the file of that name on this machine, if there is one, instead.
            pictures = {
                (_field(m.name), place): {"bytes": m.contents, "path": f"member {m.name}"}
                for place, m in enumerate(members)
                if m.is_picture
            }
            if not pictures:
                unused += [f"{member.name}: belongs to no picture" for member in members]
            row = {name: texts.get(name) for name in columns} | {"__key__": key, "__url__": _printable(path)}
            if "image" in columns:
                for picture in pictures.values():
                    yield row | {"image": picture}
            elif pictures:
                yield row | {field: picture for (field, _), picture in pictures.items() if field in columns}
                unused += [
                    f"{p['path']}: no column for it" for (field, _), p in pictures.items() if field not in columns
                ]
        if unused:
            logger.warning(list_problems(unused, f"{len(unused):,} members of {_printable(path)} are not used"))


def _field(name: str) -> str:
    """What WebDataset calls a member of a sample: all its suffixes."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _archive_texts(member: _Member) -> dict[str, str]:
    is_text = member.name.lower().endswith((*_CAPTIONS, ".json"))
    return _caption_file(member.name, member.contents) if is_text else {}


def _samples(
    path: str, headers_only: bool = False, unused: list[str] | None = None
) -> Iterator[tuple[str, list[_Member]]]:
    """The samples of an archive: its key, and its pictures and texts, pictures without contents where only headers are
    wanted.

    Raises:
        ValueError: the archive is damaged; the message names it.
    """
    left: list[str] = [] if unused is None else unused
    is_tar = path.lower().endswith(_TARS)
    current: str | None = None
    members: list[_Member] = []
    with _named(path):
        for member in (_tar_members if is_tar else _zip_members)(path, headers_only, left):
            folder, slash, base = member.name.rpartition("/")
            key = folder + slash + (base.partition(".")[0] if is_tar else os.path.splitext(base)[0])
            if members and key != current:
                yield cast(str, current), members
                members = []
            current = key
            members.append(member)
        if members:
            yield cast(str, current), members


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{_printable(path)}: {error or type(error).__name__}.") from error


def _tar_members(path: str, headers_only: bool, unused: list[str]) -> Iterator[_Member]:
    with tarfile.open(path) as archive:
        while (info := archive.next()) is not None:
            archive.__dict__["members"] = []  # kept by `tarfile` for look-ups, without end
            name = _printable(info.name)
            if _wanted(name, info.isdir(), info.isreg(), info.size, unused):
                skip = headers_only and not name.lower().endswith(".json")
                file = None if skip else archive.extractfile(info)
                yield _Member(name, b"" if file is None else file.read())
        # `tarfile` takes a damaged header for the end, and the end of the first of joined archives for that of all.
        rest = cast(BinaryIO, archive.fileobj)
        rest.seek(archive.offset)
        while block := rest.read(1 << 20):
            if any(block):
                raise tarfile.ReadError(f"damaged, or several archives joined, behind byte {archive.offset:,}")


def _zip_members(path: str, headers_only: bool, unused: list[str]) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        entries = _zip_entries(archive)
        for info in sorted(archive.infolist(), key=lambda info: os.path.splitext(info.filename)):
            name = _printable(info.filename)
            mode = info.external_attr >> 16
            regular = stat.S_IFMT(mode) in (0, stat.S_IFREG)
            if os.path.basename(name) in _METADATA or not _wanted(
                name, info.is_dir(), regular, info.file_size, unused
            ):
                continue
            skip = headers_only and not name.lower().endswith(".json")
            yield _Member(name, b"" if skip else archive.read(info))
            if texts := entries.get(os.path.normpath(name)):
                yield _Member(f"{os.path.splitext(name)[0]}.json", json.dumps(texts).encode())


def _zip_entries(archive: zipfile.ZipFile) -> dict[str, dict[str, str]]:
    """The captions and conversations that metadata in a ZIP archive gives for its other members."""
    entries: dict[str, dict[str, str]] = {}
    for name in archive.namelist():
        folder, base = os.path.split(name)
        if base not in _METADATA:
            continue
        try:
            text = io.StringIO(archive.read(name).decode("utf-8-sig"), newline="")
            lines = filter(str.strip, text)
            records: list[Any] = list(csv.DictReader(text) if base.endswith(".csv") else map(json.loads, lines))
        except (ValueError, RecursionError, csv.Error) as error:
            logger.warning(f"{_printable(name)} in {_printable(str(archive.filename))} is not used: {error}.")
            continue
        for record in records:
            names = _PATH_COLUMNS if isinstance(record, dict) else ()
            member = next((record[column] for column in names if isinstance(record.get(column), str)), None)
            if member:
                entries[os.path.normpath(os.path.join(folder, member))] = _texts(record)
    return entries


def _wanted(name: str, is_folder: bool, is_regular: bool, size: int, unused: list[str]) -> bool:
    """Whether a member is a picture or a text; pictures that are something else are listed."""
    parts = name.split("/")
    suffix = os.path.splitext(name)[1].lower()
    if is_folder or suffix not in (*_PICTURES, *_CAPTIONS, ".json", ".jsonl", ".csv"):
        return False
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        return False
    problem = "no regular file" if not is_regular else "larger than 2 GB" if size > _LARGEST else None
    if problem is not None:
        unused.append(f"{name}: {problem}")
    return problem is None
