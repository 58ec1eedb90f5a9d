"""x Wᵀ + s·(x Aᵀ) Bᵀ, two products beside the frozen one, under ordinary autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorica.kernels import AbstractKernel, plain


@dataclass(frozen=True, kw_only=True)
class Reference(AbstractKernel):
    """The plain order that all other kernels are compared with.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+reference").kernel.word
        'reference'
    """

    def product(
        self, x: Tensor, base, update, *, bias: bool, gain: Tensor | None = None,
        plan: Any = None, formed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return plain(x, base, update, bias=bias, gain=gain)
