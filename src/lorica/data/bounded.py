"""Runs other people's code, such as a chat template, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

try:
    import resource
except ImportError:  # not on Windows
    resource = None

PATIENCE = 5.0  # seconds of processor time
MEMORY = 1 << 30  # bytes that may come on top of what the process has


class Exceeded(Exception):
    """What ran was ended: it had all its time."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within, what runs is ended after `PATIENCE`, and can't have more than `MEMORY`.

    The time is bounded in the main thread, where the system has timers of processor time (not on
    Windows), and the memory on Linux.

    Raises:
        Exceeded: it took too long.
        MemoryError: it wanted too much.
    """
    with _timed(), _small():
        yield


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    elsewhere = threading.current_thread() is not threading.main_thread()
    if sys.platform == "win32" or elsewhere:  # neither takes the signal of a timer
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise Exceeded

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        # Again and again, in case that what runs catches it.
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE, 0.1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _small() -> Iterator[None]:
    most = None if resource is None else _address_space()
    if resource is None or most is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most + MEMORY, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes of this process's address space; None where the system does not say."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(40).split()[0]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None
