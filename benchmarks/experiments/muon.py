"""Muon: orthogonal steps for whole matrices, and for the factors of a low-rank update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen, train
from _language import batch, build, chain, loss, pretrained, shifted
from torch import Tensor

import lorica

PAPER = (
    "hidden matrices learn faster when their momentum is orthogonalised; the papers say so of"
    " training from scratch in full, and nothing of the factors A and B, each of which is then"
    " orthogonalised on its own."
)
SETTING = (
    "A Llama 64 wide with 2 layers, on sentences of a Markov chain. From scratch: 200 steps of 16"
    " sentences, cosine to 0. Adapted: pre-trained on one chain, 150 steps on another, r = 4."
)
FULL = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
LOW = (1e-2, 2e-2, 4e-2, 8e-2)
SCRATCH: dict[str, Any] = {"scratch": True}
ARMS = {
    "from scratch, AdamW": Arm("full", FULL, {}, SCRATCH),
    "from scratch, Muon": Arm("full+muon", (*FULL, 6.4e-2, 1.28e-1), {}, SCRATCH),
    "LoRA, AdamW": Arm("lora", LOW, {"r": 4}),
    "LoRA, Muon on the factors": Arm("lora+muon", LOW, {"r": 4}),
    "LoRA, Riemannian": Arm("lora+riemannian", LOW, {"r": 4}),
}
COLUMNS = {"loss": Column("loss on held-out sentences", "low")}
CHOICE, SEEDS = "loss", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    scratch = arm.setting.get("scratch", False)
    model = build(seed) if scratch else pretrained(seed)
    chances = chain(seed) if scratch else shifted(seed)
    adapters = lorica.attach(model, arm.method, **arm.fields, seed=seed, verbose=False)
    generator = torch.Generator().manual_seed(seed + 77)

    def task(_: int) -> Tensor:
        return model(**batch(chances, generator)).loss

    train(adapters, task, lr=lr, steps=200 if scratch else 150, seed=seed, curve="cosine")
    return {"loss": loss(model, chances)}


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect(
        "from scratch, a lower loss than AdamW",
        seen.below("from scratch, Muon", "from scratch, AdamW", "loss"),
    )
    yield Effect(
        "on the factors, a lower loss than AdamW",
        seen.below("LoRA, Muon on the factors", "LoRA, AdamW", "loss"),
        "The model sees BA, and orthogonal steps of A and of B make no orthogonal step of BA.",
    )
    yield Effect(
        "on the factors, a lower loss than the Riemannian rule, which sees both",
        seen.below("LoRA, Muon on the factors", "LoRA, Riemannian", "loss"),
    )
