"""PRILoRA: ranks that grow with depth, and pruning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn

import lorica

PAPER = (
    "ranks that rise linearly with depth, with half of A pruned by weight and input, beat equal"
    " ranks of the same total on GLUE."
)
SETTING = (
    "Six residual tanh layers, 40 wide, learn changes whose size and rank grow with depth, inputs"
    " over 1.5 decades of size; rank 4 on average, 500 steps; error on new inputs."
)
RATES = (3e-3, 1e-2)
ARMS = {
    "equal ranks": Arm("lora", RATES),
    "rising": Arm("linear", RATES),
    "falling": Arm("linear(first=6)", RATES),
    "PRILoRA: rising, pruned": Arm("prilora", RATES),
}
COLUMNS = {"error": Column("validation error x 1000", "low")}
CHOICE, SEEDS = "error", 3


class Deep(nn.Module):
    """Six residual layers."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model, goal = Deep(), Deep()
    goal.load_state_dict(model.state_dict())
    with torch.no_grad():
        for i, layer in enumerate(goal.layers):
            rank = 2 + 2 * i
            change = torch.randn(40, rank) @ torch.randn(rank, 40) / 40
            layer.weight.add_(0.08 * (i + 1) * change)  # type: ignore[operator]
    sizes = torch.logspace(-1.0, 0.5, 40)
    adapters = lorica.attach(model, arm.method, r=4, seed=seed, verbose=False)

    def loss(_: int) -> torch.Tensor:
        x = torch.randn(64, 40) * sizes
        with torch.no_grad():
            y = goal(x)
        return nn.functional.mse_loss(model(x), y)

    train(adapters, loss, lr=lr, steps=500, seed=seed)
    with torch.no_grad():
        x = torch.randn(2000, 40) * sizes
        return {"error": 1e3 * nn.functional.mse_loss(model(x), goal(x)).item()}


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect("rising ranks beat equal ones", seen.below("rising", "equal ranks", "error"))
    yield Effect("falling ranks are worse than equal ones",
                 seen.above("falling", "equal ranks", "error"))  # fmt: skip
    yield Effect("with pruning, still better than equal ranks",
                 seen.below("PRILoRA: rising, pruned", "equal ranks", "error"))  # fmt: skip
    yield Effect(
        "pruning costs nothing",
        seen.below("PRILoRA: rising, pruned", "rising", "error", 1.02),
        "Half of each row of A is set to zero every 40 steps: a jump of the function that has to be"
        " learnt again.",
    )
