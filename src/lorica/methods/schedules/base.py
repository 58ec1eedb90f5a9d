"""Schedules: what changes between optimizer steps.

A schedule is a frozen dataclass of hyperparameters. Everything that changes is in the `state` dict
that it is handed: numbers, strings and tensors of fixed shape, with the keys that `init` sets. It
runs in the optimizer's step hooks (`lorica.training.bind`), so a plain loop and the Trainer run and
save it in the same way. It never indexes, fills or sums a parameter itself: it calls `merge_` and
`swap_` of the `training` object and the functions of `lorica.tensors.dtensor_ops`, which work on
plain and on sharded tensors. Random draws come from `training.generator()`.

From `total_steps` on, where that is given, a schedule holds its end state: no further events, and
the rate that its curve ends at. A loop that runs a step too long must not ruin the result.

The suite checks every file for this: a plain loop equals the Trainer bit for bit; a resumed run
equals an uninterrupted one bit for bit; an event that declares `keeps_function` keeps the model's
function; the state loads with `weights_only`; nothing happens past the horizon.

To add one: copy `raclora.py` (restarts) or `sora.py` (changes A and B).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.interfaces import AdaptersLike, LayerLike, Pair, TrainingLike
from lorica.methods.choice import Choice

if TYPE_CHECKING:
    from typing_extensions import Self

# Any: numbers, strings, tensors of fixed shape and dicts of them, as each schedule needs them.
State = dict[str, Any]


def is_over(training: TrainingLike) -> bool:
    """Whether this step lies past the horizon: the run was planned to end before it."""
    return training.total_steps is not None and training.step >= training.total_steps


def is_last(training: TrainingLike) -> bool:
    """Whether this is the last step of the run, or lies past it."""
    return training.total_steps is not None and training.step + 1 >= training.total_steps


def pair_of(layer: LayerLike) -> Pair:
    """The pair of a layer under a schedule that needs one."""
    pair = layer.update.delta.pair()
    assert pair is not None, "declare `needs = {'pair'}`"
    return pair


@dataclass(frozen=True, kw_only=True)
class AbstractSchedule(Choice, abc.ABC):
    axis: ClassVar[str] = "schedules"
    edits: ClassVar[frozenset[str]] = frozenset()  # of "base", "pair", "rank", "gradient mask"

    def fit(self, total_steps: int | None) -> Self:
        """Fill what was left out from the horizon.

        Raises:
            ValueError: a given interval that never fires.
        """
        return self

    def plan(self, total_steps: int | None) -> str:
        """What will happen when, for people; asked of what `fit` returned."""
        return ""

    def final_from(self, total_steps: int | None) -> int:
        """After this many steps the weights are what the method promises, up to the end; asked of
        what `fit` returned.

        Before that a lower loss is no reason to keep them: a model that still uses what is being
        taken away is better, but is not what was asked for. Default 0: at any time.
        """
        return 0

    def state_bytes(self, adapters: AdaptersLike) -> int:
        """Bytes of its state, where that is more than a few numbers a layer."""
        return 0

    @abc.abstractmethod
    def init(self, adapters: AdaptersLike) -> State:
        """The initial state; touches no weight."""

    def before_step(self, state: State, training: TrainingLike) -> None:  # noqa: B027
        """Gradients are present and clipped."""

    def after_step(self, state: State, training: TrainingLike) -> None:  # noqa: B027
        """Parameters have moved, gradients are still present."""

    def restarted(self, state: State, layers: Sequence[str]) -> None:  # noqa: B027
        """The updates of these layers were merged, and fresh ones train in their place: forget what
        `state` holds about the old vectors. See `Training.restarted`."""

    def restore(self, state: State, training: TrainingLike) -> None:  # noqa: B027
        """Called after `init` and after loading: freeze what was frozen when `state` was saved, and
        let the others train. Touches no weight."""
