"""Weights of penalties that change over the run, p being the fraction that is over.

    one falls:        f + (1 − f)(1 + cos πp)/2
    the others rise:  (p − wait)/ramp, clamped to [0, 1]

An objective does not know the step, so a schedule of the same method counts it, and puts the two
present factors into `adapters.signals`, as a copy of the schedule's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lorica.interfaces import AdaptersLike, TrainingLike
from lorica.methods.choice import Choice
from lorica.methods.fields import number
from lorica.methods.schedules.base import AbstractSchedule, State


def factors(choice: Choice, adapters: AdaptersLike) -> tuple[float, float]:
    """The falling and the rising factor at this step; ones where the recipe has no such schedule.

    Raises:
        ValueError: no optimizer is bound to `adapters`, so no schedule counts the steps.
    """
    names = [s.name for s in adapters.recipe.schedules if isinstance(s, MovingWeights)]
    if not names:
        return 1.0, 1.0
    if names[0] not in adapters.signals:
        raise ValueError(
            f"the weights of `{choice.text()}` change over the run, and no optimizer is bound to"
            " these adapters yet; make it with `lorica.optimizer(adapters, total_steps=...)` before"
            " the first loss"
        )
    return adapters.signals[names[0]]


@dataclass(frozen=True, kw_only=True)
class MovingWeights(AbstractSchedule):
    """`floor`, `wait`, `ramp`: fractions in [0, 1], the last two together below 1."""

    floor: float = 0.1
    wait: float = 0.2
    ramp: float = 0.05

    def __post_init__(self) -> None:
        for name in ("floor", "wait", "ramp"):
            number(self, name, least=0, most=1, say=f"a number in [0, 1], e.g. `{name}=0.1`")
        if self.wait + self.ramp >= 1:
            raise ValueError(
                f"`{self.text()}` reaches the full weights only after the run; `wait` and `ramp`"
                " are fractions of it, together below 1, e.g. `wait=0.2, ramp=0.05`"
            )

    def fit(self, total_steps: int | None) -> AbstractSchedule:
        if total_steps is None and self != type(self)(floor=1, wait=0, ramp=0):
            raise ValueError(
                f"`{self.name}` changes its weights over the run, whose length is not known; give"
                " `total_steps` to `lorica.optimizer`, or keep the weights constant: add"
                f" `{type(self)(floor=1, wait=0, ramp=0).text()}` to the method"
            )
        return self

    def plan(self, total_steps: int | None) -> str:
        if not total_steps:
            return "constant weights"
        first, last = (math.ceil(p * total_steps) for p in (self.wait, self.wait + self.ramp))
        return f"λ₁ falls to {self.floor:g}·λ₁; λ₂, λ₃ from step {first}, in full from {last} on"

    def at(self, part: float) -> tuple[float, float]:
        """The factors of λ₁, and of λ₂ and λ₃, when this fraction of the run is over."""
        rise = (part - self.wait) / self.ramp if self.ramp else float(part >= self.wait)
        falls = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * part)) / 2
        return falls, min(max(rise, 0.0), 1.0)

    def init(self, adapters: AdaptersLike) -> dict[str, Any]:  # Any: as the axis declares it
        if all(objective.name != self.name for objective in adapters.recipe.objectives):
            raise ValueError(f"`{self.text()}` has no effect without `{self.name}`; leave it out")
        falls, comes = self.at(0.0)
        return {"falls": falls, "comes": comes}

    # Any: as the axis declares it
    def after_step(self, state: State, training: TrainingLike) -> None:
        part = (training.step + 1) / training.total_steps if training.total_steps else 0.0
        state["falls"], state["comes"] = self.at(part)
        self.restore(state, training)

    # Any: as the axis declares it
    def restore(self, state: State, training: TrainingLike) -> None:
        training.adapters.signals[self.name] = state["falls"], state["comes"]
