"""The order that multiplies with the factors, as one function: W + ΔW is never formed."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels._orders import Call, Order


@dataclass(frozen=True, kw_only=True)
class Factored(Fused):
    """Never forms the effective weight, at the cost of two more small products; for layers whose
    weight is large compared with the free memory.

    Args:
        saves: as for `auto`.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+factored").kernel.name
        'factored'
    """

    def order(self, call: Call) -> Order:
        return Order()
