"""Ranks and alphas by pattern, PEFT's `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import RecipeLike
from lorica.methods.ranks.base import ENDS, AbstractRank, first_matches
from lorica.patterns import find
from lorica.text import shorten


@dataclass(frozen=True, kw_only=True)
class Pattern(AbstractRank):
    """`rank_pattern` and `alpha_pattern` override `r` and `lora_alpha`; the default where either is
    given.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora", rank_pattern={"q_proj": 4}).rank.name
        'pattern'
    """

    reads_patterns: ClassVar[bool] = True
    implied: ClassVar[bool] = True

    def assign(
        self, names: Sequence[str], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        ranks, alphas, r = recipe.rank_pattern, recipe.alpha_pattern, recipe.r
        assert r is not None  # a recipe of adapters has a rank
        for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            for pattern, ended in find(patterns, names, form=ENDS).items():
                if not ended:
                    raise ValueError(
                        f"`{field}` has {shorten(pattern)}, which matches none of the"
                        f" {len(names)} target modules; a pattern matches the end of a module path,"
                        f" whole components of it, e.g. of {names[0]!r}"
                    )
        of_rank, of_alpha = first_matches(ranks, names), first_matches(alphas, names)
        for field, patterns, found in (
            ("rank_pattern", ranks, of_rank), ("alpha_pattern", alphas, of_alpha)
        ):  # fmt: skip
            if idle := [pattern for pattern in patterns if pattern not in found.values()]:
                raise ValueError(
                    f"`{field}` has {shorten(idle[0])}, which has no effect: the first pattern that"
                    " matches a module counts, and all that this one matches have an earlier one."
                    " Put the narrower pattern first"
                )
        return {
            name: (
                ranks[of_rank[name]] if name in of_rank else r,
                alphas[of_alpha[name]] if name in of_alpha else recipe.lora_alpha,
            )
            for name in names
        }
