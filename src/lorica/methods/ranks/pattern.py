"""Ranks and alphas by pattern, PEFT's `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.methods.ranks.base import AbstractRank, first_match


@dataclass(frozen=True, kw_only=True)
class Pattern(AbstractRank):
    """`rank_pattern` and `alpha_pattern` over `r` and `lora_alpha`; taken by itself where either is
    given.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora", rank_pattern={"q_proj": 4}).rank.name
        'pattern'
    """

    reads_patterns: ClassVar[bool] = True
    implied: ClassVar[bool] = True

    def assign(self, names: Sequence[str], recipe: Any) -> dict[str, tuple[int, float | None]]:
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(recipe, field):
                if not any(first_match({pattern: 0}, name) for name in names):
                    raise ValueError(
                        f"`{field}` has {pattern!r}, which matches none of the {len(names)} target"
                        " modules; a pattern ends a module path on whole components, e.g."
                        f" {names[0]!r}"
                    )
        out = {}
        for name in names:
            rank, alpha = (
                first_match(recipe.rank_pattern, name),
                first_match(recipe.alpha_pattern, name),
            )
            out[name] = (
                recipe.rank_pattern[rank] if rank is not None else recipe.r,
                recipe.alpha_pattern[alpha] if alpha is not None else recipe.lora_alpha,
            )
        return out
