"""SoRA: ranks that are not needed shut themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, mean, train
from torch import nn

import lorica

PAPER = (
    "a sparse gate for each rank closes what is not needed: 70 % of the parameters at no loss of"
    " quality, and the higher the threshold the fewer ranks."
)
SETTING = (
    "A 24 x 24 map learns a change of rank 3 with eight gated ranks, 500 steps; the rate of each"
    " arm is that with the lowest loss."
)
RATES = (5e-3, 1e-2, 2e-2)
LEVELS = (0.1, 0.3, 1.0)
ARMS = {"no threshold": Arm("gated", RATES)} | {
    f"threshold {level:g}": Arm(f"sora(threshold={level})", RATES) for level in LEVELS
}
COLUMNS = {"loss": Column("loss, of that at the start", "low"), "gates": Column("open gates of 8")}
CHOICE, SEEDS = "loss", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 24, bias=False))
    change = torch.randn(24, 3) @ torch.randn(3, 24) / 24**0.5
    goal = model[0].weight.detach() + change  # type: ignore[operator]
    adapters = lorica.attach(model, arm.method, r=8, seed=seed, verbose=False)

    def loss(_: int) -> torch.Tensor:
        x = torch.randn(64, 24)
        return nn.functional.mse_loss(model(x), x @ goal.T)

    losses = train(adapters, loss, lr=lr, steps=500, seed=seed)
    (pair,) = (p for _, p in adapters.pairs())
    assert pair.E is not None
    return {"loss": mean(losses[-20:]) / losses[0], "gates": int(pair.E.count_nonzero())}


def effects(seen: Seen) -> Iterable[Effect]:
    counts = [seen.each(arm, "gates") for arm in ARMS]
    falling = [all(a >= b for a, b in zip(c, c[1:], strict=False)) and c[0] > c[-1]
               for c in zip(*counts, strict=True)]  # fmt: skip
    yield Effect("the higher the threshold, the fewer open gates", falling)
    yield Effect(
        "never fewer than the 3 that are needed", [min(c) >= 3 for c in zip(*counts, strict=True)]
    )
    close = zip(
        seen.each("threshold 0.3", "gates"), seen.each("threshold 0.3", "loss"), strict=True
    )
    yield Effect("threshold 0.3 closes gates, and less than 1e-4 of the loss is left",
                 [a < 8 and b < 1e-4 for a, b in close])  # fmt: skip
    yield Effect(
        "threshold 0.3 closes gates at the loss that no threshold has",
        [a < b and c for a, b, c in zip(
            seen.each("threshold 0.3", "gates"), seen.each("no threshold", "gates"),
            seen.below("threshold 0.3", "no threshold", "loss", 1.05), strict=True)],
        "Each step pulls the open gates towards 0, too, so what they let through stays a little too"
        " small.",
    )  # fmt: skip
