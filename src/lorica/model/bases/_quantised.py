"""What all quantised weights have in common.

W is made of what is stored, for one layer at a time, wherever its values are needed: norms, starts,
the gradient of x, merges. The product x Wᵀ in forward is the format's own kernel. Nothing writes to
a packed weight, so such a base stays as published.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.model.bases.base import AbstractBase


class Quantised(AbstractBase):
    gives: ClassVar[frozenset[str]] = frozenset({"base_unchanged", "base", "separate"})
    dense = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        assert isinstance(module, nn.Linear)  # all formats here are kinds of it
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    @abc.abstractmethod
    def format(self) -> str:
        """As users know it, e.g. `nf4`."""

    def flaw(self) -> str | None:
        """Why the module can't compute without Lorica, or None."""
        return None

    def bias(self) -> Tensor | None:
        owner = self.module if self.trained_bias is None else self.trained_bias
        return owner.bias  # type: ignore[return-value]

    @abc.abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b by the format's own kernel, in x's dtype."""

    def product(self, x: Tensor) -> Tensor:
        return self.multiply(x, None)

    def linear(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias())

    def replaced(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        own: Tensor | None = self.module.bias  # type: ignore[assignment]
        bias = own if bias is None else bias
        plain = nn.Linear(
            self.in_features, self.out_features, bias=bias is not None, device="meta"
        ).train(self.module.training)
        plain.weight = nn.Parameter(weight.detach().to(dtype).contiguous())
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype).clone())
        return plain
