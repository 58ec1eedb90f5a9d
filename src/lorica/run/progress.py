"""How far a run is, and how long it has to go, evaluations and checkpoints included."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lorica.text import clock

_WIDTH = 30  # of the bar, in characters


class Remaining:
    """Estimates the time that a run has left.

    Training time is proportional to the steps. Pauses, which are evaluations and checkpoints, come
    at places that are known beforehand, so the time of those to come is counted as well. Until the
    first one was measured its time is a guess.

    Args:
        first: the step that this process begins after.
        pause: a pause's time in steps, for the guess.

    Example:
        >>> left = Remaining(0)
        >>> left.stepped(20.0)                   # 20 seconds for 10 of 100 steps
        >>> left.paused(5.0, whole=True)         # and 5 for the first of 10 evaluations
        >>> left.seconds(10, 100, pauses=10)
        225.0
    """

    def __init__(self, first: int, pause: float = 0.0) -> None:
        self.first, self.pause = first, pause
        self.training = self.resting = 0.0  # seconds
        self.rests = 0  # pauses there have been

    def stepped(self, seconds: float) -> None:
        """Count time of training."""
        self.training += seconds

    def paused(self, seconds: float, *, whole: bool) -> None:
        """Count time of an evaluation or of a checkpoint.

        Args:
            whole: it is a pause of its own, not a part of the one before (the checkpoint that
                follows an evaluation).
        """
        self.resting += seconds
        self.rests += whole

    def seconds(self, done: int, last: int, *, pauses: int) -> float:
        """The time from step `done` to step `last`.

        Args:
            pauses: that this process makes in all.
        """
        step = self.training / max(done - self.first, 1)
        one = self.resting / self.rests if self.rests else self.pause * step
        return (last - done) * step + max(pauses - self.rests, 0) * one


def pauses(args: Any, first: int, last: int, epochs: float) -> int:
    """Evaluations after step `first` up to `last`; checkpoints, where a run does not evaluate.

    Args:
        args: the Trainer's, settled.
        epochs: that the whole run makes, for evaluations that go by them.
    """
    kind, every = args.eval_strategy, args.eval_steps
    if kind == "no":
        kind, every = args.save_strategy, args.save_steps
    if kind == "epoch":
        every = last / max(math.ceil(epochs), 1)
    elif kind != "steps":
        return 0
    if not every:
        return 0
    return math.ceil(last / every - 1e-9) - math.floor(first / every + 1e-9)


class Bar:
    """One line on a terminal that is drawn over; on anything else, nothing.

    Args:
        shown: whether standard error is one, and this process speaks.
    """

    def __init__(self, shown: bool) -> None:
        self.shown, self.drawn, self.last = shown, False, 0.0
        if shown:
            from rich.console import Console

            self.console = Console(file=sys.stderr, highlight=False)

    def draw(self, done: int, whole: int, words: str) -> None:
        """Show how much is done; at most ten times a second."""
        now = time.monotonic()
        if not self.shown or now - self.last < 0.1:
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        self.last, self.drawn = now, True
        row = Table.grid(padding=(0, 2))
        row.add_row(ProgressBar(total=whole, completed=done, width=_WIDTH), words)
        with self.console.capture() as captured:
            self.console.print(row, end="")
        print(f"\r\x1b[K{captured.get().rstrip()}", end="", file=sys.stderr)
        sys.stderr.flush()

    def clear(self) -> None:
        """Make room for a line of the log."""
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr)
            self.drawn = False


def left(seconds: float) -> str:
    """For the end of a line."""
    return f"{clock(seconds)} left"
