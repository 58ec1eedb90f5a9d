"""Kernels: in which order the products of one layer are computed.

Every kernel computes g ∘ (x Wᵀ + update(x)) + b. Kernels differ in rounding, time and memory only.
The suite checks every file for this: it equals `reference` in float64 within rounding, and passes
gradcheck.

To add one: copy `reference.py`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorica.interfaces import BaseLike, RowScale, UpdateLike
from lorica.methods.choice import Choice
from lorica.methods.kernels._measured import Table, measured
from lorica.methods.kernels._orders import Call, Order, choose

__all__ = ["AbstractKernel", "Call", "Order", "Table", "choose", "measured", "plain"]


@dataclass(frozen=True, kw_only=True)
class AbstractKernel(Choice, abc.ABC):
    axis: ClassVar[str] = "kernels"
    experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})

    @abc.abstractmethod
    def product(
        self, x: Tensor, base: BaseLike, update: UpdateLike, *, gain: RowScale | None = None
    ) -> Tensor:
        """g ∘ (x Wᵀ + update(x)) + b: (..., in) -> (..., out).

        Args:
            gain: returns g (out,); None: g = 1.
        """

    def threshold(self, in_features: int, out_features: int) -> int | None:
        """Tokens in a call from which on W + ΔW is formed; None: never."""
        return None


def plain(x: Tensor, base: BaseLike, update: UpdateLike, *, gain: RowScale | None = None) -> Tensor:
    """The products one after the other, under ordinary autograd."""
    if gain is None:
        return base.linear(x) + update(x, base)
    g, _ = gain(False)
    y = base.product(x) + update(x, base)
    dtype = y.dtype
    y = y.to(g.dtype) if y.device.type == "cpu" else y  # a CPU is slow at products of two dtypes
    y = (y * g).to(dtype)  # in g's precision, and that of its gradient
    offset = base.bias()
    return y if offset is None else y + offset.to(y.dtype)
