"""Where each tensor of the adapters is in PEFT's file.

    ΔW = s·B'A',  A' = [A; A₀] (r + k, in),  B' = [B, B₀] (out, r + k)

The frozen factors of a layer are stacked under the ones that train, which makes one plain LoRA,
however training started. Keys are `base_model.model.` + module path + suffix; s is written as
alpha = s·(r + k).

A delta may declare a type of PEFT's own (`PeftForm`). It is used where it holds everything: one
rank, linear layers as PEFT's type knows them, no frozen factors, no rows of tokens, a plain sum
W + ΔW. Elsewhere the delta's factors make a LORA, if it has any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorica.interfaces import Factors
from lorica.methods.combine.base import CombineChoice
from lorica.methods.deltas.base import PeftForm
from lorica.model.adapters import Adapters
from lorica.model.experts import AdaptedTensor
from lorica.model.layer import AdaptedLayer
from lorica.model.state import SHARED
from lorica.tensors.dtensor_ops import read_full

PREFIX = "base_model.model."
LORA = "LORA"


@dataclass(frozen=True)
class Place:
    """`length` rows (axis -2) or columns (axis -1) of the tensor `key`, from `start` on; axis None
    is all of it.

    PEFT holds the factors of a stack of experts flat: A as (E·r, in), ordered by expert, B as
    (out, r·E), ordered by rank.

    Attributes:
        experts: of the stack; 0: a single matrix.
        turned: PEFT reads the stack as (E, out, in), and it is (E, in, out), so its A is our Bᵀ.
    """

    key: str
    axis: int | None = None
    start: int = 0
    length: int = 0
    experts: int = 0
    turned: bool = False

    @property
    def ordered_by_expert(self) -> bool:
        return (self.axis == -2) is not self.turned

    @property
    def rank_axis(self) -> int:
        """Of the tensor in the file, along which its ranks lie."""
        return 0 if self.ordered_by_expert else 1

    def cut(self, tensors: Mapping[str, Tensor]) -> Tensor:
        whole = self.unfolded(tensors[self.key])
        return whole if self.axis is None else whole.narrow(self.axis, self.start, self.length)

    def unfolded(self, flat: Tensor) -> Tensor:
        """The file's tensor as it is here: with a leading dimension of E for a stack."""
        if not self.experts:
            return flat
        if self.ordered_by_expert:
            t = flat.reshape(self.experts, -1, flat.shape[-1])
        else:
            t = flat.reshape(flat.shape[0], -1, self.experts).permute(2, 0, 1)
        return t.mT if self.turned else t

    def folded(self, whole: Tensor) -> Tensor:
        """The inverse of `unfolded`."""
        if not self.experts:
            return whole
        t = whole.mT if self.turned else whole
        if self.ordered_by_expert:
            return t.reshape(-1, t.shape[-1])
        return t.permute(1, 2, 0).reshape(t.shape[1], -1)


def combine_of(adapters: Adapters) -> CombineChoice:
    """The combine of adapters that have layers."""
    combine = adapters.recipe.combine
    assert combine is not None, "a recipe that wraps layers has a combine"
    return combine


def own_form(adapters: Adapters, frozen: Mapping[str, int]) -> PeftForm | None:
    """The type of PEFT's own that holds all of this; None: it is LORA, if PEFT has any form of it.

    Args:
        frozen: {module path: rank of its frozen factors}.
    """
    recipe = adapters.recipe
    form = recipe.delta.peft_form()
    if form is None or adapters.tables or any(frozen.values()):
        return None
    if combine_of(adapters).peft_flags != {}:
        return None
    layers = [layer for _, layer in adapters]
    if (
        any(layer.store.lookup or layer.site.experts for layer in layers)
        or len({x.site.r for x in layers}) != 1
    ):
        return None
    if form.transposed is None and any(layer.store.transposed for layer in layers):
        return None
    return form if all(recipe.delta.peft_serves(x.site) for x in layers) else None


def places(adapters: Adapters, frozen: Mapping[str, int]) -> dict[str, Place]:
    """{name in `adapters.state_dict()`, or of a buffer of a module trained in full: its place}.

    What is not in it is not in PEFT's file as such (a delta whose factors are computed).
    """
    form = own_form(adapters, frozen)
    out: dict[str, Place] = {}
    for site, layer in adapters:
        key = f"{PREFIX}{site}"
        a, b = factors_of(adapters, layer)
        names = {id(p): n for n, p in layer.named_parameters()}
        pair = layer.update.delta.pair()
        if form is not None:
            for name, suffix in form.tensors.items():
                out[f"{site}.update.delta.{name}"] = Place(f"{key}.{suffix}")
        elif pair is not None and _is_own(layer):
            r, k = pair.A.shape[-2], frozen[site]
            out[f"{site}.{names[id(pair.A)]}"] = replace(a, start=0, length=r)
            out[f"{site}.{names[id(pair.B)]}"] = replace(b, start=0, length=r)
            if k:
                out[f"{site}.update.frozen_A"] = replace(a, start=r, length=k)
                out[f"{site}.update.frozen_B"] = replace(b, start=r, length=k)
        for name, suffix in combine_of(adapters).peft_tensors.items():
            out[f"{site}.combine.{name}"] = Place(f"{key}.{suffix}")
        for name, _ in layer.own.named_parameters():
            out[f"{site}.own.{name}"] = Place(f"{key}.base_layer.{name}")
    for site, module in adapters.saved.items():
        for name in module.copy.state_dict() if module.only is None else sorted(module.only):
            out[f"{site}.copy.{name}"] = Place(f"{PREFIX}{site}.{name}")
    for site, table in adapters.tables.items():
        if table.owner:
            out[f"{site}.rows"] = Place(rows_key(site))
    for name, key in form.shared.items() if form is not None else ():
        out[f"{SHARED}.{name}"] = Place(key)
    return out


def factors_of(adapters: Adapters, layer: AdaptedLayer) -> tuple[Place, Place]:
    """Where A and B of a layer are in a LORA file."""
    if not isinstance(layer, AdaptedTensor):
        a, b = factor_keys(f"{PREFIX}{layer.site.name}", layer.site.lookup)
        return Place(a, -2), Place(b, -1)
    # PEFT wraps the module once for each of its tensors, the first one innermost.
    own = [n for n, _ in layer.base.named_parameters(recurse=False)]
    adapted = [n for n in own if f"{layer.place}.{n}" in adapters.layers]
    around = len(adapted) - 1 - adapted.index(layer.leaf)
    a, b = factor_keys(f"{PREFIX}{layer.place}{'.base_layer' * around}", False)
    turned = layer.store.transposed and not vars(layer.base).get("is_transposed", False)
    experts = layer.site.experts
    places = Place(a, -2, experts=experts), Place(b, -1, experts=experts)
    if not turned:
        return places
    return replace(places[0], key=b, turned=True), replace(places[1], key=a, turned=True)


def _is_own(layer: AdaptedLayer) -> bool:
    """Whether the delta's factors are the trained pair itself, not computed from it."""
    pair, own = layer.update.delta.pair(), layer.update.delta.factors()
    return pair is not None and own is not None and own.A is pair.A and own.B is pair.B


@torch.no_grad()
def written(layer: AdaptedLayer) -> Factors | None:
    """The update's factors as a LORA file holds them: of computed ones, ranks that are nothing (a
    row of A or a column of B of zeros) are left out, all but one."""
    factors = layer.update.factors()
    if factors is None or _is_own(layer):
        return factors
    A, B = read_full(factors.A), read_full(factors.B)
    keep = A.any(1) & B.any(0)
    keep[0] |= ~keep.any()
    return Factors(A[keep], B[:, keep], factors.scale)


def rows_key(path: str) -> str:
    """Of the rows that train of a table of tokens."""
    return f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"


def factor_keys(key: str, lookup: bool) -> tuple[str, str]:
    if lookup:
        return f"{key}.lora_embedding_A", f"{key}.lora_embedding_B"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight"
