"""x Wᵀ + s·(x Aᵀ) Bᵀ, two products in addition to the frozen one, under ordinary autograd."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorica.interfaces import BaseLike, RowScale, UpdateLike
from lorica.methods.kernels.base import AbstractKernel, plain


@dataclass(frozen=True, kw_only=True)
class Reference(AbstractKernel):
    """The plain order that all other kernels are compared with.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+reference").kernel.name
        'reference'
    """

    def product(
        self, x: Tensor, base: BaseLike, update: UpdateLike, *, gain: RowScale | None = None
    ) -> Tensor:
        return plain(x, base, update, gain=gain)
