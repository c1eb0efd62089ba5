"""Saved datasets, and tables: Parquet, Arrow, JSON, CSV."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_from_disk
from datasets.data_files import DataFilesList
from datasets.exceptions import DatasetGenerationError

from reca_trainer.data.sources.files import TABLES, SourceFile, Unused, is_text, plain_path, walk
from reca_trainer.data.sources.request import Request, as_stream

# The overloads of a named split do not foresee that only the run knows whether it is a stream.
load_dataset = cast("Callable[..., Dataset | IterableDataset]", datasets.load_dataset)


def load_saved(path: str, request: Request, unused: Unused) -> Dataset | IterableDataset:
    """A folder made by `save_to_disk`."""
    saved = load_from_disk(plain_path(path, request.cache_dir))
    if not isinstance(saved, Dataset):
        if request.split not in saved:
            raise ValueError(f"there is no split {request.split!r}, but {', '.join(map(str, saved))}.")
        saved = saved[request.split]
    files = walk(path, unused)
    unused += [(file.name, "beside a saved dataset") for file in files if file.suffix not in (".arrow", ".json")]
    return as_stream(saved) if request.streaming else saved


def load_tables(files: Sequence[SourceFile], request: Request) -> Dataset | IterableDataset:
    kind = TABLES[files[0].suffix]
    # `datasets` takes names for patterns, except in a list of this type.
    paths = DataFilesList(
        [plain_path(file.path, request.cache_dir) for file in files], [(file.stamp,) for file in files]
    )
    sources = {"data_files": {request.split_name: paths}, **request.hub}
    if request.streaming and kind == "parquet" and "features" not in sources:
        sources["features"] = _features(paths)
    try:
        return load_dataset(kind, split=request.split, streaming=request.streaming, **sources)
    except DatasetGenerationError:
        rows = _json_rows([file.path for file in files]) if kind == "json" else None
        if rows is None:
            raise
    dataset = Dataset.from_list(rows)
    return as_stream(dataset) if request.streaming else dataset


def _features(paths: Sequence[str]) -> Features:
    """Those of the first Parquet file that is whole: whoever reads the stream decides what becomes of the others."""
    for path in paths:
        try:
            return Features.from_arrow_schema(pq.read_schema(path))
        except (OSError, pa.ArrowInvalid):
            if path == paths[-1]:
                raise
    raise ValueError("there are no files.")


def load_tables_of_folders(files: Sequence[SourceFile], request: Request) -> Dataset | IterableDataset:
    """Tables whose relative paths start from the folder of each."""
    folders: dict[str, list[SourceFile]] = {}
    for file in files:
        folders.setdefault(os.path.dirname(file.path), []).append(file)
    if len(folders) > 1 and (TABLES[files[0].suffix] not in ("json", "csv") or "[" in request.split):
        return load_tables(files, request)
    parts = [_beside_table(load_tables(group, request), folder, request) for folder, group in folders.items()]
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


def _beside_table(dataset: Dataset | IterableDataset, folder: str, request: Request) -> Dataset | IterableDataset:
    """Relative paths of files beside a table, or in `images` beside it, made whole."""
    if request.image_root is not None:
        return dataset
    folder = folder if is_text(folder) else plain_path(folder, request.cache_dir)
    head = list(islice(dataset, 100)) if dataset.features is None or path_columns(dataset.features) else []
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


def path_columns(features: Features) -> list[str]:
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
