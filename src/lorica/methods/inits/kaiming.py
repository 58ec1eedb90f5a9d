"""A ~ U(−1/√in, 1/√in), B = 0: `kaiming_uniform(a=√5)` of loralib and PEFT, variance 1/(3·in).

On an embedding A is zero and B ~ N(0, 1), as in loralib and PEFT: the lookup reads A's columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair
from lorica.methods.inits.base import AbstractInit
from lorica.tensors import dtensor_ops


@dataclass(frozen=True, kw_only=True)
class Kaiming(AbstractInit):
    """Uniform A, zero B: the usual start.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora").init.name
        'kaiming'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        if pair.lookup:
            pair.A.zero_()
            pair.B.copy_(dtensor_ops.draw(pair.B.shape, generator))
            return
        bound = pair.A.shape[1] ** -0.5
        pair.A.copy_(dtensor_ops.draw(pair.A.shape, generator, bound=bound))
        pair.B.zero_()
