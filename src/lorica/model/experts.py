"""AdaptedTensor and AdaptedExperts: updates of expert tensors, and the module that uses them.

The experts' module stays in the model's path, within an `AdaptedExperts`. For the time of its
forward each adapted parameter is an `EffectiveWeight`, so the module's own products, whichever of
transformers' forms they have, are products with W + ΔW.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import BaseLike, DeltaLike, Factors, RowScale, UpdateLike
from lorica.model.bases.experts import ExpertTensor
from lorica.model.layer import AdaptedLayer
from lorica.model.module_hooks import share_hooks
from lorica.model.update import Products, Update
from lorica.tensors.effective import EffectiveWeight, Term, multiplies_by_group


class AdaptedTensor(AdaptedLayer):
    """The update of one expert tensor: a batch of E pairs A (E, r, in), B (E, out, r)."""

    # To which experts tokens were routed (E,) bool; None: this is not recorded.
    routed: Tensor | None = None
    instead: Factors | None = None  # acts in place of the update and its gain

    @property
    def base(self) -> nn.Module:
        """The experts' module, which holds the tensor."""
        return self.store.module

    @property
    def leaf(self) -> str:
        return self.site.name.rpartition(".")[2]

    def stand_in(self) -> EffectiveWeight:
        """What the experts' module multiplies with, for one forward."""
        store, asked = cast(ExpertTensor, self.store), _AskedForGain()
        weight = store.parameter
        if self.instead is None:
            self.combine(weight, store, self.update, asked)
        auto = torch.is_autocast_enabled(weight.device.type)
        dtype = None if auto else weight.dtype

        def terms() -> tuple[Term, ...]:
            return tuple(
                _term(factors, store.transposed, dtype, self.update if drops else None)
                for factors, drops in self._parts()
            )

        made = EffectiveWeight.of(weight, terms, asked.gain, on_rows=not store.transposed)
        # Elsewhere than on a CPU one grouped product is faster than many small ones.
        if weight.device.type == "cpu":
            made.one = _OneByOne(self, asked.gain)
        if self.routed is not None and torch.is_grad_enabled():
            made.met = self._note
        return made

    def _note(self, experts: Any) -> None:  # Any: an index of torch's
        if self.routed is not None:
            self.routed[experts] = True

    def _parts(self) -> list[tuple[Factors, bool]]:
        """The update's factors, each with whether dropout falls on it in this call."""
        update = self.update
        whole = update.factors() if self.instead is None else self.instead
        assert whole is not None  # `attach` lets no delta pass that has none
        if not update.dropping or self.instead is not None:
            return [(whole, False)]
        own, frozen = update.delta.factors(), update.frozen_factors
        if own is None or frozen is None or update.drop_frozen:
            return [(whole, True)]
        return [(own, True), (frozen, False)]


def _term(
    factors: Factors, transposed: bool, dtype: torch.dtype | None, dropping: UpdateLike | None
) -> Term:
    right = factors.A.to(dtype or factors.A.dtype)
    left = (factors.B * factors.scale).to(dtype or factors.B.dtype)

    def drop(x: Tensor) -> Tensor:
        return x if dropping is None else dropping.drop(x)[0]

    falls = None if dropping is None else drop
    return Term(right.mT, left.mT, falls) if transposed else Term(left, right, falls)


class _OneByOne:
    """The product with one expert's matrix, x (n, in) -> (n, out), by the layer's kernel."""

    def __init__(self, layer: AdaptedTensor, gain: Tensor | None) -> None:
        self.layer, self.gain = layer, gain
        self.weight = layer.store.weight()  # read now: in the forward the stand-in has its place

    # Taken apart at once, and by the first expert that is met: the gradient of one index after the
    # other would be a stack each.

    @functools.cached_property
    def gains(self) -> Sequence[Tensor] | None:
        return None if self.gain is None else self.gain.unbind()

    @functools.cached_property
    def weights(self) -> Sequence[Tensor]:
        return self.weight.unbind()

    @functools.cached_property
    def own(self) -> list[Factors]:
        instead = self.layer.instead
        factors = self.layer.update.delta.factors() if instead is None else instead
        assert factors is not None  # as above
        return _apart(factors)

    @functools.cached_property
    def frozen(self) -> list[Factors] | None:
        frozen = self.layer.update.frozen_factors
        return None if frozen is None or self.layer.instead is not None else _apart(frozen)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        frozen = None if self.frozen is None else self.frozen[expert]
        update = _OneUpdate(self.layer.update, self.own[expert], frozen)
        base = _OneBase(self.weights[expert])
        scale = None
        if self.gains is not None:
            g = self.gains[expert]
            scale = cast(RowScale, lambda forms: (g, None))  # pyright: ignore
        kernel = self.layer.kernel
        y = kernel.product(x, cast(BaseLike, base), cast(UpdateLike, update), gain=scale)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _apart(factors: Factors) -> list[Factors]:
    pairs = zip(factors.A.unbind(), factors.B.unbind(), strict=True)
    return [Factors(A, B, factors.scale) for A, B in pairs]


class _OneBase:
    """One matrix of a stack, as a kernel reads it."""

    dense, lookup = True, False

    def __init__(self, weight: Tensor) -> None:
        self.values = weight

    def weight(self) -> Tensor:
        return self.values

    def bias(self) -> None:
        return None

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values)

    linear = product


class _OneUpdate(Products):
    """The update of one matrix of a stack, as a kernel reads it."""

    lookup, padding = False, None

    def __init__(self, whole: Update, own: Factors, frozen: Factors | None) -> None:
        self.delta = cast(DeltaLike, _OneDelta(own))
        self.dropout, self.drop_frozen = whole.dropout, whole.drop_frozen
        self._frozen, self._drops = frozen, whole.dropping

    @property
    def dropping(self) -> bool:
        return self._drops

    @property
    def frozen_factors(self) -> Factors | None:
        return self._frozen

    def __call__(self, x: Tensor, base: BaseLike) -> Tensor:
        return self.forward(x, base)


class _OneDelta:
    """Two factors."""

    def __init__(self, factors: Factors) -> None:
        self.held = factors

    def factors(self) -> Factors:
        return self.held

    def pair(self) -> Factors:
        """Not None: the factors are what trains."""
        return self.held


class _AskedForGain:
    """A kernel that multiplies nothing: it takes the gain that a combine hands to its kernel."""

    gain: Tensor | None = None

    def product(
        self, x: Tensor, base: BaseLike, update: UpdateLike, *, gain: RowScale | None = None
    ) -> Tensor:
        self.gain = None if gain is None else gain(False)[0]
        return x


class AdaptedExperts(nn.Module):
    """Takes the place of a module `base` with adapted expert tensors.

    The updates are submodules by the tensors' names. Attributes that models read of the module are
    the base's.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, AdaptedTensor]) -> None:
        super().__init__()
        self.base = base
        share_hooks(base, self)
        for leaf, layer in layers.items():
            setattr(self, leaf, layer)
        self.train(base.training)

    def layers(self) -> dict[str, AdaptedTensor]:
        """{name of the tensor: its update}."""
        return {n: m for n, m in self.named_children() if isinstance(m, AdaptedTensor)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # Any: whatever the experts take
        stand_ins = {n: m.stand_in() for n, m in self.layers().items() if not m.disabled}
        if torch.compiler.is_compiling():  # which knows tensors of its own kinds alone
            formed = {n: w.formed() for n, w in stand_ins.items()}
            return torch.func.functional_call(self.base, formed, args, kwargs)
        held = vars(self.base)  # what stands here is found before the parameter of the same name
        held.update(stand_ins)
        try:
            return self.base.forward(*args, **kwargs)
        finally:
            for name in stand_ins:
                del held[name]

    def __getattr__(self, name: str) -> Any:  # Any: of the base
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


# transformers multiplies over sorted rows by an operator of its own where torch's can't. The module
# that defines it comes with every model of transformers'.
importlib.import_module("transformers.integrations.moe")
multiplies_by_group(torch.ops.transformers.grouped_mm_fallback)
