"""What links the adapters of consecutive layers, and what one hands to the next within a forward.

A layer takes what its predecessor left and leaves its own for the next, so each is read exactly
once: nothing outlives a forward, and a layer that runs without its predecessor (a checkpoint's
second forward, a dropped layer) finds nothing and says so, instead of computing with another
forward's values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import Factors, Site
from lorica.methods.deltas.base import AbstractDelta
from lorica.tensors.dtensor_ops import draw_, zero_


def chains(deltas: Mapping[str, AbstractDelta], most: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each delta with at most `most` earlier ones of its kind (-1: all), the nearest first.

    Of one kind are paths that differ in their first number, the transformer block's, alone, while
    the sizes stay the same.
    """
    rows: dict[str, list[Any]] = {}
    for path, delta in deltas.items():
        row = rows.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1), [])
        if row and _sizes(row[-1]) != _sizes(delta):
            row.clear()
        yield delta, tuple(row[::-1][: most if most >= 0 else None])
        row.append(delta)


def _sizes(delta: Any) -> tuple[int, int]:
    return delta.site.in_features, delta.site.out_features


class PassingDelta(AbstractDelta):
    """The input and the middle shortcut: y depends on what earlier layers of this forward saw."""

    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site, *, middle: bool, word: str) -> None:
        super().__init__()
        like = {"dtype": site.dtype, "device": site.device}
        self.A = nn.Parameter(torch.zeros(site.r, site.in_features, **like))
        self.B = nn.Parameter(torch.zeros(site.out_features, site.r, **like))
        self.site, self.scale, self.middle, self.name = site, site.scale, middle, word
        self.earlier: tuple[PassingDelta, ...] = ()  # nearest first; a tuple registers no module
        self.shared = False  # the next layer takes what this one leaves
        self.left: tuple[Tensor, ...] = ()  # inputs, or their projections: own, earlier ones'
        self.merging: Factors | None = None  # what stands for the update in a merge under way

    def forward(self, x: Tensor, base) -> Tensor:
        A = self.A.to(x.dtype)
        own = F.linear(x, A) if self.middle else x
        before = self._take(own)
        if self.shared:
            self.left = (own, *before)
        total = sum(before, own)
        if not self.middle:
            total = F.linear(total if before else 2 * own, A)
        return F.linear(total, (self.scale * self.B).to(x.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # A checkpoint's second forward may stop early, before all that was left is taken.
        return {**self.__dict__, "left": ()}

    def _take(self, own: Tensor) -> tuple[Tensor, ...]:
        """What earlier layers left, the nearest first."""
        if not self.earlier:
            return ()
        source = self.earlier[0]
        left, source.left = source.left, ()
        if not left or left[0].shape != own.shape:
            raise ValueError(
                f"{self.site.name!r} adds what {source.site.name!r} computed in the same forward,"
                " and finds nothing of its shape there. Under gradient checkpointing this is a"
                " second forward of one layer without the other: turn it off, or let one checkpoint"
                " hold all linked layers. Dropped layers are no predecessors either. The shortcut"
                " `block` needs neither"
            )
        return left[: len(self.earlier)]

    def factors(self) -> Factors | None:
        """None, but while a merge has something else stand for the update."""
        return self.merging

    def approximation(self, alphas: Sequence[float], *, collapsed: bool) -> Factors:
        """The update if the k-th earlier input, or projection, were alphas[k] times the own."""
        if self.middle and not collapsed:
            pairs = zip(alphas, self.earlier, strict=True)
            return Factors(sum((a * m.A for a, m in pairs), start=self.A), self.B, self.scale)
        return Factors((1 + sum(alphas)) * self.A, self.B, self.scale)

    def weight(self, base) -> Tensor:
        if self.merging is None:
            raise ValueError(
                f"the update of {self.site.name!r} depends on the inputs of other layers, so there"
                " is no ΔW to merge. Save the adapters as they are; or type"
                " `with approximated(adapters, batches): lorica.merge(model)` (the function is in"
                f" `{__package__}`), on the command line `lorica merge --approximate`, which say"
                " what is lost"
            )
        return self.merging.weight()

    def restart(self, link: int, generator: torch.Generator) -> None:
        draw_(self.A, generator, bound=self.A.shape[1] ** -0.5)
        zero_(self.B)
