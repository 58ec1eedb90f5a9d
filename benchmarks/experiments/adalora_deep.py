"""AdaLoRA: one layer of four needs rank, through the others' activations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn

import lorica

PAPER = "as in `adalora`: a lower loss than LoRA at the same total rank."
SETTING = (
    "A tanh network of four layers, 48 wide, learns a copy whose second layer differs by a change"
    " of rank 6; 8 ranks in all, from 24 down; validation error on new inputs; 800 steps."
)
ARMS = {
    "LoRA": Arm("lora", (2e-3, 5e-3, 2e-2)),
    "AdaLoRA": Arm("adalora(init_r=6, deltaT=10, orth_reg_weight=0.1)", (5e-3, 2e-2, 5e-2, 1e-1)),
}
COLUMNS = {
    "error": Column("validation error x 1000", "low"),
    "planted": Column("ranks of the changed layer, of 8"),
    "first": Column("of the first"),
}
CHOICE, SEEDS = "error", 3


def network() -> nn.Sequential:
    layers = [m for _ in range(4) for m in (nn.Linear(48, 48, bias=False), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model, goal = network(), network()
    goal.load_state_dict(model.state_dict())
    with torch.no_grad():
        goal[2].weight.add_(torch.randn(48, 6) @ torch.randn(6, 48) / 48)  # type: ignore[operator]
    adapters = lorica.attach(model, arm.method, r=2, seed=seed, verbose=False)

    def loss(_: int) -> torch.Tensor:
        x = 2 * torch.randn(64, 48)
        return nn.functional.mse_loss(model(x), goal(x).detach())

    train(adapters, loss, lr=lr, steps=800, seed=seed)
    with torch.no_grad():
        x = 2 * torch.randn(2000, 48)
        error = nn.functional.mse_loss(model(x), goal(x)).item()
    ranks = [len(p.A) if p.E is None else int(p.E.count_nonzero()) for _, p in adapters.pairs()]
    return {"error": 1e3 * error, "planted": ranks[1], "first": ranks[0]}


def effects(seen: Seen) -> Iterable[Effect]:
    more = zip(seen.each("AdaLoRA", "planted"), seen.each("AdaLoRA", "first"), strict=True)
    yield Effect("the changed layer ends with more than its equal share of 2 ranks, and more than"
                 " the first", [a > 2 and a > b for a, b in more])  # fmt: skip
    yield Effect(
        "a lower error than LoRA",
        seen.below("AdaLoRA", "LoRA", "error"),
        "The changed layer is left with fewer ranks than it needs, and where the others have ranks"
        " to spare they make up for it.",
    )
