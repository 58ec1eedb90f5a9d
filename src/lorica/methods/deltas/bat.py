"""Bat: blocks of the frozen weight, transformed by a matrix that a row of blocks shares.

    ΔW_ij = W_ij D_i + D_i = (W_ij + I) D_i     W_ij the r × r blocks of W, i over out, j over in
    D (⌈out/r⌉, r, r), zeros;  y_i = (x Wᵀ)_i + Σ_j (W_ij + I) D_i x_j
    ∂L/∂D_i = Σ_j (W_ij + I)ᵀ G_ij              with G = ∂L/∂W'

This is the paper's Bat-Col (Bat-Row shares D_j along a column instead), its first version's "Bone"
and PEFT's `bat`. Both require that r divides in and out; here W is padded with zeros and ΔW cut,
which is the same where it does. Two orders, N inputs:

    form ΔW, then x ΔWᵀ           in·out·(r + N) multiplies
    D_i x_j, then (W_ij + I)      in·out·2N, cheaper below N = r: in generation

Neither keeps its (out, in) or (N, in·out/r) intermediate for backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Site
from lorica.methods.deltas._blocks import Blocks, mode_of, peft_form
from lorica.methods.deltas.base import AbstractDelta, PeftForm, zeros
from lorica.tensors.dtensor_ops import read_full, zero_


def block_rows(W: Tensor, D: Tensor) -> Tensor:
    """W (out, in), padded to whole blocks, as rows of blocks (⌈out/r⌉, r, ⌈in/r⌉·r)."""
    count, r, _ = D.shape
    out, features = W.shape
    return F.pad(W, (0, -features % r, 0, -out % r)).reshape(count, r, -1)


def delta_of(W: Tensor, D: Tensor) -> Tensor:
    """ΔW (out, in)."""
    rows = block_rows(W, D)
    count, r, wide = rows.shape
    blocks = rows.reshape(count, -1, r) @ D  # (out/r, r·in/r, r)
    blocks = blocks.view(count, r, -1, r) + D[:, :, None]
    return blocks.view(count * r, wide)[: W.shape[0], : W.shape[1]]


def product(x: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """x ΔWᵀ for x (N, in), in x's dtype and the order with the fewest multiplies."""
    w, d = W.to(x.dtype), D.to(x.dtype)
    count, r, _ = d.shape
    if x.shape[0] >= r:
        return F.linear(x, delta_of(w, d))
    x = F.pad(x, (0, -x.shape[1] % r))
    h = (x.view(-1, r) @ d.mT).view(count, *x.shape)  # (out/r, N, in)
    sums = torch.unflatten(h, -1, (x.shape[1] // r, r)).sum(2)
    y = h @ block_rows(w, d).mT + sums  # (out/r, N, r)
    return y.transpose(0, 1).reshape(x.shape[0], count * r)[:, : W.shape[0]]


def _recomputed(x: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """`product`, computed again in backward: only its arguments are kept, and x and W exist
    anyway."""
    module: Any = torch.utils.checkpoint  # Any: torch leaves `checkpoint` half typed
    return module.checkpoint(product, x, W, D, use_reentrant=False, preserve_rng_state=False)


def _constant_or_trained(t: Tensor) -> Tensor:
    """Detached where it doesn't train now, so that the second computation sees the same, even if
    it has begun to train by then."""
    return t if t.requires_grad else t.detach()


class BlockAffine(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"D": "core"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.D = zeros(site, -(-site.out_features // site.r), site.r, site.r)

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        W, D = _constant_or_trained(base.weight()), _constant_or_trained(self.D)
        y = _recomputed(x.reshape(-1, x.shape[-1]), W, D)
        return y.view(*x.shape[:-1], W.shape[0])

    def weight(self, base: BaseLike) -> Tensor:
        W, D = read_full(base.weight()), read_full(self.D)
        wide = torch.promote_types(torch.promote_types(W.dtype, D.dtype), torch.float32)
        return delta_of(W.to(wide), D.to(wide))

    def restart(self, link: int, generator: torch.Generator) -> None:
        zero_(self.D)


@dataclass(frozen=True, kw_only=True)
class Bat(Blocks):
    """Block affine transformation: ΔW depends on W, so it may have full rank.

    ΔW_ij = (W_ij + I) D_i for the r × r blocks of W; r·out parameters per layer (out rounded up to
    whole blocks). It is linear in D, and of full rank for almost every W. Each forward forms ΔW
    from W: in·out·r multiplies. Merging is exact. A chain of restarts gains nothing (where r
    divides in): each link multiplies W_ij + I by I + D_i, and so does one alone. There is no scale
    before ΔW, so `lora_alpha` is an error. `miss` and `bone` share blocks without reading W, and
    are cheaper.

    Default rate 2e-5, the authors' on 7B.

    Cost: r·out parameters per layer, in·out·r multiplies per step to form ΔW: slow where r is
    large.
    When: few parameters must reach a full-rank change, and speed doesn't matter.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> delta = lorica.attach(model, "bat", r=2, verbose=False).layers["0"].update.delta
        >>> tuple(delta.D.shape)
        (3, 2, 2)

    Reference:
        @inproceedings{kang2026miss,
          title = {MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
                   Structure},
          author = {Kang, Jiale and Yin, Qingyu},
          booktitle = {ICLR}, year = {2026}, eprint = {2409.15371}
        }
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    gives: ClassVar[frozenset[str]] = frozenset({"weight", "sharded", "wrapped"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"matrices"})  # what trains has three axes

    def build(self, site: Site) -> BlockAffine:
        return BlockAffine(site)

    def peft_form(self) -> PeftForm:
        return peft_form("bat")

    def peft_serves(self, site: Site) -> bool:
        return site.in_features % site.r == 0 and site.out_features % site.r == 0

    @classmethod
    def from_peft(cls, data: Mapping[str, object]) -> Bat | None:
        return cls() if mode_of(data) == "bat" else None
