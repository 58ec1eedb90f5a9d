"""What a signal leaves of a run: an exit with the number that shells give it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal ended the work. Uncaught, the process exits with 128 + its number, without a
    traceback.

    Args:
        number: the signal.
        step: the last step that was taken, where a checkpoint of it was written.
        checkpoint: that checkpoint.
    """

    def __init__(
        self, number: int, step: int | None = None, checkpoint: Path | None = None
    ) -> None:
        super().__init__(128 + number)
        self.number, self.step, self.checkpoint = number, step, checkpoint
        self.how = ""  # what else to say: how to go on

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.checkpoint is None:
            return f"stopped by {name}{self.how}"
        return f"stopped by {name} after step {self.step}; {self.checkpoint} is written{self.how}"


def in_main_thread() -> bool:
    """Whether this is the thread that may set handlers, and in which they are called."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within this context SIGTERM and SIGINT raise `Stopped`, so that what is unfinished is cleared
    away; in other threads than the main one nothing changes.

    Python swallows what is raised within a finaliser, so the signal is also noted: `check_stopped`
    and the end of this context raise what was lost."""
    if not in_main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        _caught.append(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
        check_stopped()
    finally:
        _caught.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


_caught: list[int] = []


def check_stopped() -> None:
    """Raise `Stopped` for a signal that came and was swallowed."""
    if _caught:
        raise Stopped(_caught[0])
