"""Dropout that keeps a seed, not a mask: what was dropped is drawn again in backward.

On a CPU the dropped positions themselves are drawn, as gaps of a geometric distribution (Bernoulli
trials say nothing but how many successes lie between two failures), so the cost falls with p: at p
= 0.05 a tenth of drawing a number for every element. The seed comes from torch's own generator on
the CPU, one number a call: so runs resume and checkpointed segments recompute with the same masks,
and no device waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def seeded() -> bool:
    """Whether a mask can be kept as a seed: it could not change within a graph that is compiled or
    captured, and would not be drawn anew for each row of a `vmap`."""
    if torch.compiler.is_compiling():
        return False
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not (capturing or transformed())


def transformed() -> bool:
    """Whether this runs within a transform of `torch.func`."""
    inner: Any = torch._C  # pyright: ignore[reportPrivateUsage]  # Any: without stubs
    return inner._functorch.peek_interpreter_stack() is not None


def draw_seed() -> int:
    """One number from torch's generator on the CPU."""
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))


class Mask:
    """What a seed drops of a tensor with probability p; drawn once, where it is first needed."""

    def __init__(self, p: float, seed: int) -> None:
        self.p, self.seed = p, seed
        self._drawn: Tensor | None = None

    def blank_(self, x: Tensor) -> Tensor:
        """Zero what is dropped of x, contiguous, in place; what stays is not scaled. Every x has to
        have the same number of elements."""
        if x.device.type == "cpu":
            if self._drawn is None:
                self._drawn = _positions(x.numel(), self.p, self.seed)
            x.view(-1).index_fill_(0, self._drawn, 0.0)
            return x
        if self._drawn is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
            self._drawn = keep.bernoulli_(1 - self.p, generator=generator)
        return x.mul_(self._drawn)


def _positions(count: int, p: float, seed: int) -> Tensor:
    """Where Bernoulli(p) falls among so many trials, ascending."""
    generator = torch.Generator("cpu").manual_seed(seed)
    found: list[Tensor] = []
    last = -1
    while last < count:
        left = (count - 1 - last) * p
        tries = int(left + 6 * math.sqrt(left)) + 8
        more = torch.rand(tries, generator=generator, dtype=torch.float32, device="cpu")
        gaps = more.neg_().log1p_().div_(math.log1p(-p)).to(torch.int64) + 1
        found.append(gaps.cumsum_(0).add_(last))
        last = int(found[-1][-1])
    at = found[0] if len(found) == 1 else torch.cat(found)
    return at[: int(torch.searchsorted(at, count))]


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:  # Any: torch's context
        ctx.p, ctx.seed = p, seed
        return Mask(p, seed).blank_(x.contiguous().clone()).div_(1 - p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # Any: as above
        dy = grads[0].contiguous().clone()
        return Mask(ctx.p, ctx.seed).blank_(dy).div_(1 - ctx.p), None, None


def drop(x: Tensor, p: float, seed: int | None = None) -> Tensor:
    """x ∘ mask / (1 − p), of which no mask is saved.

    Args:
        x: (...), floating.
        p: probability in [0, 1) of an element to be dropped.
        seed: of the mask; default: drawn. A compiler draws and keeps masks its own way, and so do
            CUDA graphs and transforms of functions (`torch.func`).

    Example:
        >>> import torch
        >>> from lorica.tensors.dropout import drop
        >>> drop(torch.ones(4), 0.5, seed=1).unique().tolist()
        [0.0, 2.0]
    """
    if not seeded():
        return F.dropout(x, p)
    apply = cast(Callable[[Tensor, float, int], Tensor], _Dropped.apply)  # pyright: ignore
    return apply(x, p, draw_seed() if seed is None else seed)
