"""Groups: which parameters train, and at which rate.

A group sees every trained parameter with its declared role, and sets the options of its optimizer
group. A method that only tells A from B needs `sides`, not a `pair`: the roles are enough.

To add one: copy `loraplus.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.interfaces import Trained
from lorica.methods.choice import Choice

# Any: rates and flags, parameters, and a rule's own hyperparameters, as torch's groups hold them.
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AbstractGroup(Choice, abc.ABC):
    axis: ClassVar[str] = "groups"
    experts: ClassVar[bool] = True
    freezes: ClassVar[frozenset[str]] = frozenset()  # roles that stay at their start

    def adjust(self, trained: Trained, options: Options) -> Options:
        """`lr`, `weight_decay` and others of this parameter's optimizer group; here unchanged."""
        return options

    def sets_options(self) -> bool:
        """Whether it acts through an optimizer's groups, which must then be made from the recipe;
        freezing alone does not."""
        return type(self).adjust is not AbstractGroup.adjust


def options_of(
    trained: Trained, choices: Sequence[AbstractGroup], lr: float, weight_decay: float
) -> Options:
    """Options of one parameter's optimizer group.

    Weight decay leaves out vectors (norms, biases), and magnitudes and diagonals: one that is
    pulled to 0 takes its row or rank with it.
    """
    options: Options = {"lr": lr, "weight_decay": weight_decay}
    if trained.parameter.ndim < 2 or trained.role in ("magnitude", "diagonal", "bias"):
        options["weight_decay"] = 0.0
    for choice in choices:
        options = choice.adjust(trained, options)
    return options


def grouped(
    trained: Iterable[Trained], choices: Sequence[AbstractGroup], lr: float, weight_decay: float
) -> list[Options]:
    """Optimizer groups, one for each set of options."""
    groups: dict[tuple[tuple[str, object], ...], Options] = {}
    for t in trained:
        options = options_of(t, choices, lr, weight_decay)
        group = groups.setdefault(tuple(sorted(options.items())), {"params": [], **options})
        group["params"].append(t.parameter)
    return list(groups.values())


def at_own_rate(
    groups: Iterable[Options], trained: Iterable[Trained], modules_lr: float | None
) -> list[Options]:
    """The same optimizer groups, but modules that train in full get groups of their own with the
    rate `modules_lr`, where that is given.

    Raises:
        ValueError: a rate for such modules where none trains.
    """
    if modules_lr is None:
        return [*groups]
    if not (modules := {id(t.parameter) for t in trained if t.role == "module"}):
        raise ValueError(
            f"a rate of {modules_lr:g} for the modules that train in full, and none does; name"
            " some in `modules_to_save`, or leave the rate out"
        )
    out: list[Options] = []
    for group in groups:
        for own in (False, True):
            if params := [p for p in group["params"] if (id(p) in modules) is own]:
                out.append({**group, "params": params, **({"lr": modules_lr} if own else {})})
    return out
