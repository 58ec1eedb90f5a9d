"""RAC-LoRA: the paper's counter-example, where only a chain of half-updates converges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn

import lorica

PAPER = (
    "with the step size 1/L, RAC-LoRA converges to the minimum of a quadratic on which LoRA and"
    " COLA diverge and a frozen factor alone (AsymmLoRA) stalls; with smaller steps COLA stalls."
)
SETTING = (
    "f(W) = ½⟨vec W − b, M (vec W − b)⟩, W 3 x 3, M = diag(10, 1, ..., 1), L = 10, r = 1, gradient"
    " descent, 1,000 steps, at 1/L and at 1/(10L)."
)
DESCENT = "+sgd(momentum=0)"
METHODS = {
    "RAC-LoRA": "raclora(every=1, sketch='orthonormal', accumulate='base')",
    "LoRA": "lora+gaussian",
    "AsymmLoRA": "lorafa+gaussian",
    "COLA": "cola(every=10, lr_scheduler_type='continued', accumulate='base')+gaussian",
}
STEPS = {"1/L": 0.1, "1/(10L)": 0.01}
ARMS = {
    f"{name}, {step}": Arm(method + DESCENT, (lr,))
    for step, lr in STEPS.items()
    for name, method in METHODS.items()
}
COLUMNS = {"f": Column("f at the end (inf: diverged)", "low")}
CHOICE, SEEDS = "f", 5


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    M = torch.ones(3, 3, dtype=torch.float64)
    M[0, 0] = 10
    b = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model: Any = nn.Sequential(nn.Linear(3, 3, bias=False, dtype=torch.float64))
    model[0].weight.data.zero_()
    adapters = lorica.attach(
        model, arm.method, r=1, lora_alpha=1, seed=seed, dtype=torch.float64, verbose=False
    )
    eye = torch.eye(3, dtype=torch.float64)

    def loss(_: int) -> torch.Tensor:
        return (M * (model(eye).T - b).square()).sum() / 2

    losses = train(adapters, loss, lr=lr, steps=1000, seed=seed)
    return {"f": losses[-1] if losses[-1] < 1e9 else math.inf}


def effects(seen: Seen) -> Iterable[Effect]:
    def reached(name: str, step: str) -> list[bool]:
        return [f < 1e-6 for f in seen.each(f"{name}, {step}", "f")]

    yield Effect("RAC-LoRA converges at 1/L (below 1e-6)", reached("RAC-LoRA", "1/L"))
    for name in ("LoRA", "AsymmLoRA", "COLA"):
        yield Effect(f"{name} does not, at 1/L", [not r for r in reached(name, "1/L")])
    for name in ("LoRA", "AsymmLoRA"):
        yield Effect(
            f"{name} stalls at 1/(10L)", [f > 0.1 for f in seen.each(f"{name}, 1/(10L)", "f")]
        )
    yield Effect(
        "COLA stalls at 1/(10L)",
        [f > 0.1 for f in seen.each("COLA, 1/(10L)", "f")],
        "A fresh Gaussian factor in each link shows every direction sooner or later, and both"
        " factors learn: it converges, faster than RAC-LoRA.",
    )
