"""Runs other people's code, such as a chat template, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

try:
    import resource
except ImportError:  # not on Windows
    resource = None

PATIENCE = 5.0  # seconds of processor time
MEMORY = 128 << 20  # bytes that may come on top of what the process has
# What a call earns on an account. Published chat templates take 0.1 to 1 ms a conversation, and
# write up to some thousand characters on top of it.
SECONDS_PER_PART = 0.004
CHARACTERS_PER_SECOND = 250_000
WRITTEN_PER_PART = 20_000
WRITTEN_PER_GIVEN = 20


class Exceeded(Exception):
    """What ran was ended, or is: it had all its time, or wrote too much."""


@dataclass
class Account:
    """What many calls of the same code have used, against what calls of their size need.

    One call may take `PATIENCE` and write a lot; a data set of such calls would never end. So each
    call earns ten times and more of what calls of its size take, and all together may use that and
    what a single call may.

    Attributes:
        most: characters that a single call may write.
    """

    most: int
    _seconds: float = field(default=0.0, init=False)  # used beyond what was earned, at least 0
    _characters: float = field(default=0.0, init=False)

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """`bounded`, on this account: after a call that took all its time, the next has little."""
        began = time.thread_time()
        try:
            with bounded(max(PATIENCE - self._seconds, PATIENCE / 10)):
                yield
        finally:
            self._seconds += time.thread_time() - began

    def book(self, written: int, given: int, parts: int) -> str | None:
        """A call has ended; why there may be no more of them, or None.

        Args:
            written, given: characters that it wrote, and of what it was called with.
            parts: of what it was called with, e.g. messages.
        """
        allowed = WRITTEN_PER_PART * (1 + parts) + WRITTEN_PER_GIVEN * given
        earned = SECONDS_PER_PART * (1 + parts)
        earned += (min(written, allowed) + given) / CHARACTERS_PER_SECOND
        self._seconds = max(self._seconds - earned, 0.0)
        self._characters = max(self._characters + written - allowed, 0.0)
        if self._seconds > PATIENCE:
            return (
                f"it takes more than {SECONDS_PER_PART * 1000:g} ms a message again and again, so a"
                " data set of such conversations would not end"
            )
        if self._characters > self.most:
            return (
                f"it writes more than {WRITTEN_PER_PART:,} characters a message on top of what the"
                " messages hold, again and again"
            )
        return None


@contextlib.contextmanager
def bounded(seconds: float | None = None) -> Iterator[None]:
    """Within, what runs is ended after `seconds`, and can't have more than `MEMORY`.

    The time is bounded in the main thread, where the system has timers of processor time (not on
    Windows), and the memory on Linux.

    Args:
        seconds: of processor time. Default: `PATIENCE`.

    Raises:
        Exceeded: it took too long.
        MemoryError: it wanted too much.
    """
    with _timed(PATIENCE if seconds is None else seconds), _small():
        yield


@contextlib.contextmanager
def _timed(seconds: float) -> Iterator[None]:
    elsewhere = threading.current_thread() is not threading.main_thread()
    if sys.platform == "win32" or elsewhere:  # neither takes the signal of a timer
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise Exceeded(f"it has not ended after {seconds:.2g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        # Again and again, in case that what runs catches it.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
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
