"""What is asked of a source, and where its generated rows are cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import datasets
from datasets import Dataset, Features, IterableDataset, NamedSplit


class Request(NamedTuple):
    """The arguments of `load_image_dataset`, patterns as a list."""

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


def generated(
    rows: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    features: Features,
    stamps: Iterable[Any],
    request: Request,
) -> Dataset | IterableDataset:
    """What a generator gives, in the cache of `datasets` under a name that changes with the files."""
    digest = hashlib.sha256(rows.__name__.encode())
    for item in (tuple(features.items()), *stamps):
        digest.update(repr(item).encode("utf-8", "backslashreplace"))
    return Dataset.from_generator(
        rows,
        features=features,
        cache_dir=cast(str, request.cache_dir),
        gen_kwargs=arguments,
        split=NamedSplit(request.split_name),
        fingerprint=digest.hexdigest()[:32],
    )


def as_stream(dataset: Dataset) -> IterableDataset:
    """A data set of known length as a stream, in shards enough for many readers and large enough to be read quickly."""
    rows = len(dataset)
    return dataset.to_iterable_dataset(num_shards=min(rows, max(64, min(rows // 64, 1024))))


def part_of_split(dataset: Dataset | IterableDataset, request: Request) -> Dataset:
    """The range of `train[:100]`."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"a part of a split ({request.split!r}) cannot be streamed.")
    [part] = datasets.ReadInstruction.from_spec(request.split).to_absolute({request.split_name: len(dataset)})
    return dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))
