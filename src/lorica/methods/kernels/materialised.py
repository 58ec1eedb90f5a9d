"""V = W + ΔW is formed in forward and again in backward, and saved only on request.

    forward   V = W + s·BA;  y = x Vᵀ (+ b)
    backward  V again; dX = dY V; dA, dB by the small products

The sum is rounded to x's dtype before use, so in half precision small updates would be lost in W:
`auto` multiplies with the factors there.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels._orders import Call, Order


@dataclass(frozen=True, kw_only=True)
class Materialised(Fused):
    """Forms the effective weight at each call; under dropout, where there is no single weight, and
    with a quantised base it multiplies with the factors.

    Args:
        keep: save the effective weight for backward, in·out elements per layer, instead of forming
            it again. Default False. With sharding, every process would hold the whole weight.
        saves: as for `auto`.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+materialised").kernel.name
        'materialised'
    """

    keep: bool = False

    def order(self, call: Call) -> Order:
        return Order() if call.dropping or call.packed else Order(forward_sum=True, input_sum=True)

    def keeps_sum(self) -> bool:
        return self.keep

    def threshold(self, in_features: int, out_features: int) -> int:
        return 1
