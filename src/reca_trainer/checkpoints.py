"""Training checkpoints that are whole or known not to be: sealed when all of one is on disk, found by their seal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from reca_trainer.models.checkpoint import sync

logger = logging.get_logger(__name__)

SEAL = "checkpoint_files.json"


def seal(folder: Path) -> None:
    """Put everything in a checkpoint on disk and write down what belongs to it, and when."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / SEAL).write_text(json.dumps({"written": time.time(), "bytes": sizes}, indent=1))
    sync(folder / SEAL)
    sync(folder)


def make_output_dir(path: str | os.PathLike) -> None:
    """Raises `OSError` if nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise OSError(f"Nothing can be saved in output_dir={str(path)!r}: {error}. Choose another folder.") from error


def check_complete(folder: Path) -> float:
    """When a checkpoint was written (Unix time in seconds). Neither its number nor the files' own times tell: a lower
    number follows a higher one after a step back, and copying changes times.

    Raises:
        ValueError: naming the first of its files that is missing or has not the length it was written with.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no checkpoint at {folder}. resume_from_checkpoint=True goes on from the newest in output_dir."
        )
    if not (folder / SEAL).is_file():
        raise ValueError(f"{folder} is not complete: it has no {SEAL}, which is written last.")
    try:
        listing = json.loads((folder / SEAL).read_text())
        written, sizes = float(listing["written"]), dict(listing["bytes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} is not complete: its {SEAL} is damaged ({error!r}).") from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{folder} is not complete: {name} should have {size} bytes and has {found or 'none'}.")
    return written


def checkpoints(output_dir: str | os.PathLike) -> tuple[list[Path], dict[Path, str]]:
    """Those that are whole, oldest first, and what is wrong with each of the others."""
    whole, damaged = {}, {}
    for path in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if path.name.rpartition("-")[2].isdigit():
            try:
                whole[path] = check_complete(path)
            except ValueError as error:
                damaged[path] = str(error)
    return sorted(whole, key=whole.get), damaged


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint that is whole; those that are not are named in a warning."""
    whole, damaged = checkpoints(output_dir)
    for problem in damaged.values():
        logger.warning(f"{problem} Looking for another one.")
    return str(whole[-1]) if whole else None


def delete_surplus(output_dir: Path, limit: int, keep: set[Path]) -> None:
    """Delete all but `limit` checkpoints: those that are not whole before the others, then the oldest; none of `keep`."""
    whole, damaged = checkpoints(output_dir)
    deletable = [path for path in [*damaged, *whole] if path not in keep]
    for path in deletable[: max(0, len(whole) + len(damaged) - limit)]:
        shutil.rmtree(path)
