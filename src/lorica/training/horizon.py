"""The rule of what depends on the length of a run, and so of which runs can be lengthened."""

from __future__ import annotations

from lorica.methods.optional import FitsHorizon
from lorica.recipe.recipe import Recipe

_LEVEL = ("constant", "constant_with_warmup")  # curves that take no length


def fitted_method(recipe: Recipe) -> str:
    """What of a recipe is fitted to the number of steps, or holds its end state from there on; ""
    where nothing is.

    Every schedule counts: one with a given interval also leaves out the event that would fall on
    the last step.

    Example:
        >>> from lorica.recipe.recipe import Recipe
        >>> fitted_method(Recipe.parse("lora"))
        ''
    """
    if recipe.schedules:
        return f"the schedule of `{recipe.schedules[0].name}`"
    if isinstance(recipe.rule, FitsHorizon):
        return f"the intervals of `{recipe.rule.name}`"
    return ""


def fitted_curve(name: str, warmup: float) -> str:
    """What of a learning rate's curve is fitted to the number of steps; "" where nothing is.

    Args:
        name: transformers' name of the curve.
        warmup: steps in which the rate rises; below 1 a fraction of all steps.

    Example:
        >>> fitted_curve("cosine", 0.0)
        'the learning rate (`lr_scheduler_type` is cosine)'
    """
    if name not in _LEVEL:
        return f"the learning rate (`lr_scheduler_type` is {name})"
    if name != _LEVEL[0] and 0 < warmup < 1:
        return "the warm-up of the learning rate, a fraction of the steps"
    return ""
