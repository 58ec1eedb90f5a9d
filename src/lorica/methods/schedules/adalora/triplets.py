"""Triplets of pairs with a diagonal: how much each matters, which of them stay, taking them away.

    I(w) = |w·∂L/∂w|;   Ī ← β₁Ī + (1−β₁)I;   Ū ← β₂Ū + (1−β₂)|I − Ī|, with the new Ī;   s = Ī·Ū
    S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ji)

Averages start at 0 and are not corrected for that. They are whole on every process, of parameters
and gradients that are read whole, so that all processes keep the same triplets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorica.interfaces import LayerLike
from lorica.methods.schedules.base import pair_of
from lorica.tensors import foreach
from lorica.tensors.dtensor_ops import copy_, read_full

SIDES = ("A", "B", "E")
Averages = dict[str, dict[str, Tensor]]  # module path -> side -> Ī or Ū


def sides(layer: LayerLike) -> dict[str, Tensor]:
    """The parameters A (r, in), B (out, r) and E (r, 1) of a layer's triplets."""
    pair = pair_of(layer)
    assert pair.E is not None
    return {"A": pair.A, "B": pair.B, "E": pair.E}


def final_mask(layer: LayerLike) -> Tensor:
    """1 where a triplet counts, 0 where it is gone for good (r, 1)."""
    mask = pair_of(layer).mask
    assert mask is not None
    return mask


def averages(layers: Mapping[str, LayerLike]) -> Averages:
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
    foreach.mul_(now, [read_full(p).detach().to(_wide(p)) for p in parameters])
    foreach.abs_(now)
    return now


@torch.no_grad()
def learn(
    mean: Averages, spread: Averages, layers: Mapping[str, LayerLike], beta1: float, beta2: float
) -> None:  # fmt: skip
    """Update Ī and Ū of these layers with this step's I."""
    if not layers:
        return
    where = [(name, side) for name in layers for side in SIDES]
    means, spreads = ([kept[name][side] for name, side in where] for kept in (mean, spread))
    now = sensitivity([p for layer in layers.values() for p in sides(layer).values()])
    foreach.lerp_(means, now, 1 - beta1)
    foreach.sub_(now, means)
    foreach.abs_(now)
    foreach.lerp_(spreads, now, 1 - beta2)


def forget(averages: Averages, layers: Iterable[str]) -> None:
    """Ī or Ū of these layers start anew, at 0, where there are any."""
    for name in layers:
        for kept in averages.get(name, {}).values():
            kept.zero_()


def smoothed(mean: Averages, spread: Averages) -> list[Tensor]:
    """S (r,) of every layer, of s = Ī·Ū."""
    return [
        _score(*foreach.mul([own[s] for s in SIDES], [spread[name][s] for s in SIDES]))
        for name, own in mean.items()
    ]


@torch.no_grad()
def instant(layers: Iterable[LayerLike]) -> list[Tensor]:
    """S (r,) of every layer, of s = I of this step."""
    return [_score(*sensitivity([*sides(layer).values()])) for layer in layers]


@torch.no_grad()
def magnitudes(layers: Iterable[LayerLike]) -> list[Tensor]:
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
    return list(torch.split(keep, [len(s) for s in scored]))


@torch.no_grad()
def mask_(layer: LayerLike, keep: Tensor) -> None:
    """E ← 0 where `keep` (r,) or (r, 1) is 0. The function changes; vectors and the optimizer's
    state stay."""
    E = sides(layer)["E"]
    whole = read_full(E)
    copy_(E, whole * read_full(keep).to(whole).view(-1, 1))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
