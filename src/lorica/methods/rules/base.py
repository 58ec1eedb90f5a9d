"""Rules: how a gradient becomes a step.

A rule builds an ordinary `torch.optim.Optimizer` from parameter groups, so schedulers, checkpoints,
gradient clipping, Accelerate and the Trainer work unchanged. To use an optimizer of torch's, copy
`adamw.py`. A rule that sees both factors of a pair is a `PairRule` of `_engine.py`, with
`update(stack, state, shared)` over pairs of equal shape and, if it has to look at all pairs first,
`prepare(stacks)`: copy `riemannian.py`.

The suite checks every file for this: it equals its twin; a resumed run equals an uninterrupted one;
a zero rate changes nothing; a missing gradient is no step; the state has the declared size; memory
does not grow.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike
from lorica.methods.choice import Choice
from lorica.methods.groups.base import Options, grouped


class TrainerArguments(Protocol):
    """What a rule reads of transformers' `TrainingArguments`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # Any: fields of every type

    @property
    def optim(self) -> object:
        """An enum's member, or its value."""
        ...

    @property
    def adam_beta1(self) -> float: ...

    @property
    def adam_beta2(self) -> float: ...

    @property
    def adam_epsilon(self) -> float: ...


# Key in an optimizer's `defaults`, which its copies keep and its checkpoints do not hold.
_MARK = "lorica_rule"


@dataclass(frozen=True, kw_only=True)
class AbstractRule(Choice, abc.ABC):
    axis: ClassVar[str] = "rules"
    # Whether any torch optimizer over the trained parameters is as good: the method asks for none.
    any_optimizer: ClassVar[bool] = False
    trainer_names: ClassVar[frozenset[str]] = frozenset()  # values of `--optim` that mean this rule
    state_per_element: ClassVar[int] = 0  # float32 state elements per trained element, about

    def groups(self, adapters: AdaptersLike, lr: float, weight_decay: float) -> list[Options]:
        """Optimizer groups of all that trains."""
        return grouped(adapters.trained(), adapters.recipe.groups, lr, weight_decay)

    def make(self, groups: list[Options], options: Options) -> torch.optim.Optimizer:
        """The optimizer that `build` gives, marked as this rule's."""
        optimizer = self.build(groups, options)
        optimizer.defaults[_MARK] = self.text()
        return optimizer

    def made(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer moves parameters by this rule."""
        return self.any_optimizer or self.keeps_state_of(optimizer)

    def keeps_state_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `make` made it, so that its state is what `state_shapes` says."""
        return optimizer.defaults.get(_MARK) == self.text()

    @abc.abstractmethod
    def build(self, groups: list[Options], options: Options) -> torch.optim.Optimizer:
        """Make the optimizer. `options` (betas, eps, fused) are the caller's, e.g. the
        Trainer's."""

    def state_shapes(self, group: Options, parameter: Tensor) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what the optimizer keeps for a parameter of this group, by name, `()` for a
        scalar: a checkpoint with others is refused. Names that are left out may be of any shape."""
        return {}

    def options_from(self, args: TrainerArguments) -> Options:
        """`options` of `build` out of the Trainer's arguments. Where one was set and has no effect,
        `build` raises the error."""
        return {}

    def state_elements(self, adapters: AdaptersLike) -> int:
        """How many elements of state the optimizer will keep, scalar tensors not counted."""
        return self.state_per_element * sum(t.parameter.numel() for t in adapters.trained())
