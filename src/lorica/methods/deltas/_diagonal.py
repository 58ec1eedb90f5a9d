"""What deltas with a trained diagonal between A and B share: ΔW = s·B diag(d) A.

y = x Wᵀ + s·(x Aᵀ) (B diag(d))ᵀ        A (r, in), B (out, r), d (r, 1)
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Site
from lorica.methods.deltas.base import AbstractDelta, zeros
from lorica.tensors.dtensor_ops import draw_, zero_


class DiagonalDelta(AbstractDelta):
    """A and B, of a subclass that owns the diagonal."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.A = zeros(site, site.r, site.in_features)
        self.B = zeros(site, site.out_features, site.r)
        self.scale = site.scale
        self.lookup = site.lookup

    @abc.abstractmethod
    def diagonal(self) -> Tensor:
        """d (r, 1), as the forward multiplies with it."""

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        B = self.scale * self.factors().B  # (out, r)
        return F.linear(F.linear(x, self.A.to(x.dtype)), B.to(x.dtype))

    def weight(self, base: BaseLike) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        return Factors(self.A, self.B * self.diagonal().T, self.scale)

    def restart(self, link: int, generator: torch.Generator) -> None:
        """LoRA's start of A and B, and a diagonal of ones."""
        draw_(self.A, generator, bound=self.A.shape[1] ** -0.5)
        zero_(self.B)
        self.open_()

    @abc.abstractmethod
    def open_(self) -> None:
        """Set the trained diagonal to ones."""
