"""Dense weights: `nn.Linear`, GPT-2's `Conv1D` (stored transposed) and `nn.Embedding` (x is
one-hot, W is the table's transpose).

Only these very classes: a subclass may compute something else with its weight.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.model.bases.base import AbstractBase


class _Dense(AbstractBase):
    gives: ClassVar[frozenset[str]] = frozenset(
        {"base_unchanged", "writable_base", "base", "separate"}
    )
    kind: ClassVar[type[nn.Module]]

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        return type(module) is cls.kind

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    def weight(self) -> Tensor:
        return self.parameter.T if self.transposed else self.parameter

    def bias(self) -> Tensor | None:
        owner = self.module if self.trained_bias is None else self.trained_bias
        return owner.bias  # type: ignore[return-value]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())

    def linear(self, x: Tensor) -> Tensor:
        bias = self.bias()
        return F.linear(x, self.weight(), None if bias is None else bias.to(self.parameter.dtype))


class DenseLinear(_Dense):
    kind: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.in_features, module.out_features


class DenseConv1D(_Dense):
    kind: ClassVar[type[nn.Module]] = Conv1D
    transposed = True

    def __init__(self, module: Conv1D) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.nx, module.nf


class DenseEmbedding(_Dense):
    kind: ClassVar[type[nn.Module]] = nn.Embedding
    transposed = True
    lookup = True

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.num_embeddings, module.embedding_dim

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "its `max_norm` rewrites the table in every forward, so no frozen weight exists"
        return None

    def bias(self) -> None:
        return None

    def product(self, x: Tensor) -> Tensor:
        return self.module(x)

    def linear(self, x: Tensor) -> Tensor:
        return self.module(x)
