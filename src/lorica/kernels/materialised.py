"""V = W + ΔW formed in forward and formed again in backward, never saved.

    forward   V = W + s·BA;  y = x Vᵀ (+ b)                          mnr + Nmn multiplies
    backward  V again; dX = dY V; Z = dY B; dA = s·Zᵀ X; dB = s·dYᵀ (X Aᵀ)
    saved     X, W, A, B; of these only X is new memory (X Aᵀ instead where A is frozen)

(N tokens, m = in, n = out). Cheaper than the factors' order from N > mn/(m + n) on, whatever the
rank (orders f2 and b5 of Cherniuk et al., RunLoRA, arXiv 2312.03415, 2023). The sum is rounded to
x's dtype before use, so in half precision
small updates would be lost in W: the choice in `auto` leaves half precision to the factors' order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.kernels import AbstractKernel


def _sum(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(w, b, a)  # (out, in)


class _Linear(torch.autograd.Function):
    """y = x (W + BA)ᵀ + bias for x (N, in), W (out, in), A (k, in), B (out, k), scale folded into
    B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        # A frozen A needs no x in backward, only the small x Aᵀ; evaluation needs neither.
        ctx.slim = not ctx.needs_input_grad[3] and not ctx.needs_input_grad[1]
        small = x @ a.T if ctx.slim and ctx.needs_input_grad[4] else x[:0]
        ctx.save_for_backward(small if ctx.slim else x, w, a, b)
        return F.linear(x, _sum(w, a, b), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads  # (N, out)
        kept, w, a, b = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad
        dx = dy @ _sum(w, a, b) if need_x else None  # (N, in)
        da = (dy @ b).T @ kept if need_a else None  # (k, in)
        db = dy.T @ (kept if ctx.slim else kept @ a.T) if need_b else None  # (out, k)
        dw = dy.T @ kept if need_w else None  # (out, in), where the base trains for a while
        dbias = dy.sum(0) if need_bias else None
        return dx, dw, dbias, da, db


@dataclass(frozen=True, kw_only=True)
class Materialised(AbstractKernel):
    """Forms the effective weight at each call; falls back to the factors' order where dropout
    forbids it.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+materialised").kernel.word
        'materialised'
    """

    def product(self, x: Tensor, base, update, *, bias: bool) -> Tensor:
        own = update.delta.pair() is None  # a delta without a pair knows its own order
        factors = None if own or update.dropping or base.lookup else update.factors()
        if factors is None:  # one weight for all tokens does not exist, or no factors do
            y = base.linear(x) if bias else base.product(x)
            return y + update(x, base)
        w, b, a = base.weight(), factors.B * factors.scale, factors.A
        offset = base.bias() if bias else None
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = x.dtype
        x, w, a, b = x.to(dtype), w.to(dtype), a.to(dtype), b.to(dtype)
        offset = None if offset is None else offset.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = _Linear.apply(x.reshape(-1, x.shape[-1]), w, offset, a, b)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[union-attr]

    def threshold(self, in_features: int, out_features: int) -> int:
        return 1
