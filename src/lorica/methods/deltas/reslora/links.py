"""Links between the adapters of consecutive layers, and what one passes to the next in a forward.

A layer takes the tensors that its predecessor left and leaves its own for the next layer, so each
is read exactly once and none outlives a forward. A layer that runs without its predecessor (in a
checkpoint's second forward, or after a dropped layer) finds nothing and raises an error instead of
computing with the values of another forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Site
from lorica.methods.deltas.base import AbstractDelta, zeros
from lorica.tensors.dtensor_ops import draw_, zero_

if TYPE_CHECKING:
    from typing_extensions import Self


class LinkedDelta(AbstractDelta):
    """A and B of one layer, and the deltas of earlier layers that it is linked with."""

    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}
    earlier: tuple[Self, ...]  # nearest first; a tuple registers no module

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.A = zeros(site, site.r, site.in_features)
        self.B = zeros(site, site.out_features, site.r)
        self.site, self.scale = site, site.scale
        self.earlier = ()
        self.shared = False  # a later layer reads what this one computes, too

    def restart(self, link: int, generator: torch.Generator) -> None:
        draw_(self.A, generator, bound=self.A.shape[1] ** -0.5)
        zero_(self.B)


L = TypeVar("L", bound=LinkedDelta)


def chains(deltas: Mapping[str, L], most: int) -> Iterator[tuple[L, tuple[L, ...]]]:
    """Each delta with at most `most` earlier ones of its kind (-1: all), the nearest first.

    Paths of one kind differ only in their first number, the transformer block's. Where the sizes
    change, a new chain begins.
    """
    rows: dict[str, list[L]] = {}
    for path, delta in deltas.items():
        row = rows.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1), [])
        if row and _sizes(row[-1]) != _sizes(delta):
            row.clear()
        yield delta, tuple(row[::-1][: most if most >= 0 else None])
        row.append(delta)


def _sizes(delta: LinkedDelta) -> tuple[int, int]:
    return delta.site.in_features, delta.site.out_features


class PassingDelta(LinkedDelta):
    """The input and the middle shortcut: y depends on the inputs of earlier layers."""

    def __init__(self, site: Site, *, middle: bool) -> None:
        super().__init__(site)
        self.middle = middle
        self.left: tuple[Tensor, ...] = ()  # inputs, or their projections: own, earlier ones'
        self.merging: Factors | None = None  # replaces the update while the model is merged

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        A = self.A.to(x.dtype)
        own = F.linear(x, A) if self.middle else x
        before = self._take(own)
        if self.shared:
            self.left = (own, *before)
        total = own
        for earlier in before:
            total = total + earlier
        if not self.middle:
            total = F.linear(total if before else 2 * own, A)
        return F.linear(total, (self.scale * self.B).to(x.dtype))

    def __getstate__(self) -> dict[str, Any]:  # Any: a module's attributes
        # A checkpoint's second forward may stop before the next layer has taken what was left.
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
                " and there is nothing of its shape. Gradient checkpointing causes this, when it"
                " repeats the forward of one layer without the other: turn it off, or put all"
                " linked layers in one checkpoint. Layer dropout causes it, too. The shortcut"
                " `block` works with both"
            )
        return left[: len(self.earlier)]

    def factors(self) -> Factors | None:
        """None, except within `approximated`."""
        return self.merging

    def approximation(self, alphas: Sequence[float], *, collapsed: bool) -> Factors:
        """The update if the k-th earlier input, or projection, were alphas[k] times the own."""
        if self.middle and not collapsed:
            total: Tensor = self.A
            for alpha, earlier in zip(alphas, self.earlier, strict=True):
                total = total + alpha * earlier.A
            return Factors(total, self.B, self.scale)
        return Factors((1 + sum(alphas)) * self.A, self.B, self.scale)

    def weight(self, base: BaseLike) -> Tensor:
        if self.merging is None:
            raise ValueError(
                f"the update of {self.site.name!r} depends on the inputs of other layers, so there"
                " is no ΔW to merge. Save the adapters as they are; or type"
                " `with approximated(adapters, batches): lorica.merge(model)` (the function is in"
                f" `{__package__}`), on the command line `lorica merge --approximate`, which report"
                " what is lost"
            )
        return self.merging.weight()
