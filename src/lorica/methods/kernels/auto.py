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
        saves: `product` (default), `nothing` or `output`: what a layer whose rows are scaled
            (`dora`) saves for the scales' gradient. `product` is a tensor of the output's size that
            nothing outside the layer can write to; `nothing` costs one more product with W;
            `output` needs the least memory, and is right only where no kernel writes into the
            layer's output through a pointer.

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
