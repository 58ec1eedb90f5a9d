"""The order with the fewest multiplies for the call's actual shapes.

The candidates are those of Cherniuk et al., RunLoRA, arXiv 2312.03415, 2023; one is chosen by the
shapes of each call, so short batches get the order that suits them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorica.methods.kernels import _orders as orders
from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels._measured import current
from lorica.methods.kernels._orders import Call, Order


@dataclass(frozen=True, kw_only=True)
class Auto(Fused):
    """Chooses the order of each call by counting multiplies.

    Args:
        saves: `output` (default), `product` or `nothing`: what a layer whose rows are scaled
            (`dora`) saves for the scales' gradient. The activation after the layer often saves the
            output anyway; a product is a tensor of the same size, which no model can change in
            place; nothing costs one more product.

    Example:
        >>> from lorica.methods.kernels.auto import Auto
        >>> Auto().threshold(512, 512)
        257
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        current()  # reads the table now: within a graph that would recompile

    def order(self, call: Call) -> Order:
        table = current()
        measured = None if table is None else table.order(call)
        return orders.choose(call) if measured is None else measured

    def threshold(self, in_features: int, out_features: int) -> int:
        return orders.threshold(in_features, out_features)
