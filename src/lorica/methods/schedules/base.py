"""Schedules: what changes between optimizer steps.

A schedule is a frozen dataclass of hyperparameters. Everything that changes is in the `state` dict
that it is handed: numbers, strings and tensors of fixed shape, with the keys that `init` sets. It
runs in the optimizer's step hooks (`lorica.training.bind`), so a plain loop and the Trainer run and
save it in the same way. It never indexes, fills or sums a parameter itself: it calls `merge_` and
`swap_` of the `training` object and the functions of `lorica.tensors.dtensor_ops`, which work on
plain and on sharded tensors. Random draws come from `training.generator()`.

The suite checks every file for this: a plain loop equals the Trainer bit for bit; a resumed run
equals an uninterrupted one bit for bit; an event that declares `keeps_function` keeps the model's
function; the state loads with `weights_only`.

To add one: copy `raclora.py` (restarts) or `sora.py` (changes A and B).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.methods.choice import Choice


@dataclass(frozen=True, kw_only=True)
class AbstractSchedule(Choice, abc.ABC):
    axis: ClassVar[str] = "schedules"
    edits: ClassVar[frozenset[str]] = frozenset()  # of "base", "pair", "rank", "gradient mask"

    def fit(self, total_steps: int | None) -> AbstractSchedule:
        """Fill what was left out from the horizon; a given interval that never fires is a
        ValueError."""
        return self

    def plan(self, total_steps: int | None) -> str:
        """What will happen when, for people; asked of what `fit` returned."""
        return ""

    def final_from(self, total_steps: int | None) -> int:
        """After so many steps the weights are what the method promises, and stay so to the end;
        asked of what `fit` returned.

        Before that a lower loss is no reason to prefer them: a model that still leans on what is
        being taken away is better, and is not what was asked for. Default 0: at any time.
        """
        return 0

    def state_bytes(self, adapters: Any) -> int:
        """What its state holds, where that is more than some numbers a layer."""
        return 0

    @abc.abstractmethod
    def init(self, adapters: Any) -> dict[str, Any]:
        """The initial state; touches no weight."""

    def before_step(self, state: dict[str, Any], training: Any) -> None:  # noqa: B027
        """Gradients are present and clipped."""

    def after_step(self, state: dict[str, Any], training: Any) -> None:  # noqa: B027
        """Parameters have moved, gradients are still present."""

    def restarted(self, state: dict[str, Any], layers: Sequence[str]) -> None:  # noqa: B027
        """The updates of these layers were put away, and fresh ones train in their place: what
        `state` has learnt of the old vectors is to be forgotten. See `Training.restarted`."""

    def restore(self, state: dict[str, Any], training: Any) -> None:  # noqa: B027
        """Called after `init` and after loading: who rests and who trains as it was when `state`
        was saved. Touches no weight."""
