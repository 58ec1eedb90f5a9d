"""The factors' own order everywhere, as one function: W + ΔW is never formed."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels._orders import Call, Order


@dataclass(frozen=True, kw_only=True)
class Factored(Fused):
    """Never forms the effective weight, at the price of two small products more; for layers whose
    weight is large beside the memory that is left.

    Args:
        saves: as for `auto`.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+factored").kernel.name
        'factored'
    """

    def order(self, call: Call) -> Order:
        return Order()
