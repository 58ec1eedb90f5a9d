"""What all experiments share: their parts, and what was seen of them.

An experiment is a file of this folder: what the paper says and in which setting it is tried, its
arms, its columns, `measure(arm, lr, seed)` that returns a number for each column, and
`effects(seen)` that says whether what the paper promises is there, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

import lorica


@dataclass(frozen=True)
class Arm:
    """A method at the rates of a small grid, with fields of the recipe and of the experiment."""

    method: str
    rates: tuple[float, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """As the results are filed: another arm is measured anew."""
        return f"{self.method} {dict(self.fields)} {dict(self.setting)}"


@dataclass(frozen=True)
class Column:
    """A measured number. `best`: `low` or `high` where a rate is better with such a value."""

    title: str
    best: str = ""


@dataclass(frozen=True)
class Effect:
    """What a paper promises, whether it was seen with each seed, and the reason where it was not
    in all of them."""

    what: str
    holds: Sequence[bool]
    why: str = ""

    def verdict(self) -> str:
        k, n = sum(self.holds), len(self.holds)
        return "appeared" if k == n else f"mixed: {k} of {n} seeds" if k else "did not appear"


class Experiment(Protocol):
    """The names in an experiment's file."""

    __doc__: str | None
    PAPER: str
    SETTING: str
    ARMS: dict[str, Arm]
    COLUMNS: dict[str, Column]
    CHOICE: str  # the column by whose mean an arm's rate is chosen; empty: each column by itself
    SEEDS: int
    measure: Callable[[Arm, float, int], dict[str, float]]
    effects: Callable[[Seen], Iterable[Effect]]


class Seen:
    """Results: {arm: {rate: {column: [a value for each seed]}}}, each arm at its best rate."""

    def __init__(self, one: Experiment, values: dict[str, dict[float, dict[str, list[float]]]]):
        self.one, self.values = one, values

    def rate(self, arm: str, column: str) -> float:
        """The one with the best mean."""
        by = self.one.CHOICE or column
        sign = {"low": 1, "high": -1}.get(self.one.COLUMNS[by].best)
        rates = self.values[arm]
        if sign is None:
            return next(iter(rates))
        return min(rates, key=lambda rate: sign * mean(rates[rate][by]))

    def each(self, arm: str, column: str) -> list[float]:
        return self.values[arm][self.rate(arm, column)][column]

    def mean(self, arm: str, column: str) -> float:
        return mean(self.each(arm, column))

    def at(self, arm: str, rate: float, column: str) -> list[float]:
        """By seed, at a given rate instead of the best."""
        return self.values[arm][rate][column]

    def below(self, a: str, b: str, column: str, factor: float = 1.0) -> list[bool]:
        """Whether a's value is under `factor` times b's, seed by seed."""
        pairs = zip(self.each(a, column), self.each(b, column), strict=True)
        return [x < factor * y for x, y in pairs]

    def above(self, a: str, b: str, column: str, factor: float = 1.0) -> list[bool]:
        pairs = zip(self.each(a, column), self.each(b, column), strict=True)
        return [x > factor * y for x, y in pairs]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def finite(value: float | Tensor) -> float:
    """What is not a number is as bad as infinity."""
    value = float(value)
    return math.inf if math.isnan(value) else value


CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
}


def train(
    adapters: lorica.Adapters,
    loss: Callable[[int], Tensor | tuple[Any, Any]],
    *,
    lr: float,
    steps: int,
    seed: int,
    curve: str = "constant",
    warmup: int = 0,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """The task's losses. `loss(step)` gives a loss, or the model's outputs and its batch."""
    optimizer = lorica.optimizer(adapters, lr=lr, total_steps=steps, seed=seed)

    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / (warmup + 1))
        return ramp * CURVES[curve](max(0, step - warmup) / max(1, steps - warmup))

    plain = curve == "constant" and not warmup
    rates = None if plain else torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for step in range(steps):
        given = loss(step)
        outputs, batch = given if isinstance(given, tuple) else ({"loss": given}, None)
        adapters.loss(outputs, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rates is not None:
            rates.step()
        if after is not None:
            after(step)
        losses.append(finite(outputs["loss"].detach()))
        if not losses[-1] < 1e9:
            break  # diverged
    return losses
