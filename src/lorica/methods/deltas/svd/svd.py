"""ΔW as a triple product: P Λ Q with a trained diagonal Λ, of which a mask may switch entries off.

    ΔW = s·B diag(λ ∘ m) A      A (r₀, in) for Q, B (out, r₀) for P, λ (r₀, 1), m (r₀, 1) of 0, 1

(A_i, λ_i, B_i) is a triplet: one rank. Its singular value is what a schedule takes away and gives
back, while its vectors stay; the mask takes it away for good. No shape ever changes, and s is made
of r₀ for the whole run: the author tried a divisor that follows the rank, and it hurt.

Inits fill A and B. Λ is 1 then, so that a start B₀A₀ is what the init meant, and ΔW = 0 where B₀ is
0. The paper's own start is Λ = 0 with Gaussian A and B (`init.svd`), where Λ learns first: with B =
0 *and* Λ = 0 nothing would ever have a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import Factors, Pair, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice
from lorica.methods.deltas.svd.folded import as_plain
from lorica.methods.inits.base import AbstractInit
from lorica.methods.optional import BuildsOtherRank, ReadsAsLora
from lorica.tensors.dtensor_ops import copy_, draw, draw_, zero_


class SvdDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "E": "diagonal"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        like: dict[str, Any] = {"dtype": site.dtype, "device": site.device}
        self.A = nn.Parameter(torch.zeros(site.r, site.in_features, **like))
        self.B = nn.Parameter(torch.zeros(site.out_features, site.r, **like))
        self.E = nn.Parameter(torch.ones(site.r, 1, **like))
        self.mask = nn.Parameter(torch.ones(site.r, 1, **like), requires_grad=False)
        self.scale = site.scale
        self.lookup = site.lookup

    def forward(self, x: Tensor, base) -> Tensor:
        B = self.scale * self.factors().B  # (out, r₀)
        return F.linear(F.linear(x, self.A.to(x.dtype)), B.to(x.dtype))

    def weight(self, base) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        return Factors(self.A, self.B * (self.E * self.mask).T, self.scale)

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale, self.lookup, self.E, self.mask)

    def restart(self, link: int, generator: torch.Generator) -> None:
        """The mask stays: how many ranks a layer has was decided."""
        draw_(self.A, generator, bound=self.A.shape[1] ** -0.5)
        zero_(self.B)
        copy_(self.E, torch.ones_like(self.E))


@dataclass(frozen=True, kw_only=True)
class SvdInit(AbstractInit):
    """A, B ~ N(0, 0.02²) and Λ = 0, the authors' numbers. Without a Λ one factor is 0, as in LoRA.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("svd+init.svd").init.name
        'svd'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Any, generator: torch.Generator) -> None:
        for p in (pair.A, pair.B):
            p.copy_(0.02 * draw(p.shape, generator))
        zero_((pair.A if pair.lookup else pair.B) if pair.E is None else pair.E)


@dataclass(frozen=True, kw_only=True)
class Svd(DeltaChoice, BuildsOtherRank, ReadsAsLora):
    """Three factors as in a singular value decomposition, so that ranks can go and come back.

    A layer is built with `init_r` ranks, of which r are to remain; by itself this file takes none
    away. Where that is more than r, the default α gives s = 2 at `init_r`.

    Cost: LoRA's of rank `init_r`, and as many numbers.
    When: as the part of a method that moves ranks (`adalora`).

    Args:
        init_r: ranks that a layer of rank r is built with, at least r; others (`rank_pattern`) get
            theirs in proportion. Default: `ratio`·r.
        ratio: instead of it, how many times r, at least 1, rounded up and at most min(in, out).
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
        whole = isinstance(self.init_r, int) and not isinstance(self.init_r, bool)
        if self.init_r is not None and not (whole and self.init_r >= 1):
            raise ValueError(f"`svd(init_r={self.init_r!r})` is a whole number, e.g. `init_r=12`")
        if isinstance(self.ratio, bool) or not 1 <= self.ratio < math.inf:
            raise ValueError(f"`svd(ratio={self.ratio!r})` is a number of at least 1, e.g. 1.5")
        if self.init_r is not None and self.ratio != 1:
            raise ValueError(
                f"`svd(init_r={self.init_r}, ratio={self.ratio!r})`: either follows from the other;"
                " leave one out"
            )

    def default_lora_alpha(self, recipe: Any) -> float | None:
        if self == Svd():  # no wider than r: the start's, or the scale's own
            return None
        return recipe.scale.alpha_for(2.0, self._wide(recipe.r, recipe.r))

    def built_rank(self, site: Site, recipe: Any) -> int:
        most, wide = min(site.in_features, site.out_features), self._wide(site.r, recipe.r)
        if self.init_r is None:
            return max(site.r, min(wide, most))
        if not site.r <= wide <= most:
            raise ValueError(
                f"`init_r={self.init_r}` beside `r={recipe.r}` would build {site.name!r}"
                f" ({site.out_features} x {site.in_features}) with {wide} ranks, of which {site.r}"
                f" are to remain; give `init_r` from {recipe.r} to {most * recipe.r // site.r}, or"
                " leave the layer out with `exclude_modules`"
            )
        return wide

    def _wide(self, r: int, usual: int) -> int:
        ratio = self.ratio if self.init_r is None else self.init_r / usual
        return math.ceil(round(ratio * r, 9))  # 1.1·10 is a little above 11

    @classmethod
    def as_plain(
        cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return as_plain(data, tensors)

    def build(self, site: Site) -> SvdDelta:
        return SvdDelta(site)
