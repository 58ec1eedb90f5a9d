"""Ranks and alphas by pattern, PEFT's `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import RecipeLike
from lorica.methods.ranks.base import AbstractRank, first_match


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
            for pattern in patterns:
                if not any(first_match({pattern: 0}, name) for name in names):
                    raise ValueError(
                        f"`{field}` has {pattern!r}, which matches none of the {len(names)} target"
                        " modules; a pattern matches the end of a module path, whole components of"
                        f" it, e.g. of {names[0]!r}"
                    )
        out: dict[str, tuple[int, float | None]] = {}
        for name in names:
            rank, alpha = first_match(ranks, name), first_match(alphas, name)
            out[name] = (
                r if rank is None else ranks[rank],
                recipe.lora_alpha if alpha is None else alphas[alpha],
            )
        return out
