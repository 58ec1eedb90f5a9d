"""Refuses an optimizer that trains adapters without the schedules, rule and rates of their recipe.

`lorica.attach` announces adapters whose recipe needs more than a plain optimizer; binding them to
one takes them off the list. While the list is not empty, every optimizer's step looks at it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorica.model.adapters import Adapters
from lorica.recipe.recipe import Recipe

_unbound: weakref.WeakSet[Adapters] = weakref.WeakSet()
_watching = False


def expect(adapters: Adapters) -> None:
    """From now on an optimizer that holds parameters of these adapters must be bound to them if
    the recipe needs it: its step is an error until then."""
    global _watching
    if _in_need(adapters.recipe):
        if not _watching:
            register_optimizer_step_pre_hook(_refuse)
            _watching = True
        _unbound.add(adapters)


def discard(adapters: Adapters) -> None:
    """They are bound to an optimizer now, or have left their model."""
    _unbound.discard(adapters)


def _in_need(recipe: Recipe, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """The parts of a method that would not act with this optimizer, or with any plain one."""
    names = [schedule.name for schedule in recipe.schedules]
    plain = recipe.rule.any_optimizer if optimizer is None else recipe.rule.made(optimizer)
    names += [] if plain else [recipe.rule.name]
    return names + [group.name for group in recipe.groups if group.sets_options()]


def _refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # Any: the step's own arguments
    if not _unbound:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapters in list(_unbound):
        needing = _in_need(adapters.recipe, optimizer)
        if needing and any(id(t.parameter) in held for t in adapters.trained()):
            names = ", ".join(f"`{name}`" for name in needing)
            raise ValueError(
                f"this {type(optimizer).__name__} trains adapters of `{adapters.recipe.text()}`,"
                f" but {names} would not act with it: make the optimizer with"
                " `lorica.optimizer(adapters, ...)`, train with `lorica.run.Trainer` (or"
                " `TrainerMixin` before a Trainer of your own), or hand it to"
                " `lorica.training.bind.bind`"
            )
