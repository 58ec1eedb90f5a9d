"""LoRA-RITE: the run does not depend on how ΔW is split into factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen
from torch import nn

import lorica

PAPER = (
    "steps on ΔW are the same for every pair of factors with the same product, unlike Adam's, and"
    " training is better for it (Gemma-2B: 4.6 points on Super-Natural Instructions)."
)
SETTING = (
    "A 12 x 10 layer with r = 3 learns a change of rank 2 on batches of 16, 150 steps, from the"
    " same ΔW with (A, B), (A/10, 10B) and (10A, B/10)."
)
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
ARMS = {
    "Adam": Arm("adamw", RATES),
    "LoRA-RITE": Arm("lorarite", RATES),
    "Riemannian, Adam inside": Arm("riemannian", RATES),
}
COLUMNS = {
    "loss": Column("error from (A, B), of that at the start", "low"),
    "worst": Column("from the worst of three splits", "low"),
    "spread": Column("worst over best of the three", ""),
}
CHOICE, SEEDS = "loss", 3


def error(arm: Arm, lr: float, seed: int, factor: float) -> float:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model: Any = nn.Sequential(nn.Linear(10, 12, bias=False, dtype=torch.float64))
    nn.init.zeros_(model[0].weight)
    adapters = lorica.attach(
        model, arm.method, r=3, lora_alpha=3, dtype=torch.float64, seed=seed, verbose=False
    )
    ((_, pair),) = adapters.pairs()
    with torch.no_grad():
        pair.A.copy_(normal(3, 10) / factor / 10**0.5)
        pair.B.copy_(normal(12, 3) * factor / 12**0.5)
    target = normal(12, 2) @ normal(2, 10) / 5
    layer = adapters.layers["0"]

    def off() -> float:
        return (layer.effective()[0] - target).square().sum().item()

    first, optimizer = off(), lorica.optimizer(adapters, lr=lr, seed=seed)
    for _ in range(150):
        x = normal(16, 10)
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return off() / first


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    errors = [error(arm, lr, seed, factor) for factor in (1.0, 0.1, 10.0)]
    return {"loss": errors[0], "worst": max(errors), "spread": max(errors) / min(errors)}


def effects(seen: Seen) -> Iterable[Effect]:
    rite = seen.each("LoRA-RITE", "spread")
    yield Effect("the split plays no part at the best rate (spread under 1.001)",
                 [x < 1.001 for x in rite])  # fmt: skip
    yield Effect(
        "nor at ten times that rate",
        [x < 1.001 for x in seen.at("LoRA-RITE", 1e-1, "spread")],
        "At a rate too high for it the run is chaotic: the splits agree to the last bits at first,"
        " and that difference grows by itself until it shows.",
    )
    for arm in ("Adam", "Riemannian, Adam inside"):
        yield Effect(f"{arm}: it does (spread over 2)", [x > 2 for x in seen.each(arm, "spread")])
    yield Effect("a lower error than Adam from balanced factors, at the best rate of each",
                 seen.below("LoRA-RITE", "Adam", "loss"))  # fmt: skip
    yield Effect("a lower error than Adam from the worst split, at these rates",
                 seen.below("LoRA-RITE", "Adam", "worst"))  # fmt: skip
