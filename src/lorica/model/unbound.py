"""Refuses an optimizer that trains adapters without the schedules of their recipe.

`lorica.attach` announces adapters whose recipe needs more than a plain optimizer; binding them to
one takes them off the list. While the list is not empty, every optimizer's step looks at it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorica.model.adapters import Adapters

_unbound: weakref.WeakSet[Adapters] = weakref.WeakSet()
_watching = False


def expect(adapters: Adapters) -> None:
    """From now on an optimizer that holds parameters of these adapters must be bound to them if
    the recipe has schedules: its step is an error until then."""
    global _watching
    if adapters.recipe.schedules:
        if not _watching:
            register_optimizer_step_pre_hook(_refuse)
            _watching = True
        _unbound.add(adapters)


def discard(adapters: Adapters) -> None:
    """They are bound to an optimizer now."""
    _unbound.discard(adapters)


def _refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # Any: the step's own arguments
    if not _unbound:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapters in list(_unbound):
        if any(id(t.parameter) in held for t in adapters.trained()):
            names = ", ".join(f"`{schedule.name}`" for schedule in adapters.recipe.schedules)
            raise ValueError(
                f"this {type(optimizer).__name__} trains adapters of `{adapters.recipe.text()}`,"
                f" but {names} does not run on it and would never act: make the optimizer with"
                " `lorica.optimizer(adapters, ...)`, train with `lorica.run.Trainer` (or"
                " `TrainerMixin` before a Trainer of your own), or hand it to"
                " `lorica.training.bind.bind`"
            )
