"""ΔW as a triple product: P Λ Q with a trained diagonal Λ, of which a mask may switch entries off.

    ΔW = s·B diag(λ ∘ m) A      A (r₀, in) for Q, B (out, r₀) for P, λ (r₀, 1), m (r₀, 1) of 0, 1

(A_i, λ_i, B_i) is a triplet: one rank. A schedule removes and restores its singular value, while
its vectors stay; the mask removes it for good. No shape ever changes, and s is computed from r₀ for
the whole run: the paper's author tried a divisor that follows the rank, and it was worse.

Inits fill A and B and leave Λ at 1, so that the start is the init's B₀A₀, and ΔW = 0 where B₀ is 0.
The paper's own start is Λ = 0 with Gaussian A and B (`init.svd`), where Λ learns first: with B = 0
*and* Λ = 0 no parameter would ever get a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair, RecipeLike, Site
from lorica.methods.deltas._diagonal import DiagonalDelta
from lorica.methods.deltas.base import DeltaChoice, ones
from lorica.methods.deltas.svd.folded import as_plain
from lorica.methods.fields import number, whole, without_effect
from lorica.methods.inits.base import AbstractInit
from lorica.methods.optional import BuildsOtherRank, ReadsAsLora
from lorica.tensors.dtensor_ops import copy_, draw, zero_


class SvdDelta(DiagonalDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "E": "diagonal"}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.E = ones(site, site.r, 1)
        self.mask = ones(site, site.r, 1, trains=False)

    def diagonal(self) -> Tensor:
        return self.E * self.mask

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale, self.lookup, self.E, self.mask)

    def open_(self) -> None:
        """The mask stays: how many ranks the layer keeps was decided already."""
        copy_(self.E, torch.ones_like(self.E))


@dataclass(frozen=True, kw_only=True)
class SvdInit(AbstractInit):
    """A, B ~ N(0, 0.02²) and Λ = 0, the authors' values. Without a Λ one factor is 0, as in LoRA.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("svd+init.svd").init.name
        'svd'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        for p in (pair.A, pair.B):
            p.copy_(0.02 * draw(p.shape, generator))
        zero_((pair.A if pair.lookup else pair.B) if pair.E is None else pair.E)


@dataclass(frozen=True, kw_only=True)
class Svd(DeltaChoice, BuildsOtherRank, ReadsAsLora):
    """Three factors as in an SVD, so that ranks can be removed and restored.

    A layer is built with `init_r` ranks, of which r are to remain; without a schedule all of them
    do. Where `init_r` is above r, the default α gives s = 2 at `init_r`.

    Cost: LoRA's of rank `init_r`, and `init_r` parameters more.
    When: as part of a method that moves ranks between layers (`adalora`).

    Args:
        init_r: ranks that a layer of rank r is built with, at least r; layers of another rank
            (`rank_pattern`) get theirs in proportion. Default: `ratio`·r.
        ratio: `init_r` as a multiple of r, at least 1, rounded up and at most min(in, out).
            Default 1.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("svd(init_r=12)", r=8).lora_alpha
        24

    Reference:
        @inproceedings{zhang2023adalora,
          title = {Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning},
          author = {Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis,
                    Nikos and He, Pengcheng and Cheng, Yu and Chen, Weizhu and Zhao, Tuo},
          booktitle = {ICLR}, year = {2023}, eprint = {2303.10512}
        }
    """

    init_r: int | None = None
    ratio: float = 1.0

    gives: ClassVar[frozenset[str]] = frozenset(
        {"pair", "factors", "weight", "lookup", "sharded", "wrapped", "diagonal"}
    )
    peft_synonym: ClassVar[str] = "ADALORA"

    def __post_init__(self) -> None:
        whole(self, "init_r", optional=True, say="a whole number of at least 1, e.g. `init_r=12`")
        number(self, "ratio", least=1, say="a number of at least 1, e.g. `ratio=1.5`")
        if self.init_r is not None:
            without_effect(self, "ratio", 1, f"the ratio follows from `init_r={self.init_r}`")

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        if self == Svd():  # no wider than r: the start's, or the scale's own
            return None
        r = recipe.r
        assert r is not None  # known before a default alpha is asked for
        return recipe.scale.alpha_for(2.0, self._wide(r, r))

    def built_rank(self, site: Site, recipe: RecipeLike) -> int:
        r = recipe.r
        assert r is not None  # a recipe of adapters has a rank
        most, wide = min(site.in_features, site.out_features), self._wide(site.r, r)
        if self.init_r is None:
            return max(site.r, min(wide, most))
        if not site.r <= wide <= most:
            raise ValueError(
                f"`init_r={self.init_r}` with `r={r}` would build {site.name!r}"
                f" ({site.out_features} x {site.in_features}) with {wide} ranks, of which {site.r}"
                f" are to remain; give `init_r` from {r} to {most * r // site.r}, or leave the"
                " layer out with `exclude_modules`"
            )
        return wide

    def _wide(self, r: int, usual: int) -> int:
        ratio = self.ratio if self.init_r is None else self.init_r / usual
        return math.ceil(round(ratio * r, 9))  # 1.1·10 is a little above 11

    @classmethod
    def as_plain(
        cls,
        data: Mapping[str, Any],  # Any: a JSON file's values
        tensors: Mapping[str, Tensor],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:  # Any: as above
        return as_plain(data, tensors)

    def build(self, site: Site) -> SvdDelta:
        return SvdDelta(site)
