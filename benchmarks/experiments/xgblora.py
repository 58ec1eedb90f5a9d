"""XGBLoRA: boosters of rank 1."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import Tensor, nn

import lorica

PAPER = (
    "many rank-1 boosters, each trained for a few steps on a random subset of layers, beat LoRA of"
    " a higher rank, and a rank of 1 is better than more."
)
SETTING = (
    "Four residual tanh layers, 32 wide, learn a copy whose weights differ by a rotation of rank 8"
    " each; 600 steps under one cosine, 50 boosters; error on new inputs, of the untuned."
)
RATES = (1e-2, 2e-2, 4e-2)
ARMS = {
    "LoRA, r = 1": Arm("lora", RATES, {"r": 1, "lora_alpha": 1}),
    "LoRA, r = 4": Arm("lora", RATES, {"r": 4, "lora_alpha": 4}),
    "boosters, all layers": Arm("xgblora(every=12, layers=1.0, accumulate='base')", RATES,
                                {"lora_alpha": 1}),
    "boosters, 2 of 4 layers": Arm("xgblora(every=12, layers=2, accumulate='base')", RATES,
                                   {"lora_alpha": 1}),
    "the same with r = 4": Arm("cola(every=12, lr_scheduler_type='continued', accumulate='base')",
                               RATES, {"r": 4, "lora_alpha": 4}),
}  # fmt: skip
COLUMNS = {"left": Column("part of the error that is left", "low")}
CHOICE, SEEDS = "left", 3


class Residual(nn.Module):
    """h ← h + ½·tanh(h Wᵀ), block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = h + 0.5 * torch.tanh(block(h))
        return h


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model, teacher = Residual(), Residual()
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, teacher.blocks, strict=True):
            ours.weight.copy_(normal(32, 32) / 32**0.5)  # type: ignore[operator]
            left, right = (torch.linalg.qr(normal(32, 8)).Q for _ in range(2))
            theirs.weight.copy_(ours.weight + left @ right.T)  # type: ignore[operator]
        x = normal(512, 32)
        y = teacher(x)
        untuned = (model(x) - y).square().mean()
    adapters = lorica.attach(model, arm.method, seed=seed, verbose=False, **arm.fields)

    def loss(_: int) -> Tensor:
        batch = normal(64, 32)
        with torch.no_grad():
            wanted = teacher(batch)
        return nn.functional.mse_loss(model(batch), wanted)

    train(adapters, loss, lr=lr, steps=600, seed=seed, curve="cosine")
    with torch.no_grad():
        return {"left": float((model(x) - y).square().mean() / untuned)}


def effects(seen: Seen) -> Iterable[Effect]:
    boosters, half = "boosters, all layers", "boosters, 2 of 4 layers"
    yield Effect("boosters beat LoRA of rank 1", seen.below(boosters, "LoRA, r = 1", "left"))
    yield Effect("boosters beat LoRA of rank 4", seen.below(boosters, "LoRA, r = 4", "left"))
    why = "At equal steps each layer trains for half of them."
    yield Effect("on half of the layers at a time, they still beat LoRA of rank 4",
                 seen.below(half, "LoRA, r = 4", "left"), why)  # fmt: skip
    yield Effect(
        "half of the layers at a time cost nothing", seen.below(half, boosters, "left", 1.05), why
    )
    yield Effect(
        "rank 1 is better than rank 4 in the same chain",
        seen.below(boosters, "the same with r = 4", "left"),
        "More room in a link does no harm here: what is to be learnt has rank 8 in each layer and"
        " there is no noise to overfit.",
    )
