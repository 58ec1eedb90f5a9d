"""Kernels: in which order the products of one layer are computed.

Every kernel computes g ∘ (x Wᵀ + update(x)) + b and differs from the others only in rounding, time
and memory. The suite holds every file to: equal to `reference` in float64 within rounding, and
gradcheck.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lorica.kernels._measured import Table, measured
from lorica.kernels._orders import Call, Order, choose
from lorica.rooms import Choice

__all__ = ["AbstractKernel", "Call", "Order", "Table", "choose", "measured", "plain"]


@dataclass(frozen=True, kw_only=True)
class AbstractKernel(Choice, abc.ABC):
    room: ClassVar[str] = "kernels"
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})

    @abc.abstractmethod
    def product(
        self, x: Tensor, base, update, *, bias: bool, gain: Tensor | None = None,
        plan: Any = None, formed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(..., in) -> (..., out): gain ∘ (x Wᵀ + update(x)), with the base's bias where `bias`.

        Args:
            gain: g (out,), in at least float32; None: 1.
            plan: what `plan` gave for this very call; None: it is asked for now.
            formed: W + ΔW (out, in), of a caller that formed it and has no more use for it, where
                the plan says so; None: the kernel forms it itself.
        """

    def plan(self, x: Tensor, base, update) -> Any:
        """How this call would be computed; its `forms` says whether it would use W + ΔW, if the
        caller formed it. None: in the one way there is, without."""
        return None

    def threshold(self, in_features: int, out_features: int) -> int | None:
        """Tokens in a call from which on W + ΔW is materialised; None: never."""
        return None


def plain(x: Tensor, base, update, *, bias: bool, gain: Tensor | None = None) -> Tensor:
    """The products one after the other, under ordinary autograd."""
    if gain is None:
        return (base.linear(x) if bias else base.product(x)) + update(x, base)
    y = base.product(x) + update(x, base)
    dtype = y.dtype
    y = y.to(gain.dtype) if y.device.type == "cpu" else y  # which is slow at products of two dtypes
    y = (y * gain).to(dtype)  # with g's own digits, and those of its gradient
    offset = base.bias() if bias else None
    return y if offset is None else y + offset.to(y.dtype)
