"""A with orthonormal rows, B = 0.

A = Qᵀ, Q (in, r) from the QR decomposition of a Gaussian matrix, scaled by 1/√3: the rows then have
the size of kaiming's (variance 1/(3·in) per entry), so learning rates carry over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair
from lorica.methods.inits.base import AbstractInit
from lorica.tensors import dtensor_ops
from lorica.tensors.linalg import qr


@dataclass(frozen=True, kw_only=True)
class Orthogonal(AbstractInit):
    """Orthogonal rows in A, zero B: the update's directions start out orthogonal.

    Not PEFT's `orthogonal`, which splits one orthogonal matrix over two non-zero factors.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("orthogonal").init.name
        'orthogonal'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        random, zero = (pair.B, pair.A) if pair.lookup else (pair.A, pair.B)
        tall = random if pair.lookup else random.T  # (out, r) or (in, r)
        q, _ = qr(dtensor_ops.draw(tall.shape, generator))
        tall.copy_(q * 3**-0.5)
        zero.zero_()
