"""A ~ N(0, 1/r²), B = 0: `init_lora_weights="gaussian"` in PEFT, after the paper's Gaussian A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair
from lorica.methods.inits.base import AbstractInit
from lorica.tensors import dtensor_ops


@dataclass(frozen=True, kw_only=True)
class Gaussian(AbstractInit):
    """Normal A of standard deviation 1/r, zero B (on an embedding: zero A, B normal with that
    deviation).

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("gaussian").text()
        'gaussian'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        random, zero = (pair.B, pair.A) if pair.lookup else (pair.A, pair.B)
        random.copy_(dtensor_ops.draw(random.shape, generator) / pair.A.shape[0])
        zero.zero_()
