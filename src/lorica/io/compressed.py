"""A model whose layers no longer read their base: two thin layers in the place of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters import Adapters
from lorica.attach import merge
from lorica.layer import AdaptedLinear
from lorica.moves import read_full, reshard
from lorica.whole import replace


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What compressing did; `as_dict` is JSON-ready.

    `ranks` are those of the layers that became thin, {module path: rank}. Parameters are counted
    over the whole model (the base without its adapters before), multiplies for one token over the
    layers that were adapted.
    """

    ranks: Mapping[str, int]
    parameters_before: int
    parameters: int
    multiplies_before: int
    multiplies: int

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ranks": dict(self.ranks)}


@torch.no_grad()
def compress(model: nn.Module | Adapters) -> Compressed:
    """Leave a plain model with two thin `nn.Linear` in the place of each adapted layer, in place.

    For methods at whose end a layer is its update alone: x (s·BA)ᵀ + c becomes (x Aᵀ)(s·B)ᵀ + c,
    r·(in + out) parameters and multiplies for in·out. Ranks that are nothing are dropped. A layer
    that would not get smaller is merged into one dense layer. Tensors are rounded once to the
    base's dtype, as in `lorica.merge`.

    The pair is an `nn.Sequential`: models whose code reads a layer's `weight` (T5's feed-forward)
    cannot run with it. `load_compressed` reads the result's `state_dict()` back.

    Raises:
        ValueError: nothing is attached, a layer still reads its base, or the model is sharded.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> adapters = lorica.attach(model, "fade", r=2, verbose=False)
        >>> with torch.no_grad():
        ...     _ = adapters.layers["0"].update.delta.B.normal_()
        >>> adapters.layers["0"].combine.fade_(0.0)
        >>> done = compress(model)
        >>> done.ranks, done.parameters_before, done.parameters, done.multiplies
        ({'0': 2}, 272, 80, 64)
    """
    adapters = model if isinstance(model, Adapters) else Adapters.of(model)
    model = adapters.model
    reshard(model)
    before = sum(p.numel() for p in adapters.base_parameters().values())
    before += sum(p.numel() for m in adapters.saved.values() for p in m.base.parameters())
    made: dict[str, nn.Sequential] = {}
    ranks, whole, thin = {}, 0, 0
    for name, layer in adapters:
        dense = layer.in_features * layer.out_features
        pair = _pair(name, layer, adapters.recipe.text())
        narrow = len(pair[0].weight)  # type: ignore[arg-type]
        cost = narrow * (layer.in_features + layer.out_features)
        whole, thin = whole + dense, thin + min(cost, dense)
        if cost < dense:
            made[name], ranks[name] = pair, narrow
    merge(model)
    replace(model, made)
    return Compressed(
        ranks=ranks,
        parameters_before=before,
        parameters=sum(p.numel() for p in model.parameters()),
        multiplies_before=whole,
        multiplies=thin,
    )


def load_compressed(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a plain model the shape and the tensors of one that `compress` left, in place.

    Args:
        model: as it was before it was adapted; its own weights don't count.
        state: `state_dict()` of the compressed model.

    Raises:
        RuntimeError: torch's, where tensors are missing, left over or of another shape.
    """
    made: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        down, up = state.get(f"{name}.0.weight"), state.get(f"{name}.1.weight")
        if f"{name}.weight" in state or down is None or up is None or [*module.children()]:
            continue
        made[name] = _sequence(down, up, state.get(f"{name}.1.bias")).train(module.training)
    replace(model, made)
    model.load_state_dict(state)
    return model


def _pair(name: str, layer: AdaptedLinear, method: str) -> nn.Sequential:
    left = layer.combine.remains(layer.update)
    if left is None:
        raise ValueError(
            f"{name!r} still reads its base, or its update is no product of two factors, so"
            f" `{method}` leaves no thin layers there; use `lorica.merge(model)`, or train to the"
            " end of a method that takes the base out"
        )
    factors, bias = left
    A, B = read_full(factors.A), read_full(factors.B) * factors.scale
    keep = A.any(1) & B.any(0)
    keep[0] |= ~keep.any()
    dtype = layer.store.parameter.dtype
    bias = None if bias is None else read_full(bias).to(dtype)
    return _sequence(A[keep].to(dtype), B[:, keep].to(dtype), bias).train(layer.training)


def _sequence(down: Tensor, up: Tensor, bias: Tensor | None) -> nn.Sequential:
    """Two layers that hold these tensors, (r, in) and (out, r)."""
    like = {"device": down.device, "dtype": down.dtype}
    first = nn.Linear(down.shape[1], down.shape[0], bias=False, **like)
    second = nn.Linear(up.shape[1], up.shape[0], bias=bias is not None, **like)
    for layer, weight in ((first, down), (second, up)):
        layer.weight = nn.Parameter(weight.detach().contiguous().clone())
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone())
    return nn.Sequential(first, second)
