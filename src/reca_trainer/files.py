"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all of it is on disk, and goes if anything fails.

    A process that is killed leaves nothing at `folder`, only `.NAME.partial` beside it, which the next try clears.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        OSError: it could not be written, for want of room or rights.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder to write to.")
    staging = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            free = shutil.disk_usage(folder.parent).free / 1e6
            raise OSError(f"{folder} was not written: {error}. {free:,.1f} MB are free there.") from error
        raise
    os.replace(staging, folder)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place when all went well, so that `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
