"""ResLoRA of Shi et al. (arXiv 2402.18039): a chain of layers, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def chain(
    x: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], s: float,
    shortcut: str, P: int = 0, between: Callable[[Tensor], Tensor] = torch.tanh,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(x_n, y_n) of each layer; x_{n+1} = between(y_n)."""
    out: list[tuple[Tensor, Tensor]] = []
    for n in range(len(W)):
        y = x @ W[n].T
        far = n if P == -1 else min(P, n)
        if shortcut == "plain":
            y = y + s * (x @ A[n].T) @ B[n].T
        elif shortcut == "input":
            before = out[n - 1][0] if n else x
            y = y + s * ((x + before) @ A[n].T) @ B[n].T
        elif shortcut == "block":
            for k in range(far + 1):
                y = y + s * (x @ A[n - k].T) @ B[n - k].T
        else:
            h = x @ A[n].T
            for k in range(1, far + 1):
                h = h + out[n - k][0] @ A[n - k].T
            y = y + s * h @ B[n].T
        out.append((x, y))
        x = between(y)
    return out


def block(A: Sequence[Tensor], B: Sequence[Tensor], s: float, n: int, P: int) -> Tensor:
    """ΔW_n of the block shortcut."""
    far = n if P == -1 else min(P, n)
    return sum((s * B[n - k] @ A[n - k] for k in range(far + 1)), torch.zeros(()))


def alphas(
    kind: str, n: int, P: int, xs: Sequence[Sequence[Tensor]], W: Sequence[Tensor],
    A: Sequence[Tensor], B: Sequence[Tensor], s: float,
) -> list[float]:  # fmt: skip
    """α_{n,k}, k = 1..min(P, n), from xs[batch][layer]."""

    def mean(i: int) -> float:
        norms = [b[i] @ A[i].T if kind == "projections" else b[i] for b in xs]
        return sum(float(v.norm()) for v in norms) / len(norms)

    if kind == "weights":
        f = [float((w + s * b @ a).norm()) for w, a, b in zip(W, A, B, strict=True)]
        return [1.0 if n < 2 else f[n - 2] / f[n - 1]]
    return [mean(n - k) / mean(n) for k in range(1, min(P, n) + 1)]
