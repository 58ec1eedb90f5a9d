"""The recipe that a run's options ask for, and what of the Trainer's options depends on it.

`lorica.recipe` is imported inside the functions, as it finds the methods by walking their files.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lorica.run.options import RunOptions, UsageError
from lorica.run.options.checks import refuse

if TYPE_CHECKING:
    from lorica.recipe.recipe import Recipe


def recipe_of(options: RunOptions, **more: Any) -> Recipe:
    """The recipe that the options ask for.

    Args:
        more: fields of `Recipe` that the verb decides.

    Raises:
        UsageError: there is none.
    """
    from lorica.recipe.recipe import Recipe

    try:
        return Recipe.parse(
            options.method or {}, seed=options.seed, **options.recipe_fields(), **more
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def curved(recipe: Recipe, name: str, warmup_steps: int) -> Recipe:
    """The same with the rate curve of this name, where one of its schedules brings it."""
    from lorica.methods.optional import BringsCurves

    schedules = [
        s.with_curve(name, warmup_steps)
        if isinstance(s, BringsCurves) and name in s.lr_scheduler_types
        else s
        for s in recipe.schedules
    ]
    return dataclasses.replace(recipe, schedules=tuple(schedules))


def curves(recipe: Recipe | None) -> list[str]:
    """The rate curves that the recipe's schedules bring: names for `--lr-scheduler-type`."""
    from lorica.methods.optional import BringsCurves

    schedules = () if recipe is None else recipe.schedules
    return [n for s in schedules if isinstance(s, BringsCurves) for n in s.lr_scheduler_types]


def check_optim(options: RunOptions, recipe: Recipe) -> None:
    """Check that `--optim` is a kind of the method's own rule.

    Raises:
        UsageError: it is another.
    """
    from lorica.methods.optional import RefusesOptim

    rule, optim = recipe.rule, options.further.get("optim")
    if optim is None:
        return
    if isinstance(rule, RefusesOptim) and optim in rule.trainer_refusals:
        raise UsageError(f"`--optim {optim}`: {rule.trainer_refusals[optim]}")
    refuse(
        optim not in rule.trainer_names,
        f"`--optim {optim}` is not the rule of the method `{recipe.text()}`, which is"
        f" `{rule.name}`; allowed: {', '.join(sorted(rule.trainer_names))}. Another rule is a word"
        " of the method (`lorica methods` lists them)",
    )
