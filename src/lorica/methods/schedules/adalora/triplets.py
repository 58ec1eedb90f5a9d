"""Triplets of pairs with a diagonal: how much each matters, which of them stay, taking them away.

    I(w) = |w·∂L/∂w|;   Ī ← β₁Ī + (1−β₁)I;   Ū ← β₂Ū + (1−β₂)|I − Ī|, with the new Ī;   s = Ī·Ū
    S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ji)

Averages start at 0 and are not corrected for that. They are whole on every process, of parameters
and gradients that are read whole, so that all processes keep the same triplets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_abs_,  # type: ignore[attr-defined]
    _foreach_lerp_,  # type: ignore[attr-defined]
    _foreach_mul,  # type: ignore[attr-defined]
    _foreach_mul_,  # type: ignore[attr-defined]
    _foreach_sub_,  # type: ignore[attr-defined]
)

from lorica.tensors.dtensor_ops import copy_, read_full

SIDES = ("A", "B", "E")


def sides(layer: Any) -> dict[str, Tensor]:
    """The parameters A (r, in), B (out, r) and E (r, 1) of a layer's triplets."""
    pair = layer.update.delta.pair()
    return {side: getattr(pair, side) for side in SIDES}


def averages(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Ī or Ū of every layer, at 0."""
    return {
        name: {
            side: torch.zeros(p.shape, dtype=_wide(p), device=p.device)
            for side, p in sides(layer).items()
        }
        for name, layer in layers.items()
    }


def sensitivity(parameters: Sequence[Tensor]) -> list[Tensor]:
    """I of each, whole; 0 without a gradient, and where it is not finite: such a gradient moves
    nothing."""
    now = [
        torch.zeros(p.shape, dtype=_wide(p), device=p.device)
        if p.grad is None
        else read_full(p.grad).to(_wide(p), copy=True).nan_to_num_(0, 0, 0)
        for p in parameters
    ]
    _foreach_mul_(now, [read_full(p).detach().to(_wide(p)) for p in parameters])
    _foreach_abs_(now)
    return now


@torch.no_grad()
def learn(
    mean: dict[str, Any], spread: dict[str, Any], layers: Mapping[str, Any], beta1: float,
    beta2: float,
) -> None:  # fmt: skip
    """Move Ī and Ū of these layers on by this step's I."""
    if not layers:
        return
    where = [(name, side) for name in layers for side in SIDES]
    means, spreads = ([kept[name][side] for name, side in where] for kept in (mean, spread))
    now = sensitivity([p for layer in layers.values() for p in sides(layer).values()])
    _foreach_lerp_(means, now, 1 - beta1)
    _foreach_sub_(now, means)
    _foreach_abs_(now)
    _foreach_lerp_(spreads, now, 1 - beta2)


def forget(averages: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Ī or Ū of these layers start anew, at 0, where there are any."""
    for name in layers:
        for kept in averages.get(name, {}).values():
            kept.zero_()


def smoothed(mean: Mapping[str, Any], spread: Mapping[str, Any]) -> list[Tensor]:
    """S (r,) of every layer, of s = Ī·Ū."""
    return [
        _score(*_foreach_mul([own[s] for s in SIDES], [spread[name][s] for s in SIDES]))
        for name, own in mean.items()
    ]


@torch.no_grad()
def instant(layers: Iterable[Any]) -> list[Tensor]:
    """S (r,) of every layer, of s = I of this step."""
    return [_score(*sensitivity([*sides(layer).values()])) for layer in layers]


@torch.no_grad()
def magnitudes(layers: Iterable[Any]) -> list[Tensor]:
    """|λ| (r,) of every layer."""
    return [read_full(sides(layer)["E"]).flatten().abs() for layer in layers]


def _score(A: Tensor, B: Tensor, E: Tensor) -> Tensor:
    return E.flatten() + A.mean(1) + B.mean(0)


def best(scored: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which triplets (r,) of each layer are among the `budget` highest of all; among equals the
    first."""
    every = torch.cat([s.cpu().double() for s in scored])
    keep = torch.zeros(len(every), dtype=torch.bool)
    keep[every.sort(descending=True, stable=True).indices[:budget]] = True
    return list(keep.split([len(s) for s in scored]))


@torch.no_grad()
def mask_(layer: Any, keep: Tensor) -> None:
    """E ← 0 where `keep` (r,) or (r, 1) is not. The function changes; vectors and the optimizer's
    state stay."""
    E = layer.update.delta.pair().E
    whole = read_full(E)
    copy_(E, whole * read_full(keep).to(whole).view(-1, 1))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
