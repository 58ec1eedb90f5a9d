"""Fade: the frozen part of a layer fades out, its update remains.

    y = λ·(x (W + F)ᵀ + b) + x ΔWᵀ + c          λ frozen, c (out,) trained from 0
    W' = λ(W + F) + ΔW,   b' = λb + c

with ΔW the trained delta, A (r, in), B (out, r), and F (out, in) the frozen factors' product. At
λ = 1 and c = 0 it is the plain sum; at λ = 0 only A, B and c are left of the layer, and the product
with W is not computed any more.

The frozen factors (the frozen start −ΔW₀ of an init that is not zero) fade with W: the frozen
weight of such a layer is the residual W − ΔW₀, and ΔW must remain at λ = 0, not ΔW − ΔW₀. The
kernels compute x Wᵀ + update(x), the form of λ = 1 only; below 1 the two products are computed one
after the other.

Only layers with a bias have c, so that a merged model keeps its architecture.

λ is a parameter of one element, so that it is saved and sharded with the rest. Its value is cached
with the parameter's version: reading it costs one copy from the device after a change, none in
between. Writing to a shard does not change the version of its gathered copy, so code that writes or
loads λ resets the cache (`fade_`, `loaded`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, KernelLike, Site, UpdateLike
from lorica.methods.combine.base import AbstractCombine, CombineChoice
from lorica.methods.deltas.base import ones, zeros
from lorica.methods.optional import OutlivesBase
from lorica.tensors.dtensor_ops import copy_, read_full


class FadeCombine(AbstractCombine, OutlivesBase):
    roles: ClassVar[dict[str, str]] = {"c": "bias"}
    c: nn.Parameter | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.share = ones(site, 1, trains=False)  # λ
        self.register_parameter("c", zeros(site, site.out_features) if site.biased else None)
        self.known: tuple[Tensor, int | None, float] | None = None  # λ, its version, its value

    # -- λ

    @property
    def number(self) -> float:
        """λ, rounded to the dtype it is held in."""
        p = self.share
        version = None if p.is_inference() else p._version  # inference mode has no versions
        if self.known is None or self.known[0] is not p or self.known[1] != version:
            self.known = p, version, float(read_full(p.detach()))
        return self.known[2]

    def fade_(self, number: float) -> None:
        """λ ← number, plain or sharded."""
        copy_(self.share, torch.full((1,), number, dtype=torch.float64, device=self.share.device))
        self.loaded()

    def loaded(self) -> None:
        self.known = None

    # -- the layer

    def forward(self, x: Tensor, base: BaseLike, update: UpdateLike, kernel: KernelLike) -> Tensor:
        # A graph reads λ as a tensor: a number would be a constant, and each value would recompile.
        fade = None if torch.compiler.is_compiling() else self.number
        if fade == 1:
            y = kernel.product(x, base, update)
        else:
            dropped, _ = update.drop(x)
            y = update.delta(dropped, base)
            if fade != 0:
                frozen = base.linear(x)
                if (kept := update.frozen_factors) is not None:
                    z = dropped if update.drop_frozen else x  # the same dropout as the delta's
                    B = kept.B * kept.scale
                    frozen = frozen + F.linear(F.linear(z, kept.A.to(z.dtype)), B.to(z.dtype))
                y = y + (self.share.to(y.dtype) if fade is None else fade) * frozen
        return y if self.c is None else y + self.c.to(y.dtype)

    def effective(self, base: BaseLike, update: UpdateLike) -> tuple[Tensor, Tensor | None]:
        weight = update.delta.weight(base)
        assert weight is not None  # this combine needs deltas that have one
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        fade, bias = self.number, None if self.c is None else self.c.to(weight.dtype)
        if fade:
            frozen, b, kept = base.weight().to(weight.dtype), base.bias(), update.frozen_factors
            frozen = frozen if kept is None else frozen + kept.weight()
            weight = weight + fade * frozen
            bias = None if bias is None or b is None else bias + fade * b
        return weight, bias

    def remains(self, update: UpdateLike) -> tuple[Factors, Tensor | None] | None:
        factors = update.delta.factors()
        return None if self.number or factors is None else (factors, self.c)


@dataclass(frozen=True, kw_only=True)
class Fade(CombineChoice):
    """The frozen weight and bias are multiplied with λ, which a schedule takes from 1 to 0, and
    each layer that has a bias trains a second one.

    Without a schedule λ remains 1 and only that bias is new. It works with any delta that has a
    weight. Embeddings, which have no product to save, are an error. Weight decay would shrink the
    update that has to replace W: leave it at 0.

    Cost: LoRA's in training; at λ = 0 the product with W is saved.
    When: as part of a compression: a schedule has to move λ.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> layer = lorica.attach(model, "fade", r=2, verbose=False).layers["0"]
        >>> layer.combine.fade_(0.0)
        >>> model(torch.ones(1, 8)).abs().sum().item()
        0.0

    Reference:
        @inproceedings{hwang2024pclora,
          title = {PC-LoRA: Low-Rank Adaptation for Progressive Model Compression with Knowledge
                   Distillation},
          author = {Hwang, Injoon and Park, Haewon and Lee, Youngwan and Yang, Jooyoung and
                    Maeng, SunJae}, booktitle = {CVPR Workshop on Transformers for Vision},
          year = {2024}, eprint = {2406.09117}
        }
    """

    needs: ClassVar[frozenset[str]] = frozenset({"wrapped", "weight"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    withdraws: ClassVar[frozenset[str]] = frozenset(
        {"lookup"}
    )  # an embedding has no product to save

    def build(self, site: Site) -> FadeCombine:
        if site.lookup:
            raise ValueError(
                f"`fade` can't be used at {site.name!r}: it saves the product with a weight, and an"
                " embedding looks rows up without one. Allowed are linear layers, so leave the"
                " embedding out of `target_modules`"
            )
        return FadeCombine(site)
