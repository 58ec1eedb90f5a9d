"""Dense weights: `nn.Linear`, GPT-2's `Conv1D` (stored transposed), `nn.Embedding` (x is one-hot, W
is the table's transpose) and embeddings that multiply what they look up by a constant (Gemma's,
BART's).

A subclass is served where it computes what these classes compute: its forward is inherited, or a
small twin of the module gives the same numbers. One that computes something else with its weight
(a router, a quantised layer, a position table with an offset) is not.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.model.bases.base import AbstractBase, is_dense, own_weight


class _Dense(AbstractBase):
    gives: ClassVar[frozenset[str]] = frozenset(
        {"base_unchanged", "writable_base", "base", "separate"}
    )
    kind: ClassVar[type[nn.Module]]

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        return type(module) is cls.kind and is_dense(own_weight(module))

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

    def replaced(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        value = (weight.T if self.transposed else weight).detach()
        own = self.dtype
        self.module.register_parameter("weight", nn.Parameter(value.to(own).contiguous()))
        if bias is not None:
            self.module.register_parameter("bias", nn.Parameter(bias.detach().to(own).clone()))
        return self.module


class DenseLinear(_Dense):
    kind: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or not is_dense(own_weight(module)):
            return False
        return type(module) is nn.Linear or _once(module, _is_linear)


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
        self.padding = module.padding_idx

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        if type(module) is nn.Embedding:
            return True
        return isinstance(module, nn.Embedding) and _once(module, _is_lookup)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "its `max_norm` rewrites the table in every forward, so no frozen weight exists"
        return None

    def bias(self) -> None:
        return None

    def product(self, x: Tensor) -> Tensor:
        return self.module.forward(x)

    def linear(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


class ScaledEmbedding(DenseEmbedding):
    """y = c · (x Wᵀ): W is the stored table, and the constant falls on table and update alike."""

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        self._factors: dict[tuple[torch.dtype, bool], float] = {}
        self.finish(torch.ones((), device="meta"))  # find the constant now, outside of any graph

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        if type(module) is nn.Embedding or not isinstance(module, nn.Embedding):
            return False
        return _once(module, _is_scaled_lookup)

    @property
    def peft_knows(self) -> bool:
        """Whether PEFT scales its update too: it looks for this name."""
        own = {*vars(self.module), *dict(self.module.named_buffers(recurse=False))}
        return "embed_scale" in own

    def product(self, x: Tensor) -> Tensor:
        table = cast(nn.Embedding, self.module)
        return F.embedding(x, table.weight, table.padding_idx)

    def linear(self, x: Tensor) -> Tensor:
        return self.product(x)

    def finish(self, y: Tensor) -> Tensor:
        # A buffer that holds the constant has no value yet while the model is on the meta device.
        key = self.parameter.dtype, any(b.is_meta for b in self.module.buffers())
        if key not in self._factors:
            self._factors[key] = _constant(cast(nn.Embedding, self.module)) or 1.0
        return y * self._factors[key]


# -- what a subclass computes

_known: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def _once(module: Any, computes: Callable[[Any], bool]) -> bool:  # Any: a subclass of `kind`
    """The answer about a module, asked once."""
    answers = _known.setdefault(module, {})
    if computes.__name__ not in answers:
        answers[computes.__name__] = _owns_plain_weight(module) and computes(module)
    return answers[computes.__name__]


def _owns_plain_weight(module: nn.Module) -> bool:
    """Whether all that it holds is a weight in an ordinary dtype, and perhaps a bias: no codes and
    scales of a quantiser, no parametrisation."""
    own = dict(module.named_parameters(recurse=False))
    plain = own.keys() <= {"weight", "bias"} and "weight" in own
    return plain and is_dense(own["weight"]) and next(module.children(), None) is None


def _twin(module: nn.Module, sizes: dict[str, Any], **tensors: Tensor) -> nn.Module:
    """A copy of a module that shares nothing with it, on the CPU, with other sizes and weights; a
    buffer on the meta device, whose value is yet to come, is 2."""
    twin = copy.copy(module)
    held = vars(twin)
    held["_parameters"] = {n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}
    held["_buffers"] = {
        n: torch.full(b.shape, 2, dtype=b.dtype) if b.is_meta else b.to("cpu", copy=True)
        for n, b in module.named_buffers(recurse=False)
    }
    held.update(sizes)
    return twin


def _forward(twin: nn.Module, x: Tensor) -> Tensor | None:
    """What its class computes, without any hook; None: it takes more than x, or fails on it."""
    forward: Callable[..., object] = type(twin).forward
    try:
        with torch.no_grad(), torch.device("cpu"):
            y = forward(twin, x)
    except Exception:  # whatever a forward written for something else raises
        return None
    return y if isinstance(y, Tensor) else None


def _is_linear(module: nn.Linear) -> bool:
    if type(module).forward is nn.Linear.forward:
        return True
    if next(module.buffers(), None) is not None:
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    biased = any(n == "bias" for n, _ in module.named_parameters())
    tensors = {"weight": draw(3, 2)} | ({"bias": draw(3)} if biased else {})
    twin = _twin(module, {"in_features": 2, "out_features": 3}, **tensors)
    if not biased:
        twin.register_parameter("bias", None)
    for training in (True, False):
        twin.training = training
        for x in (draw(4, 2), draw(2, 5, 2)):
            y, wanted = _forward(twin, x), F.linear(x, tensors["weight"], tensors.get("bias"))
            if y is None or y.shape != wanted.shape or not torch.allclose(y, wanted, 1e-9, 1e-9):
                return False
    return True


def _constant(module: nn.Embedding) -> float | None:
    """c of y = c · table[x], as it acts in the table's dtype; None: it computes something else."""
    ids = torch.tensor([[0, 3, 1], [4, 1, 2]])
    found: list[float] = []
    for dtype in (torch.float64, module.weight.dtype):
        generator = torch.Generator().manual_seed(0)
        table = torch.randn((5, 16), generator=generator, dtype=torch.float64).to(dtype)
        table[0, 0] = 1.0  # reads c itself
        sizes = {"num_embeddings": 5, "embedding_dim": 16, "padding_idx": None, "max_norm": None}
        twin = _twin(module, sizes, weight=table)
        for training in (True, False):
            twin.training = training
            y = _forward(twin, ids)
            if y is None or y.shape != (2, 3, 16) or y.dtype is not dtype:
                return None
            # In half precision c is either rounded with the table or not.
            found.append(float(y[0, 0, 0]))
            if not any(torch.equal(y, table[ids] * c) for c in (found[0], found[-1])):
                return None
            factor = found[-1] if torch.equal(y, table[ids] * found[-1]) else found[0]
    return factor


def _is_lookup(module: nn.Embedding) -> bool:
    return type(module).forward is nn.Embedding.forward or _constant(module) == 1.0


def _is_scaled_lookup(module: nn.Embedding) -> bool:
    if type(module).forward is nn.Embedding.forward:
        return False
    return (c := _constant(module)) is not None and c not in (0.0, 1.0)
