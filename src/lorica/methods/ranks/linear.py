"""Ranks that change linearly with depth, at a given mean.

    r_i = first + (last − first)·(i − 1)/(L − 1),   first + last = 2r,   i = 1..L

over the L transformer blocks of the targets, in model order; all layers of a block share r_i, and
layers outside of blocks have r. Rounded to the nearest integer; where the sum is then not L·r, the
blocks that were rounded furthest are corrected, by one rank each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lorica.interfaces import RecipeLike
from lorica.methods.fields import one_of, whole
from lorica.methods.ranks.base import AbstractRank, block_of


def spread(first: Fraction, last: Fraction, blocks: int, r: int) -> list[int]:
    """Whole ranks of at least 1 from `first` to `last`, r on average; for a single block: r."""
    if blocks == 1:
        return [r]
    exact = [first + (last - first) * i / (blocks - 1) for i in range(blocks)]
    ranks = [max(1, math.floor(x + Fraction(1, 2))) for x in exact]
    while (missing := blocks * r - sum(ranks)) != 0:
        sign = 1 if missing > 0 else -1
        free = [i for i in range(blocks) if ranks[i] + sign >= 1]
        ranks[max(free, key=lambda i: (sign * (exact[i] - ranks[i]), sign * i))] += sign
    return ranks


@dataclass(frozen=True, kw_only=True)
class Linear(AbstractRank):
    """Ranks that grow or shrink with depth: linear from `first` to `last`, r on average.

    The number of parameters is that of rank r everywhere, if every block has the same targets.

    Cost: nothing.
    When: deeper blocks need more rank, or less; as part of `prilora`.

    Args:
        first, last: ranks of the first and the last block, whole numbers of at least 1. Default r/2
            and 3r/2, the proportion of the paper's 4 and 12 around 8. If one is given, the other
            follows from r; if both are, r is their mean.
        scale: `mean` (default: every layer has the scale of rank r) or `own` (that of its own
            rank).

    Raises:
        ValueError: a first or last for which r would need the other to be below 1.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("linear", r=8)
        >>> ranks = recipe.rank.assign([f"layers.{i}.q_proj" for i in range(5)], recipe)
        >>> [r for r, _ in ranks.values()]
        [4, 6, 8, 10, 12]

    Reference:
        @inproceedings{benedek2024prilora,
          title = {PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation},
          author = {Benedek, Nadav and Wolf, Lior}, booktitle = {Findings of EACL}, year = {2024},
          eprint = {2401.11316}
        }
    """

    first: int | None = None
    last: int | None = None
    scale: str = "mean"

    def __post_init__(self) -> None:
        for end in ("first", "last"):
            say = f"a rank is a whole number of at least 1, e.g. `{end}=8`; left out, it follows"
            whole(self, end, optional=True, say=f"{say} from `r`")
        one_of(self, "scale", "mean", "own")
        if self.first is not None and self.last is not None:
            mean, odd = divmod(self.first + self.last, 2)
            if odd:
                raise ValueError(
                    f"`{self.text()}`: the mean, {mean}.5, is the recipe's `r` and must be whole;"
                    f" give e.g. `last={self.last + 1}`"
                )
            for name in ("default_r", "only_r"):
                object.__setattr__(self, name, mean)

    def assign(
        self, names: Sequence[str], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        r = recipe.r
        assert r is not None  # a recipe of adapters has a rank
        blocks = [*dict.fromkeys(b for n in names if (b := block_of(n)) is not None)]
        along = spread(*self._ends(r), len(blocks), r) if blocks else []
        ranks: dict[str | None, int] = {None: r, **dict(zip(blocks, along, strict=True))}
        given = {n: ranks[block_of(n)] for n in names}
        return {n: (own, self._alpha(own, r, recipe)) for n, own in given.items()}

    def _ends(self, r: int) -> tuple[Fraction, Fraction]:
        name, end = ("last", self.last) if self.first is None else ("first", self.first)
        if end is not None and end >= 2 * r:
            raise ValueError(
                f"`{self.text()}` at `r={r}`: {r} on average would leave the other end"
                f" {2 * r - end}; give `{name}` at most {max(2 * r - 1, 1)}, or a larger `r`"
            )
        low = max(Fraction(1), Fraction(r, 2))
        first = low if end is None else Fraction(self.first or 2 * r - end)
        return first, 2 * r - first

    def _alpha(self, own: int, r: int, recipe: RecipeLike) -> float | None:
        """The alpha that gives a layer of rank `own` its scale."""
        alpha, scale = recipe.lora_alpha, recipe.scale
        if alpha is None or own == r or self.scale == "own":
            return alpha
        return scale.alpha_for(scale.factor(alpha, r), own)
