"""Ends a run between two steps, with a checkpoint, where it is told to stop or where its launcher is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Set by `accelerate launch` and `torchrun`. Other parents may go: a run that was put into the background outlives its shell.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
FIRST_INTERRUPT = (
    b"\nThe run ends after this step, with a checkpoint. Press Ctrl-C again to end it at once; "
    b"resume_from_checkpoint=True then goes on from the last checkpoint.\n"
)


class Interrupted(Exception):
    """Raised between two steps by all processes of a run that has to end."""


class Interruption:
    """Why this process should stop.

    `watched()` is a context in which SIGTERM and the first SIGINT (Ctrl-C) are noted and do nothing else; a second SIGINT
    is a `KeyboardInterrupt` at once. Handlers of the user's own are left alone.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    @property
    def cause(self) -> str | None:
        """What happened, as a clause; `None` if nothing did."""
        if self.signal is not None:
            return f"the run was told to stop ({self.signal.name})"
        if self._launcher is not None and os.getppid() != self._launcher:
            return f"its launcher (process {self._launcher}) is gone"
        return None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        replaced = []
        with contextlib.suppress(ValueError):  # signals reach the main thread alone
            for number, handler in HANDLERS.items():
                if signal.getsignal(number) == handler:
                    signal.signal(number, self._note)
                    replaced.append(number)
        try:
            yield
        finally:
            for number in replaced:
                signal.signal(number, HANDLERS[number])

    def _note(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            with contextlib.suppress(OSError):
                os.write(2, FIRST_INTERRUPT)


def ignore_interrupts(worker: int) -> None:
    """For a loading worker: Ctrl-C and the signals of launchers and schedulers reach it too, and the run it loads for goes
    on to the end of its step. SIGTERM still ends it where the run itself sends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
