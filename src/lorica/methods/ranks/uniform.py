"""Every layer has the recipe's rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorica.interfaces import RecipeLike
from lorica.methods.ranks.base import AbstractRank


@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractRank):
    """One rank for all layers.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora").rank.name
        'uniform'
    """

    def assign(
        self, names: Sequence[str], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        r = recipe.r
        assert r is not None  # a recipe of adapters has a rank
        return {name: (r, recipe.lora_alpha) for name in names}
