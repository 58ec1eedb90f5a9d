"""Groups: who trains, and at which rate.

A group sees every trained parameter with its declared role, and adjusts the options of its
optimizer group. One that speaks of A and B needs `sides`, not a `pair`: roles are enough for it.
To add one: copy `loraplus.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lorica.rooms import Choice


@dataclass(frozen=True)
class Trained:
    """One trained parameter, as its owner declares it."""

    name: str  # path in the model
    parameter: nn.Parameter
    # "A", "B", "diagonal", "core", "magnitude"; a target's own "weight" and "bias"; "module": of
    # one that trains in full beside the targets
    role: str
    site: str  # path of the layer it belongs to
    lookup: bool = False  # belongs to an adapted embedding


@dataclass(frozen=True, kw_only=True)
class AbstractGroup(Choice, abc.ABC):
    room: ClassVar[str] = "groups"
    freezes: ClassVar[frozenset[str]] = frozenset()  # roles that stay at their start

    def adjust(self, trained: Trained, options: dict[str, Any]) -> dict[str, Any]:
        """Options (`lr`, `weight_decay`) of this parameter's optimizer group; default: as they
        are."""
        return options


def options_of(
    trained: Trained, choices: Sequence[AbstractGroup], lr: float, weight_decay: float
) -> dict[str, Any]:
    """Options of one parameter's optimizer group. Decay spares vectors (norms, biases) and what
    scales others: a magnitude or a diagonal pulled to 0 takes its row or rank with it."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if trained.parameter.ndim < 2 or trained.role in ("magnitude", "diagonal", "bias"):
        options["weight_decay"] = 0.0
    for choice in choices:
        options = choice.adjust(trained, options)
    return options


def grouped(
    trained: Iterable[Trained], choices: Sequence[AbstractGroup], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, one for each set of options."""
    groups: dict[tuple, dict[str, Any]] = {}
    for t in trained:
        options = options_of(t, choices, lr, weight_decay)
        group = groups.setdefault(tuple(sorted(options.items())), {"params": [], **options})
        group["params"].append(t.parameter)
    return list(groups.values())


def at_own_rate(
    groups: Iterable[dict[str, Any]], parameters: Iterable[nn.Parameter], lr: float
) -> list[dict[str, Any]]:
    """The same optimizer groups, but `parameters` stand apart and learn at `lr`."""
    chosen, out = {id(p) for p in parameters}, []
    for group in groups:
        for own in (False, True):
            if params := [p for p in group["params"] if (id(p) in chosen) is own]:
                out.append({**group, "params": params, **({"lr": lr} if own else {})})
    return out
