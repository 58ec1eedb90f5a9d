"""TT-LoRA: a train of tensors in place of two factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen
from _fit import captured

import lorica

PAPER = "as good as LoRA with far fewer parameters (about 2 % of them at equal accuracy)."
SETTING = (
    "A 256 x 256 layer learns a change that is itself a train of rank 4 (448 numbers), and one that"
    " is a general matrix of rank 4; 300 steps."
)
SHAPE = [8, 8, 4, 4, 8, 8]
ARMS = {
    "TT, r = 4": Arm(f"tt(shape={SHAPE})", (1e-2, 2e-2, 4e-2), {"r": 4}),
    "LoRA, r = 1": Arm("lora", (2e-2, 5e-2, 1e-1), {"r": 1}),
    "LoRA, r = 4": Arm("lora", (2e-2, 5e-2, 1e-1), {"r": 4}),
}
COLUMNS = {
    "train": Column("planted train, part captured", "high"),
    "general": Column("general rank 4, part captured", "high"),
    "size": Column("parameters"),
}
CHOICE, SEEDS = "", 3


def planted(seed: int) -> torch.Tensor:
    """A change that the train can express: its own, with every core drawn at random."""
    torch.manual_seed(seed)
    model: Any = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    adapters = lorica.attach(model, f"tt(shape={SHAPE}, start='zero')", r=4, verbose=False)
    for t in adapters.trained():
        torch.nn.init.normal_(t.parameter)
    layer = adapters.layers["0"]
    change = layer.update.weight(layer.store).detach()
    return 16 * change / change.norm()


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(100 + seed)
    general = torch.randn(256, 4) @ torch.randn(4, 256)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    adapters = lorica.attach(model, arm.method, verbose=False, **arm.fields)
    return {
        "train": captured(arm, planted(seed), lr, seed),
        "general": captured(arm, 16 * general / general.norm(), lr, seed),
        "size": float(adapters.summary.trainable),
    }


def effects(seen: Seen) -> Iterable[Effect]:
    tt = "TT, r = 4"
    yield Effect("on a train, more than LoRA of rank 1, with fewer parameters",
                 seen.above(tt, "LoRA, r = 1", "train"))  # fmt: skip
    yield Effect("on a train, as much as LoRA of its rank with a quarter of the parameters",
                 seen.above(tt, "LoRA, r = 4", "train", 0.97))  # fmt: skip
    yield Effect(
        "on a general change of rank 4, as much as LoRA of that rank",
        seen.above(tt, "LoRA, r = 4", "general", 0.97),
        "A general change of rank 4 has more numbers than the train has; the published claim is one"
        " about what real tasks need.",
    )
