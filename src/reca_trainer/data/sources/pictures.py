"""Folders of pictures, with their captions beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets

from reca_trainer.data.columns import CAPTION_COLUMNS, SOME_CAPTIONS
from reca_trainer.data.sources.captions import PATH_COLUMNS, caption_file, texts_of
from reca_trainer.data.sources.files import CAPTIONS, SourceFile, Unused, is_text, printable
from reca_trainer.data.sources.request import Request, as_stream, generated
from reca_trainer.data.sources.tables import load_tables, path_columns

IMAGE = Features({"image": Image()})


def load_pictures(
    pictures: list[SourceFile], others: list[SourceFile], request: Request, unused: Unused
) -> tuple[Dataset | IterableDataset, str]:
    """A row for every entry that names a picture, and for every picture that none names."""
    listed = {file.path for file in pictures}
    stems = {file.stem for file in pictures}
    texts: dict[str, list[SourceFile]] = {}
    parts: list[Dataset] = []
    named: set[str] = set()
    for file in others:
        if file.suffix in (*CAPTIONS, ".json") and file.stem in stems:
            texts.setdefault(file.stem, []).append(file)
        elif file.kind == "table" and (
            file.suffix in (".json", ".jsonl", ".csv") or file.name.endswith("metadata.parquet")
        ):
            part, names = _entries(file, listed, request, unused)
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
        parts.append(_listed(rest, texts, parts, request))
    dataset = concatenate_datasets(_of_one_type(parts)) if len(parts) > 1 else parts[0]
    images: Dataset | IterableDataset = dataset
    if request.streaming:
        images = as_stream(dataset)
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


def _entries(file: SourceFile, listed: set[str], request: Request, unused: Unused) -> tuple[Dataset | None, set[str]]:
    """The rows of a table that name pictures of the folder, with those in `image`, and which they are."""
    try:
        plain = request._replace(split="train", streaming=False, hub={"cache_dir": request.cache_dir})
        rows = cast(Dataset, load_tables([file], plain))
    except Exception:
        unused.append((file.name, "cannot be read as a table of captions"))
        return None, set()
    folder = os.path.dirname(file.path)
    for column in PATH_COLUMNS:
        if column not in path_columns(rows.features):
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
    pictures: list[SourceFile], texts: Mapping[str, list[SourceFile]], entries: Sequence[Dataset], request: Request
) -> Dataset:
    """A row for every picture, and the captions in files of their names."""
    rows = tuple((file.path, tuple(text.path for text in texts.get(file.stem, ()))) for file in pictures)
    columns = dict(IMAGE)
    if any(text.suffix in CAPTIONS for files in texts.values() for text in files):
        columns["text"] = Value("string")
    for path in islice((t.path for files in texts.values() for t in files if t.suffix == ".json"), 5):
        columns |= dict.fromkeys(texts_of(Path(path).read_bytes()), Value("string"))
    stamps = [(file, texts.get(file.stem)) for file in pictures]
    dataset = generated(
        _picture_rows, {"pictures": rows, "columns": tuple(columns)}, Features(columns), stamps, request
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
                texts = caption_file(file, opened.read()) | texts
        yield {name: _cell(path) if name == "image" else texts.get(name) for name in columns}


def _cell(path: str) -> dict[str, Any]:
    if is_text(path):
        return {"bytes": None, "path": path}
    return {"bytes": Path(path).read_bytes(), "path": printable(path)}
