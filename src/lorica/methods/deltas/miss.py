"""MiSS: outputs share rows of one matrix.

    y = x Wᵀ + expand(x Dᵀ)      D (r, in), zeros; the outputs in r shards of consecutive ones
    ΔW[o, :] = D[shard(o), :];   ∂L/∂D[i] = Σ_{o in shard i} G[o, :]     with G = ∂L/∂W'

    mini_r = q: y[o] = y₀[o] + Σ_b h[b]·D[b, o mod q]     D (r, q); h the sum of x's blocks of r
                ΔW[o, i] = D[i mod r, o mod q]

The first form is called MiSS in section 4.1 of the paper, with shards as equal as possible. The
second is PEFT's `mini`, where inputs share too; with q = out it is the paper's MiSS_e, which is the
delta `bone` here and PEFT's `MISS` by default. PEFT requires that q divides the outputs; here the
last copy is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Site
from lorica.methods.deltas._blocks import Blocks, BlockSum, mode_of, peft_form, spread
from lorica.methods.deltas.base import AbstractDelta, PeftForm, zeros
from lorica.methods.fields import is_whole, whole
from lorica.tensors.dtensor_ops import read_full, read_wide, zero_


class Shards(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"D": "core"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.D = zeros(site, site.r, site.in_features)
        self.site = site

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        if self.site.lookup:
            return spread(F.embedding(x, self.D.T), self.site.out_features)
        return spread(F.linear(x, self.D.to(x.dtype)), self.site.out_features)

    def weight(self, base: BaseLike) -> Tensor:
        D = read_wide(self.D)
        return spread(D.T, self.site.out_features).T

    def factors(self) -> Factors:
        D = read_full(self.D)
        eye = torch.eye(D.shape[0], dtype=D.dtype, device=D.device)
        return Factors(D, spread(eye, self.site.out_features).T)  # (r, in), (out, r)

    def restart(self, link: int, generator: torch.Generator) -> None:
        zero_(self.D)


@dataclass(frozen=True, kw_only=True)
class Miss(Blocks):
    """Matrix shard sharing: the outputs of a shard share one row of D (r, in).

    ΔW has rank at most r and r·in parameters per layer; merging is exact. There is no scale before
    ΔW, so `lora_alpha` is an error. A chain of restarts gains nothing: every link has the same
    dimensions. Not PEFT's default `MISS`, which shares along the inputs: that is `bone`. Default
    rate 2e-5, the authors' on 7B; a gain of √(out/r) sits in the shards.

    Cost: r·in parameters per layer; the second product is a copy, so a step is cheaper than LoRA's.
    When: as `bone`, where outputs are alike rather than inputs.

    Args:
        mini_r: q, PEFT's name and its `mini` form: D (r, q) for every block of r inputs and every q
            outputs, r·q parameters, rank at most min(r, q). Default None: the paper's form.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> delta = lorica.attach(model, "miss", r=4, verbose=False).layers["0"].update.delta
        >>> tuple(delta.D.shape)
        (4, 8)

    Reference:
        @inproceedings{kang2026miss,
          title = {MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
                   Structure},
          author = {Kang, Jiale and Yin, Qingyu},
          booktitle = {ICLR}, year = {2026}, eprint = {2409.15371}
        }
    """

    mini_r: int | None = None

    gives: ClassVar[frozenset[str]] = frozenset(
        {"factors", "weight", "lookup", "sharded", "wrapped"}
    )

    def __post_init__(self) -> None:
        whole(
            self, "mini_r", optional=True,
            say="a whole number of at least 1, e.g. `miss(mini_r=64)`; leave it out for the form"
            " that shares along the outputs alone",
        )  # fmt: skip

    def build(self, site: Site) -> AbstractDelta:
        if self.mini_r is None:
            return Shards(site)
        if self.mini_r > site.out_features:
            raise ValueError(
                f"`miss(mini_r={self.mini_r})` is larger than the {site.out_features} outputs of"
                f" {site.name!r}; give at most `mini_r={site.out_features}`, or leave that layer"
                " out with `exclude_modules`"
            )
        return BlockSum(site, self.mini_r)

    def peft_form(self) -> PeftForm | None:
        return None if self.mini_r is None else peft_form("mini", self.mini_r)

    def peft_serves(self, site: Site) -> bool:
        return self.mini_r is not None and site.out_features % self.mini_r == 0

    @classmethod
    def from_peft(cls, data: Mapping[str, object]) -> Miss | None:
        q = data.get("mini_r", 1)
        return cls(mini_r=q) if mode_of(data) == "mini" and is_whole(q) else None
