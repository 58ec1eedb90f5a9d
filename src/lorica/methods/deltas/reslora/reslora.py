"""ResLoRA: shortcuts between the adapters of one kind in consecutive blocks.

    plain   y_n = x_n W_nᵀ + s·(x_n A_nᵀ) B_nᵀ                            A_n (r, in), B_n (out, r)
    block   y_n = x_n W_nᵀ + s·Σ_k (x_n A_{n−k}ᵀ) B_{n−k}ᵀ                k = 0..min(P, n)
    input   y_n = x_n W_nᵀ + s·((x_n + x_{n−1}) A_nᵀ) B_nᵀ                x_{−1} := x_0
    middle  y_n = x_n W_nᵀ + s·(x_n A_nᵀ + Σ_k x_{n−k} A_{n−k}ᵀ) B_nᵀ     k = 1..min(P, n)

n counts the layers whose paths differ only in the number of their transformer block, in model
order; where in or out features change, the count starts again. s is that of the layer that adds.

Under the block shortcut ΔW_n = s·Σ_k B_{n−k} A_{n−k} is a matrix: merging is exact, and the stacked
A (k·r, in), B (out, k·r) are a plain LoRA of rank k·r. An A and a B belong to up to P + 1 weights
at once and get a gradient from each, ∂L/∂B_m = Σ_n s·G_n A_mᵀ. They are no pair: no single ΔW is
s·B_m A_m, so a start that subtracts B·A from one weight, or a rule that divides by the metric of
that product, would be wrong for all the others. For the same reason one layer cannot be merged and
restarted alone.

Under the other two, y_n depends on inputs other than x_n (see `links`): there is no ΔW_n, and
merging is an approximation that the user has to ask for, `approximated`.

The authors apply dropout to the sum of the inputs; here each layer's input has its own dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lorica.interfaces import AdaptersLike, BaseLike, Batch, Factors, Site
from lorica.methods.deltas.base import DeltaChoice
from lorica.methods.deltas.reslora.links import L, LinkedDelta, PassingDelta, chains
from lorica.methods.deltas.reslora.merging import approximated as approximated
from lorica.methods.fields import one_of, whole, without_effect
from lorica.methods.optional import ApproximatesWeight, LinksDeltas


class BlockDelta(LinkedDelta):
    """The block shortcut: ΔW is a sum of products."""

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        f = self.factors()
        h = F.embedding(x, f.A.T) if self.site.lookup else F.linear(x, f.A.to(x.dtype))
        return F.linear(h, (f.scale * f.B).to(h.dtype))

    def weight(self, base: BaseLike) -> Tensor:
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
                " factors belong to another FSDP unit, and are gathered only in that unit's"
                " forward. Shard the model as one unit, or use DDP"
            )
        return Factors(
            torch.cat([m.A for m in linked]), torch.cat([m.B for m in linked], 1), self.scale
        )

    def restart(self, link: int, generator: torch.Generator) -> None:
        if link and (self.earlier or self.shared):
            raise ValueError(
                f"{self.site.name!r} cannot restart alone: its A and B are part of the updates of"
                " the layers linked with it, which would lose them. Leave out the schedule that"
                " restarts, or the shortcuts, with `pre_num=0`"
            )
        super().restart(link, generator)


@dataclass(frozen=True, kw_only=True)
class Reslora(DeltaChoice, LinksDeltas, ApproximatesWeight):
    """Residual LoRA: each adapter adds the inputs or products of earlier ones, so that gradients
    reach early layers by a shorter path.

    The parameters are LoRA's, `r·(in + out)` per layer; the products of a layer cost up to P + 1
    times LoRA's (`block`; the others about LoRA's, but keep activations of earlier layers). `block`
    is merged and written for PEFT exactly, with rank (P + 1)·r. `input` and `middle` have no ΔW, so
    they exclude `dora` and an exact merge; with gradient checkpointing they work only where linked
    layers share one checkpoint, and raise an error elsewhere.

    Not to be confused with an adapter's own residual path: x_n W_nᵀ is unchanged.

    Cost: `block`: up to P + 1 times LoRA's products; the others: activations of earlier layers.
    When: deep models, where LoRA learns slowly in early layers; `block` unless you never merge.

    Args:
        shortcut: `block` (default, the one with an exact merge), `input` or `middle`.
        pre_num: P, how many earlier layers are linked; −1: all; 0: LoRA. Default 4, the authors'
            GLUE script. `input` always links one.

    Raises:
        ValueError: any other value; linked layers whose ranks differ (`middle`).

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
        one_of(self, "shortcut", "block", "input", "middle")
        whole(
            self, "pre_num", least=-1,
            say="how many earlier layers, a whole number, e.g. `reslora(pre_num=4)`; -1: all of"
            " them",
        )  # fmt: skip
        if self.shortcut == "input":
            without_effect(self, "pre_num", 4, "`shortcut='input'` links one layer")
        if self.shortcut != "block":
            object.__setattr__(self, "gives", frozenset({"sides", "wrapped"}))

    def build(self, site: Site) -> LinkedDelta:
        if self.shortcut == "block":
            return BlockDelta(site)
        return PassingDelta(site, middle=self.shortcut == "middle")

    def link(self, deltas: Mapping[str, nn.Module]) -> None:
        # All are of one class, what `build` made; each of the two links its own.
        self._link({name: d for name, d in deltas.items() if isinstance(d, BlockDelta)})
        self._link({name: d for name, d in deltas.items() if isinstance(d, PassingDelta)})

    def _link(self, deltas: Mapping[str, L]) -> None:
        most = 1 if self.shortcut == "input" else self.pre_num
        for delta, earlier in chains(deltas, most):
            for other in earlier:
                if self.shortcut == "middle" and other.site.r != delta.site.r:
                    raise ValueError(
                        f"`reslora(shortcut='middle')` multiplies projections of"
                        f" {other.site.name!r} (r={other.site.r}) with the B of"
                        f" {delta.site.name!r} (r={delta.site.r}): linked layers need one rank."
                        " Leave `rank_pattern` out, or type `shortcut='block'`"
                    )
                other.shared = True
            delta.earlier = earlier

    def approximated(
        self, adapters: AdaptersLike, batches: Sequence[Batch]
    ) -> AbstractContextManager[dict[str, float]]:
        return approximated(adapters, batches)
