"""AdaptedTensor and AdaptedExperts: updates of expert tensors, and the module that uses them.

The experts' module stays in the model's path, within an `AdaptedExperts`. For the time of its
forward each adapted parameter is an `EffectiveWeight`, so the module's own products, whichever of
transformers' forms they have, are products with W + ΔW.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorica.interfaces import BaseLike, Factors, RowScale, UpdateLike
from lorica.model.bases.experts import ExpertTensor
from lorica.model.layer import AdaptedLayer
from lorica.model.module_hooks import share_hooks
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
    def place(self) -> str:
        return self.site.name.rpartition(".")[0]

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
        terms = tuple(
            _term(factors, store.transposed, dtype, self.update if drops else None)
            for factors, drops in self._parts()
        )
        made = EffectiveWeight.of(weight, terms, asked.gain, on_rows=not store.transposed)
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


def _know_transformers() -> None:
    """transformers multiplies over sorted rows by an operator of its own where torch's can't."""
    importlib.import_module("transformers.integrations.moe")  # defines the operator
    multiplies_by_group(torch.ops.transformers.grouped_mm_fallback)


_know_transformers()
