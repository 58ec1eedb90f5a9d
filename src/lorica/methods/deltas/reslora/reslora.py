"""ResLoRA: shortcuts between the adapters of one kind in consecutive blocks.

    plain   y_n = x_n W_nᵀ + s·(x_n A_nᵀ) B_nᵀ                            A_n (r, in), B_n (out, r)
    block   y_n = x_n W_nᵀ + s·Σ_k (x_n A_{n−k}ᵀ) B_{n−k}ᵀ                k = 0..min(P, n)
    input   y_n = x_n W_nᵀ + s·((x_n + x_{n−1}) A_nᵀ) B_nᵀ                x_{−1} := x_0
    middle  y_n = x_n W_nᵀ + s·(x_n A_nᵀ + Σ_k x_{n−k} A_{n−k}ᵀ) B_nᵀ     k = 1..min(P, n)

n counts the layers whose paths differ in the number of their transformer block alone, in model
order; where in or out features change, the count starts anew. s is that of the layer that adds.

Under the block shortcut ΔW_n = s·Σ_k B_{n−k} A_{n−k} is a matrix: merging is exact, and the stacked
A (k·r, in), B (out, k·r) are a plain LoRA of rank k·r. An A and a B belong to up to P + 1 weights
at once and get a gradient from each, ∂L/∂B_m = Σ_n s·G_n A_mᵀ. They are no pair: no single ΔW is
s·B_m A_m, so a start that takes B·A out of one weight, or a rule that divides by the metric of that
product, would be wrong in all the others. For the same reason the update of one layer cannot be put
away alone.

Under the other two, y_n depends on other inputs than x_n (lorica.methods.deltas.reslora.links): there is no
ΔW_n, and merging is an approximation that has to be asked for, `approximated`.

The authors apply dropout to the sum of the inputs; here each layer's input has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lorica.interfaces import Factors, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice
from lorica.methods.deltas.reslora.links import PassingDelta, chains
from lorica.methods.deltas.reslora.merging import approximated as approximated
from lorica.methods.optional import ApproximatesWeight, LinksDeltas
from lorica.tensors.dtensor_ops import draw_, zero_


class BlockDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        like = {"dtype": site.dtype, "device": site.device}
        self.A = nn.Parameter(torch.zeros(site.r, site.in_features, **like))
        self.B = nn.Parameter(torch.zeros(site.out_features, site.r, **like))
        self.site, self.scale = site, site.scale
        self.earlier: tuple[BlockDelta, ...] = ()  # nearest first; a tuple registers no module
        self.shared = False  # a later layer adds this one's product, too

    def forward(self, x: Tensor, base) -> Tensor:
        f = self.factors()
        h = F.embedding(x, f.A.T) if self.site.lookup else F.linear(x, f.A.to(x.dtype))
        return F.linear(h, (f.scale * f.B).to(h.dtype))

    def weight(self, base) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        """A (k·r, in) and B (out, k·r) of this layer and those before it."""
        if not self.earlier:
            return Factors(self.A, self.B, self.scale)
        linked = (self, *self.earlier)
        kinds = {isinstance(m.A, DTensor) for m in linked}
        if len(kinds) > 1:
            raise ValueError(
                f"{self.site.name!r} adds the products of {len(self.earlier)} earlier layers, whose"
                " factors are sharded by another unit, and gathered for that unit's forward alone."
                " Shard the model as one unit, or use DDP"
            )
        return Factors(
            torch.cat([m.A for m in linked]), torch.cat([m.B for m in linked], 1), self.scale
        )

    def restart(self, link: int, generator: torch.Generator) -> None:
        if link and (self.earlier or self.shared):
            raise ValueError(
                f"{self.site.name!r} cannot start afresh alone: its A and B are part of the updates"
                " of the layers linked with it, which would lose them. Leave the restarting"
                " schedule out, or the shortcuts, with `pre_num=0`"
            )
        draw_(self.A, generator, bound=self.A.shape[1] ** -0.5)
        zero_(self.B)


@dataclass(frozen=True, kw_only=True)
class Reslora(DeltaChoice, LinksDeltas, ApproximatesWeight):
    """Residual LoRA: each adapter adds what its predecessors see or do, so gradients reach early
    layers on a shorter way.

    The parameters are LoRA's, `r·(in + out)` a layer; the products of a layer cost up to P + 1
    times LoRA's (`block`; the others about LoRA's, but keep activations of earlier layers). A
    `block` is merged and written for PEFT exactly, with rank (P + 1)·r. `input` and `middle` have
    no ΔW, so neither `dora` nor a plain merge exists; under gradient checkpointing they work only
    where linked layers share one checkpoint, and say so where not.

    Not to be confused with an adapter's own residual path: x_n W_nᵀ is untouched.

    Cost: `block`: up to P + 1 times LoRA's products; the others: activations of earlier layers.
    When: deep models, where LoRA learns slowly in early layers; `block` unless you can do
    without merging.

    Args:
        shortcut: `block` (default, the one with an exact merge), `input` or `middle`.
        pre_num: P, how many earlier layers are linked; −1: all; 0: LoRA. Default 4, the authors'
            GLUE script. `input` always links one.

    Raises:
        ValueError: a value that is none of these; layers to be linked whose ranks differ
            (`middle`).

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> adapters = lorica.attach(model, "reslora(pre_num=1)", r=2, verbose=False)
        >>> [layer.update.factors().A.shape[0] for _, layer in adapters]
        [2, 4, 4]

    Reference:
        @inproceedings{shi2024reslora,
          title = {ResLoRA: Identity Residual Mapping in Low-Rank Adaption},
          author = {Shi, Shuhua and Huang, Shaohan and Song, Minghui and Li, Zhoujun and Zhang,
                    Zihan and Huang, Haizhen and Wei, Furu and Deng, Weiwei and Sun, Feng and Zhang,
                    Qi},
          booktitle = {Findings of ACL}, year = {2024}, eprint = {2402.18039}
        }
    """

    shortcut: str = "block"
    pre_num: int = 4

    gives: ClassVar[frozenset[str]] = frozenset({"sides", "factors", "weight", "lookup", "wrapped"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"separate"})

    def __post_init__(self) -> None:
        if self.shortcut not in ("block", "input", "middle"):
            raise ValueError(
                f"`reslora(shortcut={self.shortcut!r})`; allowed: 'block', 'input', 'middle'"
            )
        whole = isinstance(self.pre_num, int) and not isinstance(self.pre_num, bool)
        if not whole or self.pre_num < -1:
            raise ValueError(
                f"`reslora(pre_num={self.pre_num!r})`: how many earlier layers, a whole number,"
                " e.g. `reslora(pre_num=4)`; -1: all of them"
            )
        if self.shortcut == "input" and self.pre_num != type(self).pre_num:
            raise ValueError(
                f"`reslora(pre_num={self.pre_num})` has no effect under `shortcut='input'`, which"
                " links one layer; leave it out"
            )
        if self.shortcut != "block":
            object.__setattr__(self, "gives", frozenset({"sides", "wrapped"}))

    def build(self, site: Site) -> AbstractDelta:
        if self.shortcut == "block":
            return BlockDelta(site)
        return PassingDelta(site, middle=self.shortcut == "middle", word=self.name)

    def link(self, deltas: Mapping[str, AbstractDelta]) -> None:
        most = 1 if self.shortcut == "input" else self.pre_num
        for delta, earlier in chains(deltas, most):
            for other in earlier:
                if self.shortcut == "middle" and other.site.r != delta.site.r:
                    raise ValueError(
                        f"`reslora(shortcut='middle')` puts projections of {other.site.name!r}"
                        f" (r={other.site.r}) through the B of {delta.site.name!r}"
                        f" (r={delta.site.r}): linked layers have one rank. Leave `rank_pattern`"
                        " out, or type `shortcut='block'`"
                    )
                other.shared = True
            delta.earlier = earlier

    def approximated(
        self, adapters: Any, batches: Sequence[Mapping[str, Any]]
    ) -> AbstractContextManager[dict[str, float]]:
        return approximated(adapters, batches)
