"""A teacher that no single update of low rank comes near: a random 64 x 64 layer learns another."""

from __future__ import annotations

from typing import Any

import torch
from _bench import Arm, finite, mean, train
from torch import Tensor, nn

import lorica

D, STEPS = 64, 800


def student(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    """{"left": the error at the end over the floor of any one rank-8 update, "rank": singular
    values of the change above 1 % of the largest, "spike": the largest loss of the 20 steps after a
    multiple of `every` over the mean of the 20 before, at worst}."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(D, D, bias=False))
    teacher = torch.randn(D, D, generator=generator) / D**0.5
    start = model[0].weight.detach().clone()
    adapters = lorica.attach(model, arm.method, **{"r": 8, **arm.fields}, seed=seed, verbose=False)
    base = start.clone()
    for _, pair in adapters.pairs():  # what the frozen weight is beside a start that is not zero
        base -= pair.scale * (pair.B @ pair.A).detach()
    floor = torch.linalg.svdvals(teacher - base)[8:].square().sum() / D

    def loss(_: int) -> Tensor:
        x = torch.randn(128, D, generator=generator)
        return nn.functional.mse_loss(model(x), x @ teacher.T)

    losses = train(
        adapters, loss, lr=lr, steps=STEPS, seed=seed, curve="cosine",
        warmup=arm.setting.get("warmup", 0),
    )  # fmt: skip
    layers = adapters.layers
    weight = (layers["0"].effective()[0] if layers else model[0].weight).detach()
    change = torch.linalg.svdvals(weight - start)
    every = arm.setting.get("every", STEPS)
    spikes = [
        max(losses[u : u + 20]) / mean(losses[u - 20 : u]) for u in range(every, STEPS, every)
    ]
    return {
        "left": finite((weight - teacher).square().sum() / D / floor),
        "rank": float((change > 0.01 * change[0]).sum()),
        "spike": max(spikes, default=1.0),
    }
