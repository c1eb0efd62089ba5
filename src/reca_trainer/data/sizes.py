"""Sizes of a dataset's images, from their headers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value
from filelock import FileLock

from reca_trainer.data.columns import undecoded
from reca_trainer.data.rows import check_on_bad_image, read_source, source_name
from reca_trainer.images import ImageError, image_size, list_problems

HEADERS = Features({"width": Value("int64"), "height": Value("int64"), "problem": Value("string")})
ROWS_PER_PROCESS = 10_000  # for fewer, starting a process takes longer than reading


def row_sizes(
    dataset: Dataset, column: str, on_bad_image: str = "raise", num_proc: int | None = None
) -> list[tuple[int, int]]:
    """`(width, height)` in pixels of every row: from columns of those names, else from the images' headers.

    Headers are read once, with a progress bar; `datasets` caches the result beside the dataset. Several processes of a
    machine that ask at the same time wait for the first.

    Args:
        column: the image column.
        on_bad_image: what to do where a header cannot be read: `"raise"`, or `"skip"`: count the row as square, for
            `RowDataset` to replace, unless there is no other.
        num_proc: processes that read headers, where there are many.

    Raises:
        ImageError: rows whose header cannot be read, each named.
    """
    check_on_bad_image(on_bad_image)
    features = dataset.features
    if all(isinstance(features.get(n), Value) and "int" in features[n].dtype for n in ("width", "height")):
        sizes = list(zip(dataset["width"], dataset["height"], strict=True))
        if all(width and height and width > 0 and height > 0 for width, height in sizes):
            return sizes
    processes = min(num_proc or 1, len(dataset) // ROWS_PER_PROCESS)
    images = undecoded(dataset, [column], column)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"image-sizes-{images._fingerprint}.lock"):
        headers = images.map(
            partial(_read_headers, column=column),
            batched=True,
            with_indices=True,
            remove_columns=[column],
            features=HEADERS,
            num_proc=processes if processes > 1 else None,
            desc="Reading image sizes",
        )
    problems = [
        problem for batch in headers.select_columns("problem").iter(10_000) for problem in batch["problem"] if problem
    ]
    if problems and (on_bad_image == "raise" or len(problems) == len(dataset)):
        raise ImageError(list_problems(problems, f"{len(problems)} of {len(dataset)} images cannot be used"))
    columns = headers.select_columns(["width", "height"]).with_format("numpy")[:]
    return list(zip(columns["width"].tolist(), columns["height"].tolist(), strict=True))


def _read_headers(images: dict[str, list[Any]], rows: list[int], column: str) -> dict[str, list[Any]]:
    sizes, problems = [], []
    for row, image in zip(rows, images[column], strict=True):
        source = source_name(row, image)
        try:
            sizes.append(image_size(read_source(image, source), source))
            problems.append("")
        except ImageError as error:
            sizes.append((1, 1))
            problems.append(str(error))
    return {"width": [width for width, _ in sizes], "height": [height for _, height in sizes], "problem": problems}
