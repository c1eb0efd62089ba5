"""Data sets whose rows have what frozen encoders make of their images: as Parquet files, for streams above all.

A row has its image as it was stored, its texts (those that are lists or conversations as JSON), `width` and `height` of the
upright image and, in a column named after encoders and framing, the tensors of `UnifiedModel.encode_batch`. So a shard is
a table of images like others; a run with the same encoders and framing reads the tensors in their place.

Every shard is written whole, by one process, from a fixed range of the source's rows. Until all are there they lie in
`.NAME.partial` beside the folder they are to be: whoever was interrupted goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, Value
from datasets.arrow_writer import ParquetWriter
from datasets.utils import tqdm
from PIL.Image import Image as Picture
from transformers.utils import logging

from reca_trainer.data.columns import Columns
from reca_trainer.data.latent_cache import Encode, encoded_row, encoders_digest, processor_settings
from reca_trainer.data.rows import read_row, read_source
from reca_trainer.data.sampling import Draw, SamplingPlan, Size
from reca_trainer.data.stream_reader import SHARD_STRIDE, Candidate, StreamReader, shards_of
from reca_trainer.files import replacing, sync
from reca_trainer.images import ImageError, list_problems
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

logger = logging.get_logger(__name__)

ROWS_PER_SHARD = 256
ROWS_PER_GROUP = 16  # of a Parquet file, which is what a reader has in memory: megabytes a row
WINDOW = 128  # rows that a stream's reader has in memory
NOTE = "source.json"  # in an unfinished folder: what its rows are from
NAME = re.compile(r"encoded_([0-9a-f]{16})_([0-9a-f]{16})")


def column_name(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    max_image_size: int | None,
    min_image_size: int | None,
    precision: str,
) -> str:
    """The column of what `model` makes of images: named after its encoders (weights, dtypes, structure, `precision` of the
    computation) and after their framing (processor, bounds of the target's sides, this library's version)."""
    framing = json.dumps([processor_settings(processor), max_image_size, min_image_size]).encode()
    return f"encoded_{encoders_digest(model, precision)[:16]}_{hashlib.sha256(framing).hexdigest()[:16]}"


def encoded_column(dataset: Dataset | IterableDataset | None) -> str | None:
    """The column of a dataset's encoded images; `None` if it has none."""
    return next(filter(NAME.fullmatch, getattr(dataset, "features", None) or ()), None)


def check_column(column: str, expected: str) -> None:
    """Raises `ValueError` where encoded images are not what this run's model makes of them."""
    parts = zip(("encoders", "framing"), column.split("_")[1:], expected.split("_")[1:], strict=True)
    differing = " and ".join(part for part, before, now in parts if before != now)
    if differing:
        raise ValueError(
            f"The encoded images of this dataset (column {column}) were written with other {differing} than this run's "
            f"({expected}): encoders are the model's weights, their dtype and precision; framing is the processor, "
            "max_image_size, min_image_size and the version of reca_trainer. Write them again with `reca-trainer "
            "precompute` and the options of this run, or set cache_latents=False to train from the images."
        )


def unfinished_folder(folder: Path) -> Path:
    """Where the shards lie until all are there.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder to write to.")
    return folder.parent / f".{folder.name}.partial"


def check_source(unfinished: Path, source: dict[str, Any]) -> None:
    """Raises `ValueError` where an unfinished folder was begun with another `source`: where rows are from and what is made
    of them, in JSON's types."""
    note = unfinished / NOTE
    if not note.exists():
        with replacing(note) as temporary:
            temporary.write_text(json.dumps(source))
    before = json.loads(note.read_text())
    changes = [
        f"{name} was {before.get(name)!r}, now is {now!r}" for name, now in source.items() if now != before.get(name)
    ]
    if changes:
        raise ValueError(
            f"{unfinished} was begun with other options ({'; '.join(changes)}). Delete it, or choose another folder to write to."
        )


def finish(unfinished: Path, folder: Path) -> int:
    """Give the folder its name once all processes are through; returns the number of its rows.

    Raises:
        ValueError: it has none.
    """
    rows = sum(pq.read_metadata(file).num_rows for file in unfinished.glob("*.parquet"))
    if not rows:
        raise ValueError("None of the images could be encoded.")
    os.replace(unfinished, folder)
    for file in folder.iterdir():  # the note, and the run's lock
        if file.suffix != ".parquet":
            file.unlink()
    return rows


def write_shards(
    dataset: Dataset | IterableDataset,
    columns: Columns,
    column: str,
    processor: UnifiedProcessor,
    encode: Encode,
    target_size: Callable[[int, int], Size],
    folder: Path,
    *,
    on_bad_image: str = "raise",
    max_bad_share: float = 0.1,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Write a process's share of a dataset's rows, encoded, into shards of `folder`; those that are there are kept.

    Args:
        column: their `column_name`.
        target_size: `(width, height)` of an image to `(height, width)` of its target.
        on_bad_image: `"raise"`, or `"skip"`: leave out and log what cannot be read.
        max_bad_share: the share of a process's rows, from 100 on, above which leaving out is an error.

    Raises:
        ImageError: an image or a shard of the source cannot be read; too many of them.
    """
    if isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=-(-len(dataset) // ROWS_PER_SHARD))
    plan = SamplingPlan({"reconstruct": 1}, shuffle=False)
    reader = StreamReader("reconstruct", dataset, columns, target_size, plan, 1, on_bad_image, None)
    texts = [name for name in (columns.caption, columns.conversation) if name]
    sides = dict.fromkeys(("width", "height"), Value("int32"))
    kinds = {columns.image: Image(), **dict.fromkeys(texts, Value("string")), **sides, column: Value("binary")}
    written = left_out = 0

    def rows_of(candidates: Iterable[Candidate], problems: list[str]) -> Iterator[dict[str, Any]]:
        for candidate in candidates:
            draw = Draw("reconstruct", candidate.row, candidate.size, seed=candidate.row, instruction="")
            record, source = candidate.record, candidate.source
            try:
                row = read_row(draw, record, columns, source)
            except ImageError as error:
                if on_bad_image == "raise":
                    raise
                problems.append(str(error))
                continue
            width, height = cast(Picture, row.image).size
            cells = {"width": width, "height": height, column: encoded_row(row, processor, encode)}
            cells |= {name: _as_text(record[name]) for name in texts}
            yield {columns.image: read_source(record[columns.image], source), **cells}

    def leave_out(problems: list[str]) -> None:
        nonlocal left_out
        left_out += len(problems)
        for problem in problems:
            logger.warning(f"Left out: {problem}")
        seen = written + left_out
        if problems and seen >= 100 and left_out > max_bad_share * seen:
            headline = f"{left_out} of {seen} rows cannot be used, more than max_bad_share={max_bad_share:g} allows"
            raise ImageError(list_problems(problems, headline))
        problems.clear()

    shares = shards_of(process_index, num_processes, range(reader.dataset.num_shards))
    for share in tqdm(shares, desc="Encoding images", unit="shard"):
        first = next(part for part in count() if not _shard_file(folder, share.shard, part).exists())
        reading = reader.read_shard(share.shard, first * ROWS_PER_SHARD)
        for part, candidates in groupby(reading.candidates, lambda row: row.row % SHARD_STRIDE // ROWS_PER_SHARD):
            file = _shard_file(folder, share.shard, part)
            if part % share.parts == share.part and not file.exists():
                written += _write(file, rows_of(candidates, reading.problems), Features(kinds))
                leave_out(reading.problems)
            else:  # of another process, which tells of the problems
                for _ in candidates:
                    pass
                reading.problems.clear()
        leave_out(reading.problems)


def _shard_file(folder: Path, shard: int, part: int) -> Path:
    return folder / f"{shard:05d}-{part:05d}.parquet"


def _as_text(cell: Any) -> str | None:
    return cell if cell is None or isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)


def _write(file: Path, rows: Iterator[dict[str, Any]], features: Features) -> int:
    """Write rows, if there are any, and return their number."""
    first = next(rows, None)
    if first is None:
        return 0
    options = {"features": features, "writer_batch_size": ROWS_PER_GROUP, "embed_local_files": True}
    with replacing(file) as temporary, ParquetWriter(path=str(temporary), **options) as writer:
        for row in chain([first], rows):
            writer.write(features.encode_example(row))
        number, _ = writer.finalize()
        sync(temporary)
    return int(number)
