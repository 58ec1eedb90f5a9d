"""W' = W + ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorica.interfaces import BaseLike, KernelLike, Site, UpdateLike
from lorica.methods.combine.base import AbstractCombine, CombineChoice


class AddCombine(AbstractCombine):
    def forward(self, x: Tensor, base: BaseLike, update: UpdateLike, kernel: KernelLike) -> Tensor:
        return kernel.product(x, base, update)

    def effective(self, base: BaseLike, update: UpdateLike) -> tuple[Tensor, Tensor | None]:
        delta = update.weight(base)
        return base.weight().to(delta.dtype) + delta, base.bias()


@dataclass(frozen=True, kw_only=True)
class Add(CombineChoice):
    """The effective weight is the sum.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora").combine.name
        'add'
    """

    peft_flags: ClassVar[Mapping[str, object] | None] = {}
    experts: ClassVar[bool] = True

    def build(self, site: Site) -> AddCombine:
        return AddCombine()
