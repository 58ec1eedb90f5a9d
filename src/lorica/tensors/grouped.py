"""The product of sorted rows with a stack of weights and its low-rank update, as one function.

    y_e = x_e W_eᵀ + (x_e A_eᵀ) B_eᵀ        x (S, in), sorted by expert; W (E, out, in)
                                             A (E, k, in), B (E, out, k), any scale in B

W is frozen. Results are written where they belong, so nothing of the size of all rows is joined
from parts, and x A is kept for backward, which is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def grouped(x: Tensor, W: Tensor, A: Tensor, B: Tensor, counts: Sequence[int]) -> Tensor:
    """y (S, out); rows behind the last expert's are 0.

    Args:
        counts: rows of each expert.
    """
    # Torch has no types for `apply`.
    return _Grouped.apply(x, W, A, B, counts)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of each expert that has some."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(  # Any: torch's context, which takes any attribute
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, counts: Sequence[int]
    ) -> Tensor:
        y = x.new_zeros(x.shape[0], W.shape[1])
        h = x.new_zeros(x.shape[0], A.shape[1])
        for e, rows in _parts(counts):
            torch.mm(x[rows], W[e].T, out=y[rows])
            torch.mm(x[rows], A[e].T, out=h[rows])
            y[rows].addmm_(h[rows], B[e].T)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.counts = counts
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:  # Any: as above
        x, W, A, B, h = ctx.saved_tensors
        need_x, _, need_a, need_b, _ = ctx.needs_input_grad
        dy = grads[0]
        dx = torch.zeros_like(x) if need_x else None
        dA = torch.zeros_like(A) if need_a else None
        dB = torch.zeros_like(B) if need_b else None
        for e, rows in _parts(ctx.counts):
            z = dy[rows] @ B[e]
            if dx is not None:
                torch.mm(dy[rows], W[e], out=dx[rows])
                dx[rows].addmm_(z, A[e])
            if dA is not None:
                torch.mm(z.T, x[rows], out=dA[e])
            if dB is not None:
                torch.mm(dy[rows].T, h[rows], out=dB[e])
        return dx, None, dA, dB, None
