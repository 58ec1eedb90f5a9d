"""Schedules: what changes between optimizer steps.

A schedule is a frozen dataclass of hyperparameters; all that changes lives in the `state` dict it
is handed: numbers, strings and tensors of fixed shape, its keys fixed by `init`. It rides on the
optimizer (`lorica.bind`), so a plain loop and the Trainer run the same steps and save the same
state. It never indexes, fills or sums a parameter itself: the verbs of `lorica.moves` do, on plain
and on sharded tensors. Random draws come from `training.generator()`.

The suite holds every file to: plain loop equals Trainer bit for bit; resume equals the straight run
bit for bit; an event that declares `keeps_function` keeps it; the state loads with `weights_only`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.rooms import Choice


@dataclass(frozen=True, kw_only=True)
class AbstractSchedule(Choice, abc.ABC):
    room: ClassVar[str] = "schedules"
    edits: ClassVar[frozenset[str]] = frozenset()  # of "base", "pair", "rank", "gradient mask"

    def fit(self, total_steps: int | None) -> AbstractSchedule:
        """Fill what was left out from the horizon; a given interval that never fires is a
        ValueError."""
        return self

    @abc.abstractmethod
    def init(self, adapters: Any) -> dict[str, Any]:
        """The initial state; touches no weight."""

    def before_step(self, state: dict[str, Any], training: Any) -> None:  # noqa: B027
        """Gradients are present and clipped."""

    def after_step(self, state: dict[str, Any], training: Any) -> None:  # noqa: B027
        """Parameters have moved, gradients are still present."""

    def restore(self, state: dict[str, Any], adapters: Any) -> None:  # noqa: B027
        """Called after loading; leaves the layers as they were when `state` was saved."""
