"""V = W + ΔW formed in forward and formed again in backward, never saved unless asked for.

    forward   V = W + s·BA;  y = x Vᵀ (+ b)
    backward  V again; dX = dY V; dA, dB by the small products

The sum is rounded to x's dtype before use, so in half precision small updates would be lost in W:
the choice in `auto` leaves half precision to the factors' order.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels._orders import Call, Order


@dataclass(frozen=True, kw_only=True)
class Materialised(Fused):
    """Forms the effective weight at each call; falls back to the factors' order where dropout
    forbids it.

    Args:
        keep: save the effective weight for backward, in·out elements a layer, instead of forming
            it again. Default False. Sharding would be undone by it.
        saves: as for `auto`.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+materialised").kernel.name
        'materialised'
    """

    keep: bool = False

    def order(self, call: Call) -> Order:
        return Order() if call.dropping else Order(forward_sum=True, input_sum=True)

    def keeps_sum(self) -> bool:
        return self.keep

    def threshold(self, in_features: int, out_features: int) -> int:
        return 1
