"""RM-LoRA: a penalty and random masks raise the rank that is used."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn

import lorica

PAPER = (
    "an orthogonality penalty and gradients for random half of the ranks push the update to use all"
    " its directions, and it generalises better than LoRA at the same or lower budget."
)
SETTING = (
    "A 32 x 32 layer learns a change of rank 16 with a falling spectrum, r = 8, 600 steps;"
    " effective rank is exp of the spectrum's entropy, of 8."
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ARMS = {
    "LoRA": Arm("lora", RATES),
    "mask alone": Arm("rmlora(gamma=0)", RATES),
    "penalty alone": Arm("lora+orthogonality(weight=0.1)", RATES),
    "RM-LoRA": Arm("rmlora(gamma=0.1)", RATES),
}
COLUMNS = {"error": Column("validation error", "low"), "rank": Column("effective rank")}
CHOICE, SEEDS = "error", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    left, right = (torch.linalg.qr(torch.randn(32, 16))[0] for _ in range(2))
    change = left @ torch.diag(3 * 0.8 ** torch.arange(16)) @ right.T
    goal = model[0].weight.detach() + change  # type: ignore[operator]
    adapters = lorica.attach(model, arm.method, r=8, seed=seed, verbose=False)

    def loss(_: int) -> torch.Tensor:
        x = torch.randn(64, 32)
        return nn.functional.mse_loss(model(x), x @ goal.T)

    train(adapters, loss, lr=lr, steps=600, seed=seed)
    layer = adapters.layers["0"]
    share = torch.linalg.svdvals(layer.update.weight(layer.store).detach())[:8]
    share = share / share.sum()
    with torch.no_grad():
        x = torch.randn(1000, 32)
        error = nn.functional.mse_loss(model(x), x @ goal.T).item()
    return {"error": error, "rank": torch.exp(-(share * share.log()).sum()).item()}


def effects(seen: Seen) -> Iterable[Effect]:
    for arm in ("penalty alone", "RM-LoRA"):
        yield Effect(f"{arm}: a higher effective rank", seen.above(arm, "LoRA", "rank", 1.02))
    yield Effect(
        "mask alone: a higher effective rank",
        seen.above("mask alone", "LoRA", "rank", 1.02),
        "Every rank has its turn, so the mask slows all of them alike and changes no minimum.",
    )
    yield Effect(
        "RM-LoRA: a lower validation error",
        seen.below("RM-LoRA", "LoRA", "error"),
        "LoRA reaches the best approximation of rank 8, whose effective rank is LoRA's figure: the"
        " target's spectrum falls. A higher effective rank is further from it.",
    )
