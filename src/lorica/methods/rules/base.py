"""Rules: how a gradient becomes an update.

A rule builds an ordinary `torch.optim.Optimizer` from parameter groups, so schedulers, checkpoints,
gradient clipping, Accelerate and the Trainer work unchanged. A rule that is torch's own copies
`adamw.py`. One that sees the factors of a pair together copies `riemannian.py`: it is a `PairRule`
of `_engine.py`, with `update(stack, state, shared)` over pairs of equal shape and, where it needs a
look at all pairs first, `prepare(stacks)`.

The suite holds every file to: it equals its twin; a resumed run is the straight run; a zero rate
moves nothing; a missing gradient is no step; the state has the declared size; nothing grows.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorica.methods.choice import Choice
from lorica.methods.groups.base import grouped


@dataclass(frozen=True, kw_only=True)
class AbstractRule(Choice, abc.ABC):
    axis: ClassVar[str] = "rules"
    trainer_names: ClassVar[frozenset[str]] = frozenset()  # values of `--optim` that mean this rule
    state_per_element: ClassVar[int] = 0  # float32 state elements per trained element, about

    def groups(self, adapters: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of all that trains."""
        return grouped(adapters.trained(), adapters.recipe.groups, lr, weight_decay)

    @abc.abstractmethod
    def build(
        self, groups: list[dict[str, Any]], options: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """Make the optimizer. `options` (betas, eps, fused) are the caller's, e.g. the
        Trainer's."""

    def options_from(self, args: Any) -> dict[str, Any]:
        """`options` of `build` out of the Trainer's arguments; an argument that was asked for and
        has no effect is for `build` to refuse."""
        return {}

    def state_elements(self, adapters: Any) -> int:
        """How many numbers the optimizer will keep, tensors of one number aside."""
        return self.state_per_element * sum(t.parameter.numel() for t in adapters.trained())
