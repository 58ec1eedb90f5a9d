"""Bone and MiSS: the paper's small network, fitted to one curve and adapted to another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn

import lorica

PAPER = (
    "the first gradient is larger than LoRA's, training is faster, and the validation loss of the"
    " adapted network is lower, at equal parameters, rate 1e-3 and 100 epochs."
)
SETTING = (
    "A network of one input, two hidden layers of 64 (tanh) and one output, fitted to sin 2πx, is"
    " adapted in its middle layer (256 parameters) to sin 2πx + 0.3 cos 3πx, 50 points with noise"
    " 0.05, 100 steps; error on 200 points without noise."
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ARMS = {
    "LoRA, r = 2": Arm("lora", RATES, {"r": 2, "lora_alpha": 2}),
    "Bone, r = 4": Arm("bone", RATES, {"r": 4}),
    "MiSS, r = 4": Arm("miss", RATES, {"r": 4}),
    "LoRA at 1e-3": Arm("lora", RATES[:1], {"r": 2, "lora_alpha": 2}),
    "Bone at 1e-3": Arm("bone", RATES[:1], {"r": 4}),
    "MiSS at 1e-3": Arm("miss", RATES[:1], {"r": 4}),
}
COLUMNS = {
    "error": Column("validation error x 1000", "low"),
    "fitted": Column("training error x 1000"),
    "gradient": Column("norm of the first gradient"),
}
CHOICE, SEEDS = "error", 5


def curve(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * torch.pi * x) + 0.3 * torch.cos(3 * torch.pi * x)


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    x, new = torch.rand(50, 1) * 2 - 1, torch.linspace(-1, 1, 200).unsqueeze(1)
    y = curve(x) + 0.05 * torch.randn(50, 1)
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(500):
        optimizer.zero_grad()
        (model(x) - torch.sin(2 * torch.pi * x)).square().mean().backward()
        optimizer.step()
    adapters = lorica.attach(
        model, arm.method, target_modules=["2"], seed=seed, verbose=False, **arm.fields
    )
    own = [t.parameter for t in adapters.trained()]
    (model(x) - y).square().mean().backward()
    gradient = sum(float(p.grad.square().sum()) for p in own if p.grad is not None) ** 0.5
    for p in own:
        p.grad = None
    losses = train(adapters, lambda _: (model(x) - y).square().mean(), lr=lr, steps=100, seed=seed)
    with torch.no_grad():
        error = float((model(new) - curve(new)).square().mean())
    return {"error": 1e3 * error, "fitted": 1e3 * losses[-1], "gradient": gradient}


def effects(seen: Seen) -> Iterable[Effect]:
    lora = "LoRA, r = 2"
    whys = {
        "Bone, r = 4": "The two fit the training points alike.",
        "MiSS, r = 4": "It fits the training points worse as well: all units of a shard get one and"
        " the same change, and what reads them weighs them with both signs.",
    }
    for arm, why in whys.items():
        yield Effect(f"{arm}: a larger first gradient", seen.above(arm, lora, "gradient"))
        better = seen.below(arm, lora, "error")
        yield Effect(f"{arm}: a lower error at the best rate of each", better, why)
    for arm, why in (("Bone", whys["Bone, r = 4"]), ("MiSS", whys["MiSS, r = 4"])):
        paper = seen.below(f"{arm} at 1e-3", "LoRA at 1e-3", "error")
        yield Effect(f"{arm}: a lower error at the paper's rate of 1e-3", paper, why)
