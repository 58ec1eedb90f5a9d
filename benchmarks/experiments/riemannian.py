"""Riemannian preconditioning: the condition number plays no part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen
from torch import nn

import lorica

PAPER = (
    "gradient descent in the metric of the product needs as many steps for an ill-conditioned"
    " target as for a good one; plain descent needs more and more (GPT-2 on E2E: 66.6 to 69.2"
    " BLEU)."
)
SETTING = (
    "A 40 x 40 change of rank 4 and condition number κ is fitted from B = 0; steps to a relative"
    " error of 1e-3, 2,000 at most."
)
MOST = 2000
PLAIN, SCALED = "sgd(momentum=0)+gaussian", "riemannian(delta=1e-12, inner='sgd')+gaussian"
ADAM = "adamw+gaussian"
GRID = {"descent": (PLAIN, (0.3, 0.6, 1.0)), "in the metric": (SCALED, (0.5, 0.9)),
        "Adam": (ADAM, (3e-3, 1e-2, 3e-2))}  # fmt: skip
ARMS = {
    f"{name}, κ = {kappa}": Arm(method, rates, {}, {"kappa": kappa})
    for name, (method, rates) in GRID.items()
    for kappa in (1, 10, 100)
}
COLUMNS = {"steps": Column("steps", "low")}
CHOICE, SEEDS = "steps", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64)).Q for _ in range(2))
    values = 10 ** -torch.linspace(0, float(torch.tensor(arm.setting["kappa"]).log10()), 4)
    target = left @ values.double().diag() @ right.T
    model: Any = nn.Sequential(nn.Linear(40, 40, bias=False, dtype=torch.float64))
    nn.init.zeros_(model[0].weight)
    adapters = lorica.attach(
        model, arm.method, r=4, lora_alpha=4, dtype=torch.float64, seed=seed, verbose=False
    )
    ((_, pair),) = adapters.pairs()
    with torch.no_grad():
        pair.A.copy_(torch.randn(4, 40) / 40**0.5)
    optimizer = lorica.optimizer(adapters, lr=lr, seed=seed)
    layer = adapters.layers["0"]
    for step in range(MOST):
        off = (layer.effective()[0] - target).square().sum()
        if off.item() < 1e-6 * target.square().sum().item():
            return {"steps": step}
        if not off.item() < 1e9:
            break  # diverged
        (off / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"steps": MOST}


def effects(seen: Seen) -> Iterable[Effect]:
    good, bad = (seen.each(f"in the metric, κ = {k}", "steps") for k in (1, 100))
    yield Effect("in the metric: κ = 100 takes at most 10 steps more than κ = 1",
                 [b <= a + 10 for a, b in zip(good, bad, strict=True)])  # fmt: skip
    for k in (1, 10, 100):
        scaled, plain = f"in the metric, κ = {k}", f"descent, κ = {k}"
        yield Effect(
            f"fewer steps than plain descent at κ = {k}", seen.below(scaled, plain, "steps")
        )
    yield Effect("plain descent needs more steps the larger κ is", [
        a < b < c + (c == MOST) for a, b, c in zip(
            *(seen.each(f"descent, κ = {k}", "steps") for k in (1, 10, 100)), strict=True)
    ])  # fmt: skip
    yield Effect("fewer steps than Adam at κ = 100",
                 seen.below("in the metric, κ = 100", "Adam, κ = 100", "steps"))  # fmt: skip
