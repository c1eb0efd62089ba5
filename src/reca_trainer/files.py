"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextlib.contextmanager
def written_whole(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all of it is on disk, and goes if anything fails.

    A process that is killed leaves nothing at `folder`, only `.NAME.partial` beside it, which the next try clears.

    Args:
        size: bytes that will be written.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        OSError: it could not be written, for want of room or rights; less than `size` is free.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder to write to.")
    staging = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(staging).free) < size:
            raise OSError(
                f"{folder} will take {size / 1e9:,.3f} GB, and {free / 1e9:,.3f} GB are free there. Make room, or choose "
                "another folder."
            )
        yield staging
        give_usual_rights(staging)
        for path in [*staging.rglob("*"), staging]:
            sync(path)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        # The first is how safetensors reports a full disk.
        if isinstance(error, SafetensorError) or getattr(error, "errno", None) in NO_ROOM:
            free = shutil.disk_usage(folder.parent).free
            raise OSError(f"{folder} was not written: {error}. {free / 1e6:,.1f} MB are free there.") from error
        raise
    os.replace(staging, folder)


def give_usual_rights(folder: Path) -> None:
    """Make files in a folder readable for whoever may read others of the same user: safetensors keeps its own to the
    user alone, whatever the process's umask."""
    sample = folder / f".{os.getpid()}.rights"
    sample.touch()
    rights = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700 | rights)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place when all went well, so that `path` is never half written. Those that killed
    processes of this machine have left are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}-"
    for rest in path.parent.glob(f"{glob.escape(prefix)}*.part"):
        writer = rest.name[len(prefix) : -len(".part")]
        if writer.isdecimal() and not _is_running(int(writer)):
            rest.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there, a signal of 0 is no question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
