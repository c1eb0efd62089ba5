"""What frozen encoders make of a dataset's images, computed once and kept on disk.

The cache keeps what every step would compute alike: the posterior of an autoencoder but no sample of it, embeddings but
not what trained layers make of them. A step has the same loss with the cache as without, and the same random draws, with
one exception: where a family takes a random square of a picture, the cache has the square in its centre.

The folder's name is a digest of everything that its contents depend on (see `cache_folder`). Where any of that changes,
another folder is written beside it. What `encoded_shards` writes are the same tensors, as a data set of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.utils import tqdm
from PIL.Image import Image
from safetensors.torch import load, save
from transformers.utils import logging

import reca_trainer
from reca_trainer.data.rows import Row, RowDataset
from reca_trainer.data.sampling import Draw
from reca_trainer.files import replacing
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

logger = logging.get_logger(__name__)

Encode = Callable[[dict[str, Any]], dict[str, torch.Tensor]]  # `UnifiedModel.encode_batch`, in the run's precision

ROW = Features({"tensors": Value("binary"), "source": Value("string"), "skipped": List(Value("string"))})


class EncodedRows(torch.utils.data.Dataset[Row]):
    """A `RowDataset` whose reconstruct rows have `tensors` (see `UnifiedModel.encode_batch`) instead of an `image`.

    Args:
        rows: gives the rows of all other tasks.
        encoded: their `encoded_images`.
    """

    def __init__(self, rows: RowDataset, encoded: Dataset):
        self.rows, self.encoded = rows, encoded

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> Row:
        if draw.task != "reconstruct":
            return self.rows[draw]
        record = self.encoded[draw.row]
        tensors = load(record["tensors"])
        return Row(draw, record["source"], tensors=tensors, skipped=tuple(record["skipped"]))


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


def cache_folder(
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
    settings = [dataset._fingerprint, column, rows.on_bad_image, list(sizes), encoders_digest(model, precision)]
    digest.update(json.dumps([*settings, processor_settings(processor)], default=str).encode())
    for path in dataset.flatten()[f"{column}.path"]:
        if path and os.path.isfile(path):
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / "reca_trainer" / f"encoded-{digest.hexdigest()[:32]}"


def encoders_digest(model: UnifiedModel, precision: str) -> str:
    digest = hashlib.sha256(precision.encode())
    for encoder in model.frozen_encoders:
        module = model.get_submodule(encoder)
        digest.update(f"{encoder} {module}".encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def processor_settings(processor: UnifiedProcessor) -> str:
    """What decides how a processor frames images, this library's version included."""
    name = f"{type(processor).__module__}.{type(processor).__qualname__}"
    return json.dumps([reca_trainer.__version__, name, processor.to_dict()], default=str, sort_keys=True)


def encode_images(
    rows: RowDataset,
    sizes: Sequence[tuple[int, int]],
    processor: UnifiedProcessor,
    encode: Encode,
    folder: Path,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Write what `encode` makes of every reconstruct row at its target size, image by image, in parts of `folder`.

    Each process writes every `num_processes`-th part. A part that is there is whole, and is kept: whoever was interrupted
    goes on with the others. With `on_bad_image="skip"` a row stands for the row that takes its place, as without a cache.
    """
    files = _parts(folder, len(sizes))
    missing = [file for file in list(files)[process_index::num_processes] if not file.exists()]
    if missing:
        logger.info(f"Encoded images: {folder} ({len(missing)} of {len(files)} parts are to be written here)")
    folder.mkdir(parents=True, exist_ok=True)
    for file in tqdm(missing, desc="Encoding images", unit="part"):
        with replacing(file) as temporary, ArrowWriter(path=str(temporary), features=ROW) as writer:
            for row in files[file]:
                decoded = rows[Draw("reconstruct", row, sizes[row], seed=row, instruction="")]
                tensors = encoded_row(decoded, processor, encode)
                writer.write({"tensors": tensors, "source": decoded.source, "skipped": list(decoded.skipped)})
            writer.finalize()


def encoded_row(row: Row, processor: UnifiedProcessor, encode: Encode) -> bytes:
    """What `encode` makes of a row's image at its target size, as safetensors."""
    images = [cast(Image, row.image)]
    encoded = encode(processor(images=images, instruction="", task="reconstruct", size=row.draw.size))
    return save({name: tensor[0].cpu().contiguous() for name, tensor in encoded.items()})


def encoded_images(folder: Path, rows: int) -> Dataset:
    """What `encode_images` of all processes wrote for so many rows.

    Raises:
        ValueError: parts are missing, for want of a folder that all machines share.
    """
    files = _parts(folder, rows)
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} parts ({missing[0]}, …), which other machines wrote: set HF_DATASETS_CACHE to a "
            "folder that they share."
        )
    return concatenate_datasets([Dataset.from_file(str(file)) for file in files])


def _parts(folder: Path, rows: int) -> dict[Path, range]:
    """Files and the rows in each: at most 256, of 8 rows or more."""
    length = max(8, -(-rows // 256))
    starts = range(0, rows, length)
    return {folder / f"part-{n:03d}.arrow": range(at, min(at + length, rows)) for n, at in enumerate(starts)}
