"""Which files a source has: by kind, by pattern, by split; and names as `datasets` takes them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import features as pillow

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (*TARS, ".zip")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
PICTURES = {*ImageFolder.EXTENSIONS, *([".avif"] if pillow.check("avif") else [])} - {*ARCHIVES, *TABLES}
CAPTIONS = (".txt", ".caption")
KNOWN = {*PICTURES, *TABLES, *ARCHIVES, ".gz"}
SPLITS = [
    {"train", "training"},
    {"test", "testing", "eval", "evaluation"},
    {"validation", "valid", "val", "dev"},
]

Unused = list[tuple[str, str]]  # names, and why they are not read


class SourceFile(NamedTuple):
    """A regular file of a source."""

    path: str
    name: str  # below the source's folder
    stamp: str  # another one when the contents change
    suffix: str  # in lower case
    kind: str  # picture, archive, table or other

    @property
    def stem(self) -> str:
        return self.path[: len(self.path) - len(self.suffix)]


def source_file(path: str, name: str, status: os.stat_result) -> SourceFile:
    suffix = os.path.splitext(path)[1].lower()
    return SourceFile(path, name, f"{status.st_size}-{status.st_mtime_ns}", suffix, kind_of(path, suffix))


def kind_of(path: str, suffix: str) -> str:
    if path.lower().endswith(ARCHIVES):
        return "archive"
    return "picture" if suffix in PICTURES else "table" if suffix in TABLES else "other"


def walk(folder: str, unused: Unused) -> list[SourceFile]:
    """All regular files below a folder, by name. Links are followed, and every folder is read once."""
    files: list[SourceFile] = []
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
                            files.append(source_file(entry.path, below, entry.stat()))
                            continue
                    unused.append((below, "no regular file"))
        linked.sort()
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def matching(folder: str, patterns: Sequence[str], unused: Unused) -> list[SourceFile]:
    """The files that patterns match, relative to a folder; a folder that matches stands for all its files."""
    files: dict[str, SourceFile] = {}
    real = lru_cache(os.path.realpath)  # of folders: links may lead `**` round in circles
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), root_dir=folder, recursive=True))
        if not matches:
            raise FileNotFoundError(f"data_files={pattern!r} matches nothing in {printable(folder)}.")
        for match in matches:
            path = os.path.normpath(os.path.join(folder, match))
            inside: list[SourceFile] = []
            if os.path.isfile(path):
                inside = [source_file(path, match, os.stat(path))]
            elif os.path.isdir(path) and "**" not in pattern:
                below = walk(path, unused)
                inside = [file._replace(name=os.path.join(match, file.name)) for file in below]
            for file in inside:
                parent, base = os.path.split(file.path)
                files.setdefault(os.path.join(real(parent), base), file)
    return sorted(files.values())


def files_of_split(files: list[SourceFile], split: str, unused: Unused) -> list[SourceFile]:
    """The files in the subfolder of a split, if that is what the subfolders are."""

    def top(file: SourceFile) -> str | None:
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
    if tops and all(name is not None and name.lower() in set().union(*SPLITS) for name in tops):
        raise ValueError(f"there is no split {split!r}, but {', '.join(sorted(map(str, tops)))}.")
    return files


def _names_of(split: str) -> set[str]:
    return {split.lower(), *(name for names in SPLITS if split.lower() in names for name in names)}


def tables_of_split(files: list[SourceFile], split: str, unused: Unused) -> list[SourceFile]:
    """Tables of one kind and, where their names tell splits, of one split."""
    kind = next(kind for kind in dict.fromkeys(TABLES.values()) if any(TABLES[f.suffix] == kind for f in files))
    unused += [(file.name, f"a table beside {kind} files") for file in files if TABLES[file.suffix] != kind]
    files = [file for file in files if TABLES[file.suffix] == kind]
    if len(files) == 1 and "/" not in files[0].name:
        return files
    all_splits = set().union(*SPLITS)
    words = {file: set("".join(c if c.isalnum() else " " for c in file.name.lower()).split()) for file in files}
    chosen = [file for file in files if words[file] & _names_of(split)]
    if not chosen and any(words[file] & all_splits for file in files):
        chosen = [file for file in files if not words[file] & all_splits]
        if not chosen:
            raise ValueError(f"there is no split {split!r} among {', '.join(file.name for file in files[:10])}.")
    if chosen:
        unused += [(file.name, f"not of the split {split!r}") for file in files if file not in set(chosen)]
    return chosen or files


def printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_text(path: str) -> bool:
    """Whether a path can stand in a table: file names need not be UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(path: str) -> bool:
    """Whether `datasets` takes a path as it is, not for a pattern or an address."""
    return is_text(path) and not set("*?[]{}$~#%") & set(path) and "::" not in path and "://" not in path


def plain_path(path: str, cache_dir: str | None = None) -> str:
    """The path, or a link to it from the cache if it is not plain."""
    if _is_plain(path):
        return path
    suffix = os.path.splitext(path)[1].lower() if os.path.isfile(path) else ""
    link = _links(cache_dir) / (hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + suffix)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return str(link)


def plain_folder(path: str, cache_dir: str | None = None) -> str:
    """The folder, or one of links to its files: `datasets` follows a link to a folder before it reads its name."""
    if _is_plain(path):
        return path
    files = walk(path, [])
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


def has_configs(folder: str) -> bool:
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
