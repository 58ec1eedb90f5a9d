"""AdaLoRA: ranks go to the layers that need them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn

import lorica

PAPER = (
    "at equal size, ranks that move to the layers that need them beat equal ranks (GLUE average"
    " 89.3 against LoRA's 88.3), and an importance that is averaged over steps chooses better than"
    " that of one step."
)
SETTING = (
    "Three 24 x 24 layers side by side have to learn changes of rank 5, 1 and 0; rank 2 on average;"
    " 300 steps. The budget falls from 18 ranks to 6."
)
NEEDS = (5, 1, 0)
RATES = (1e-2, 3e-2, 6e-2, 1e-1)
ARMS = {
    "equal ranks": Arm("lora", RATES),
    "AdaLoRA": Arm("adalora(init_r=6)", RATES),
    "importance of one step": Arm("adalora(init_r=6, importance='instant')", RATES),
    "importance is size": Arm("adalora(init_r=6, importance='magnitude')", RATES),
}
COLUMNS = {
    "loss": Column("loss at the end, of that at the start", "low"),
    "first": Column("rank of the first layer"),
    "last": Column("of the last"),
}
CHOICE, SEEDS = "loss", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in NEEDS)
    goals = []
    for layer, need in zip(model, NEEDS, strict=True):
        change = torch.randn(24, need) @ torch.randn(need, 24) + 0.01 * torch.randn(24, 24)
        goals.append(layer.weight.detach() + change / 24)  # type: ignore[operator]
    adapters = lorica.attach(model, arm.method, r=2, seed=seed, verbose=False)

    def loss(_: int) -> torch.Tensor:
        x = torch.randn(64, 24)
        off = [(la(x) - x @ g.T).square().mean() for la, g in zip(model, goals, strict=True)]
        return torch.stack(off).sum()

    losses = train(adapters, loss, lr=lr, steps=300, seed=seed)
    ranks = [len(p.A) if p.E is None else int(p.E.count_nonzero()) for _, p in adapters.pairs()]
    return {"loss": sum(losses[-20:]) / 20 / losses[0], "first": ranks[0], "last": ranks[-1]}


def effects(seen: Seen) -> Iterable[Effect]:
    first, last = (seen.each("AdaLoRA", c) for c in ("first", "last"))
    yield Effect(
        "ranks 5, 1, 0 are found", [(a, b) == (5, 0) for a, b in zip(first, last, strict=True)]
    )
    yield Effect("a lower loss than equal ranks", seen.below("AdaLoRA", "equal ranks", "loss"))
    averaged, instant = (seen.at(a, 3e-2, "loss") for a in ("AdaLoRA", "importance of one step"))
    yield Effect(
        "a lower loss than with the importance of one step, both at 3e-2",
        [a < b for a, b in zip(averaged, instant, strict=True)],
        "At that rate neither finds the planted ranks with every seed.",
    )
    why = (
        "At its best rate each of them finds the planted ranks, so none can choose better; what"
        " remains is the rest of the training."
    )
    yield Effect(
        "a lower loss than with the importance of one step, at the best rate of each",
        seen.below("AdaLoRA", "importance of one step", "loss"),
        why,
    )
    yield Effect(
        "a lower loss than with the size of λ as importance, at the best rate of each",
        seen.below("AdaLoRA", "importance is size", "loss"),
        why,
    )
