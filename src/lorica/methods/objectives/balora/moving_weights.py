"""Weights of penalties that follow the run, in fractions p of it.

    one falls:       f + (1 − f)(1 + cos πp)/2
    others come in:  (p − wait)/ramp, held in [0, 1]

An objective does not see the step, so a schedule of the same file counts it, and leaves the two
factors of now with the adapters: a mirror of the schedule's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lorica.methods.choice import Choice
from lorica.methods.schedules.base import AbstractSchedule


def factors(choice: Choice, adapters: Any) -> tuple[float, float]:
    """(of what falls, of what comes in) at this step; ones where the recipe has no such schedule.

    Raises:
        ValueError: no optimizer is bound to `adapters`, so nobody counts.
    """
    words = [s.name for s in adapters.recipe.schedules if isinstance(s, MovingWeights)]
    if not words:
        return 1.0, 1.0
    if words[0] not in adapters.signals:
        raise ValueError(
            f"the weights of `{choice.text()}` follow the run, and no optimizer is bound to these"
            " adapters yet; make it with `lorica.optimizer(adapters, total_steps=...)` before the"
            " first loss"
        )
    return adapters.signals[words[0]]


def check_number(choice: Choice, name: str, least: float, most: float = math.inf) -> None:
    """ValueError unless the argument is a finite number in [least, most], whole where `least` is
    an int, or None where that is the default."""
    value: Any = getattr(choice, name)
    default = type(choice).__dataclass_fields__[name].default
    whole = isinstance(least, int)
    fits = (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )
    if not fits and (value is not None or default is not None):
        raise ValueError(
            f"`{choice.text()}`: `{name}` is a {'whole ' if whole else ''}number of at least"
            f" {least:g}"
            + (f" and at most {most:g}" if most < math.inf else "")
            + f"; its default: `{name}={default!r}`"
        )


@dataclass(frozen=True, kw_only=True)
class MovingWeights(AbstractSchedule):
    """`floor`, `wait`, `ramp`: numbers in [0, 1], the last two together below 1."""

    floor: float = 0.1
    wait: float = 0.2
    ramp: float = 0.05

    def __post_init__(self) -> None:
        for name in ("floor", "wait", "ramp"):
            check_number(self, name, 0.0, 1.0)
        if self.wait + self.ramp >= 1:
            raise ValueError(
                f"`{self.text()}` reaches the whole weights after the run; `wait` and `ramp` are"
                " parts of it, together below 1"
            )

    def fit(self, total_steps: int | None) -> AbstractSchedule:
        if total_steps is None and self != type(self)(floor=1, wait=0, ramp=0):
            raise ValueError(
                f"`{self.name}` changes its weights over the run, and this one has no horizon; give"
                " `total_steps` to `lorica.optimizer`, or hold them constant: beside the word"
                f" `{type(self)(floor=1, wait=0, ramp=0).text()}`"
            )
        return self

    def plan(self, total_steps: int | None) -> str:
        if not total_steps:
            return "constant weights"
        first, last = (math.ceil(p * total_steps) for p in (self.wait, self.wait + self.ramp))
        return f"λ₁ falls to {self.floor:g}·λ₁; λ₂, λ₃ from step {first}, in full from {last} on"

    def at(self, part: float) -> tuple[float, float]:
        """What λ₁, and λ₂ with λ₃, are multiplied with once this part of the run is over."""
        rise = (part - self.wait) / self.ramp if self.ramp else float(part >= self.wait)
        falls = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * part)) / 2
        return falls, min(max(rise, 0.0), 1.0)

    def init(self, adapters: Any) -> dict[str, Any]:
        if all(objective.name != self.name for objective in adapters.recipe.objectives):
            raise ValueError(f"`{self.text()}` has no effect without `{self.name}`; leave it out")
        falls, comes = self.at(0.0)
        return {"falls": falls, "comes": comes}

    def after_step(self, state: dict[str, Any], training: Any) -> None:
        part = (training.step + 1) / training.total_steps if training.total_steps else 0.0
        state["falls"], state["comes"] = self.at(part)
        self.restore(state, training)

    def restore(self, state: dict[str, Any], training: Any) -> None:
        training.adapters.signals[self.name] = state["falls"], state["comes"]
