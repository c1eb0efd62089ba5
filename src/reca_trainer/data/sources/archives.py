"""Archives, read in place: tar (WebDataset) and ZIP."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

from datasets import Dataset, Features, Image, IterableDataset, NamedSplit, Value

from reca_trainer.data.columns import SOME_CAPTIONS
from reca_trainer.data.sources.captions import METADATA, PATH_COLUMNS, caption_file, texts_of
from reca_trainer.data.sources.files import CAPTIONS, PICTURES, TARS, SourceFile, printable
from reca_trainer.data.sources.request import Request, generated
from reca_trainer.images import list_problems

logger = logging.getLogger(__name__)

# What reading a damaged archive raises.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
)
LARGEST_CELL = 2**31 - 1  # bytes that Arrow holds in a cell


class _Member(NamedTuple):
    name: str
    contents: bytes

    @property
    def is_picture(self) -> bool:
        return os.path.splitext(self.name)[1].lower() in PICTURES


def load_archives(files: list[SourceFile], request: Request) -> tuple[Dataset | IterableDataset, str]:
    columns, layouts = {"image": Image()}, set()
    problems = []
    for file in files:
        try:
            layout, texts = _peek(file)
        except ValueError as error:
            if not request.streaming:
                raise
            problems.append(str(error))  # whoever reads the stream decides what becomes of this archive
            continue
        layouts |= layout
        columns |= dict.fromkeys(texts, Value("string"))
    if len(problems) == len(files):
        raise ValueError(list_problems(problems, "No archive can be read"))
    layouts.discard(())
    if len(layouts) == 1 and len(fields := next(iter(layouts))) > 1 and len(set(fields)) == len(fields):
        columns = dict.fromkeys(fields, Image()) | {name: kind for name, kind in columns.items() if name != "image"}
    columns |= dict.fromkeys(("__key__", "__url__"), Value("string"))
    arguments = {"archives": [file.path for file in files], "columns": tuple(columns)}
    where = f"{len(files):,} {'archive' if len(files) == 1 else 'archives'}"
    features = Features(columns)
    if request.streaming:
        split = NamedSplit(request.split_name)
        dataset: Dataset | IterableDataset = IterableDataset.from_generator(
            _archive_rows, features=features, gen_kwargs=arguments, split=split
        )
    else:
        dataset = generated(_archive_rows, arguments, features, files, request)
    if {"text", "conversations"} & set(columns):
        dataset.info.description = SOME_CAPTIONS
    return dataset, where


def _peek(file: SourceFile) -> tuple[set[tuple[str, ...]], dict[str, str]]:
    """Which pictures and which texts the first samples of an archive have."""
    layouts: set[tuple[str, ...]] = set()
    texts: dict[str, str] = {}
    for _, members in islice(_samples(file.path, headers_only=True), 5):
        layouts.add(tuple(_field(member.name) for member in members if member.is_picture))
        for member in members:
            texts |= _archive_texts(member)
    if file.suffix == ".zip":
        with _named(file.path), zipfile.ZipFile(file.path) as archive:
            for entry in islice(_zip_entries(archive).values(), 5):
                texts |= entry
    return layouts, texts


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
            row = {name: texts.get(name) for name in columns} | {"__key__": key, "__url__": printable(path)}
            if "image" in columns:
                for picture in pictures.values():
                    yield row | {"image": picture}
            elif pictures:
                yield row | {field: picture for (field, _), picture in pictures.items() if field in columns}
                unused += [
                    f"{p['path']}: no column for it" for (field, _), p in pictures.items() if field not in columns
                ]
        if unused:
            logger.warning(list_problems(unused, f"{len(unused):,} members of {printable(path)} are not used"))


def _field(name: str) -> str:
    """What WebDataset calls a member of a sample: all its suffixes."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _archive_texts(member: _Member) -> dict[str, str]:
    is_text = member.name.lower().endswith((*CAPTIONS, ".json"))
    return caption_file(member.name, member.contents) if is_text else {}


def _samples(
    path: str, headers_only: bool = False, unused: list[str] | None = None
) -> Iterator[tuple[str, list[_Member]]]:
    """The samples of an archive: its key, and its pictures and texts, pictures without contents where only headers are
    wanted.

    Raises:
        ValueError: the archive is damaged; the message names it.
    """
    left: list[str] = [] if unused is None else unused
    is_tar = path.lower().endswith(TARS)
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
    except _DAMAGED as error:
        raise ValueError(f"{printable(path)}: {error or type(error).__name__}.") from error


def _tar_members(path: str, headers_only: bool, unused: list[str]) -> Iterator[_Member]:
    with tarfile.open(path) as archive:
        while (info := archive.next()) is not None:
            archive.__dict__["members"] = []  # kept by `tarfile` for look-ups, without end
            name = printable(info.name)
            if _wanted(name, info.isdir(), info.isreg(), info.size, unused):
                skip = headers_only and not name.lower().endswith(".json")
                file = None if skip else archive.extractfile(info)
                yield _Member(name, b"" if file is None else file.read())
        # `tarfile` takes a damaged header for the end, and the end of the first of joined archives for that of all.
        rest = cast(BinaryIO, archive.fileobj)
        rest.seek(archive.offset)
        has_end = False
        while block := rest.read(1 << 20):
            has_end = True
            if any(block):
                raise tarfile.ReadError(f"damaged, or several archives joined, behind byte {archive.offset:,}")
        if not has_end:
            logger.warning(f"{printable(path)} ends without the mark of a tar's end: it may be cut off.")


def _zip_members(path: str, headers_only: bool, unused: list[str]) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        entries = _zip_entries(archive)
        for info in sorted(archive.infolist(), key=lambda info: os.path.splitext(info.filename)):
            name = printable(info.filename)
            mode = info.external_attr >> 16
            regular = stat.S_IFMT(mode) in (0, stat.S_IFREG)
            if os.path.basename(name) in METADATA or not _wanted(name, info.is_dir(), regular, info.file_size, unused):
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
        if base not in METADATA:
            continue
        try:
            text = io.StringIO(archive.read(name).decode("utf-8-sig"), newline="")
            lines = filter(str.strip, text)
            records: list[Any] = list(csv.DictReader(text) if base.endswith(".csv") else map(json.loads, lines))
        except (ValueError, RecursionError, csv.Error) as error:
            logger.warning(f"{printable(name)} in {printable(str(archive.filename))} is not used: {error}.")
            continue
        for record in records:
            names = PATH_COLUMNS if isinstance(record, dict) else ()
            member = next((record[column] for column in names if isinstance(record.get(column), str)), None)
            if member:
                entries[os.path.normpath(os.path.join(folder, member))] = texts_of(record)
    return entries


def _wanted(name: str, is_folder: bool, is_regular: bool, size: int, unused: list[str]) -> bool:
    """Whether a member is a picture or a text; pictures that are something else are listed."""
    parts = name.split("/")
    suffix = os.path.splitext(name)[1].lower()
    if is_folder or suffix not in (*PICTURES, *CAPTIONS, ".json", ".jsonl", ".csv"):
        return False
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        return False
    problem = "no regular file" if not is_regular else "larger than 2 GB" if size > LARGEST_CELL else None
    if problem is not None:
        unused.append(f"{name}: {problem}")
    return problem is None
