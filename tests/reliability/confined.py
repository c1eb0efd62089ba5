"""Run a script and write down what it does outside its place: `python -m tests.reliability.confined RECORD FOLDERS SCRIPT …`.

RECORD gets one line for every connection or name look-up that is not loopback (they are refused) and for every file
opened for writing, made, renamed, linked or removed outside FOLDERS (separated by colons), every program started and
every class looked up for a pickle from a file. Worker processes are forked
and so watched too.
"""

import os
import runpy
import sys

RECORD, FOLDERS, *ARGUMENTS = sys.argv[1:]
LOOPBACK = ("127.", "::1", "localhost")
FILE_EVENTS = {
    "os.mkdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.utime": 1,
    "os.mkfifo": 1,
}
record = os.open(RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
allowed = tuple(os.path.realpath(folder) for folder in FOLDERS.split(":"))


def note(event: str, what: object) -> None:
    os.write(record, f"{event} {what!r}\n".encode())


def check_path(event: str, path: object) -> None:
    if isinstance(path, (str, bytes, os.PathLike)):
        where = os.path.realpath(os.fsdecode(path))
        if not (where + "/").startswith(tuple(f"{folder}/" for folder in allowed)) and where != "/dev/null":
            note(event, where)


def watch(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = args[1] if event in ("socket.connect", "socket.sendto") else args
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(address, tuple) and not str(host).startswith(LOOPBACK):
            note(event, address)
            raise PermissionError(f"No network here: {event} {address}.")
    elif event == "open":
        mode, flags = args[1], args[2]
        writing = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
        if writing or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            check_path(event, args[0])
    elif event in FILE_EVENTS:
        folder = args[-1] if event in ("os.remove", "os.rmdir") else -1  # a descriptor that the path is relative to
        for path in args[: FILE_EVENTS[event]]:
            check_path(event, path if folder == -1 else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        note(event, args[:2])
    elif event == "pickle.find_class" and not from_a_worker():
        note(event, args)


def from_a_worker() -> bool:
    """Whether the pickle being read came through a queue between this process and its workers."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "multiprocessing.queues":
        frame = frame.f_back
    return frame is not None


import torch  # noqa: E402, F401  (its CUDA build runs `ldconfig -p` when it is imported, which is none of our doing)

sys.addaudithook(watch)
sys.argv = ARGUMENTS
runpy.run_path(ARGUMENTS[0], run_name="__main__")
