"""One square layer: wanted changes of its weight with a flat and a decaying spectrum, and pairs to
remember."""

from __future__ import annotations

from typing import Any

import torch
from _bench import Arm, Column, train
from torch import Tensor, nn

import lorica

D = 64
COLUMNS = {
    "flat": Column("flat spectrum, part captured", "high"),
    "decaying": Column("decaying spectrum, part captured", "high"),
    "few": Column("64 pairs, part recalled", "high"),
    "many": Column("128 pairs, part recalled", "high"),
}


def wanted(kind: str, seed: int) -> Tensor:
    """(64, 64), norm 1: all singular values alike, or exp(−i/4)."""
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(D, D)).Q for _ in range(2))
    values = torch.ones(D) if kind == "flat" else torch.exp(-torch.arange(D) / 4)
    change = left @ values.diag() @ right.T
    return change / change.norm()


def captured(
    arm: Arm, target: Tensor, lr: float, seed: int, *, steps: int = 300, curve: str = "linear"
) -> float:
    """Part of ‖target‖² that the change of a layer's weight meets after training on it."""
    torch.manual_seed(seed)
    size = len(target)
    model: Any = nn.Sequential(nn.Linear(size, size, bias=False))
    if not arm.setting.get("base"):
        nn.init.zeros_(model[0].weight)
    adapters = lorica.attach(model, arm.method, seed=seed, verbose=False, **arm.fields)
    layer = adapters.layers["0"]
    start = layer.effective()[0].detach().clone()

    def off(_: int) -> Tensor:
        return (layer.effective()[0] - start - target).square().sum() / target.square().sum()

    train(adapters, off, lr=lr, steps=steps, seed=seed, curve=curve)
    return 1 - off(0).item()


def recalled(arm: Arm, pairs: int, r: int, lr: float, seed: int, steps: int = 300) -> float:
    """Part of so many random vectors that an adapted layer maps to their label, of 64."""
    torch.manual_seed(seed)
    x, labels = torch.randn(pairs, D), torch.randint(0, D, (pairs,))
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    adapters = lorica.attach(model, arm.method, **{**arm.fields, "r": r}, seed=seed, verbose=False)
    train(
        adapters, lambda _: nn.functional.cross_entropy(model(x), labels),
        lr=lr, steps=steps, seed=seed, curve="linear",
    )  # fmt: skip
    return float((model(x).argmax(1) == labels).float().mean())


def all_four(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    """COLUMNS; memory at half the rank."""
    half = arm.fields["r"] // 2
    return {
        **{k: captured(arm, wanted(k, seed), lr, seed) for k in ("flat", "decaying")},
        "few": recalled(arm, 64, half, lr, seed),
        "many": recalled(arm, 128, half, lr, seed),
    }
