"""What frozen encoders make of a dataset's images, computed once and kept on disk.

Only what every step would compute alike is kept: the posterior of an autoencoder but not a sample of it, embeddings but
not what trained layers make of them. A step behind the cache so has the loss it has without, its random draws included;
but a picture of which a family takes a random square always gives the square in its centre.

The file's name is a digest of everything its contents depend on (see `cache_file`); another one is written, beside it,
where any of that changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import load, save
from transformers.utils import logging

import reca_trainer
from reca_trainer.data.rows import RowDataset
from reca_trainer.data.sampling import Draw
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

logger = logging.get_logger(__name__)

ROW = Features({"tensors": Value("binary"), "source": Value("string"), "skipped": List(Value("string"))})


class EncodedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """A `RowDataset` whose reconstruct rows have `tensors` (see `UnifiedModel.encode_batch`) instead of an `image`.

    Args:
        rows: gives the rows of all other tasks.
        encoded: what `encode_images` returns for it.
    """

    def __init__(self, rows: RowDataset, encoded: Dataset):
        self.rows, self.encoded = rows, encoded

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        if draw.task != "reconstruct":
            return self.rows[draw]
        record = self.encoded[draw.row]
        record["tensors"] = load(record["tensors"])
        return {"task": draw.task, "draw": draw, "text": None, **record}


def check_encoders(model: UnifiedModel) -> None:
    """Raises `ValueError` if there is nothing to keep of `model`'s images, or if it would change during training."""
    if not model.frozen_encoders:
        raise ValueError(
            f"cache_latents: {type(model).__name__} cannot train on encoded images; its images are encoded in every "
            "step. Leave it off for this model."
        )
    trained = [
        f"{encoder}.{name}"
        for encoder in model.frozen_encoders
        for name, parameter in model.get_submodule(encoder).named_parameters()
        if parameter.requires_grad
    ]
    if trained:
        raise ValueError(
            f"cache_latents: {len(trained)} weights of the encoders are trained ({trained[0]}, …), so what they make of "
            "an image changes with every step. Freeze them, or leave cache_latents off."
        )


def cache_file(
    rows: RowDataset,
    sizes: Sequence[tuple[int, int]],
    model: UnifiedModel,
    processor: UnifiedProcessor,
    precision: str,
) -> Path:
    """Where the encoded reconstruct rows belong, in the cache folder of `datasets` (`HF_DATASETS_CACHE`).

    The name depends on the rows and the files they point to (path, size and time of change), their target `sizes`, the
    processor, the encoders (weights, dtypes, structure), the `precision` of the computation and this library's version.
    """
    digest = hashlib.sha256()
    dataset, column = rows.datasets["reconstruct"], rows.columns["reconstruct"].image
    settings: list[Any] = [reca_trainer.__version__, dataset._fingerprint, column, rows.on_bad_image, precision]
    settings += [f"{type(processor).__module__}.{type(processor).__qualname__}", processor.to_dict(), list(sizes)]
    digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    for path in dataset.flatten()[f"{column}.path"]:
        if path and os.path.isfile(path):
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    for encoder in model.frozen_encoders:
        module = model.get_submodule(encoder)
        digest.update(f"{encoder} {module}".encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return Path(datasets.config.HF_DATASETS_CACHE) / "reca_trainer" / f"encoded-{digest.hexdigest()[:32]}.arrow"


def encode_images(
    rows: RowDataset,
    sizes: Sequence[tuple[int, int]],
    processor: UnifiedProcessor,
    encode: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
    file: Path,
) -> Dataset:
    """Read `file`, or write it: what `encode` makes of every reconstruct row at its target size, image by image.

    With `on_bad_image="skip"` a row stands for the row that takes its place, as without a cache.
    """

    def encode_row(row: int) -> dict[str, Any]:
        record = rows[Draw("reconstruct", row, sizes[row], seed=row, instruction="")]
        encoded = encode(processor(images=[record["image"]], instruction="", task="reconstruct", size=sizes[row]))
        tensors = {name: tensor[0].cpu().contiguous() for name, tensor in encoded.items()}
        return {"tensors": save(tensors), "source": record["source"], "skipped": record["skipped"]}

    logger.info(f"Encoded images: {file}" + ("" if file.exists() else " (to be written)"))
    file.parent.mkdir(parents=True, exist_ok=True)
    return Dataset.from_dict({"row": range(len(sizes))}).map(
        encode_row,
        input_columns="row",
        remove_columns="row",
        features=ROW,
        cache_file_name=str(file),
        load_from_cache_file=True,
        new_fingerprint=file.stem,
        writer_batch_size=16,
        desc="Encoding images",
    )
