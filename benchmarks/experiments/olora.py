"""OLoRA and PiSSA: starts from the weight itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from _language import batch, loss, pretrained, shifted

import lorica

PAPER = (
    "an orthonormal start (OLoRA) or the principal components (PiSSA) converge faster than LoRA,"
    " and end better (GSM8K with a 7B model: LoRA 43, PiSSA 53)."
)
SETTING = (
    "A Llama 64 wide moves from one Markov chain to a mixture of it with another, r = 8; each"
    " column at its own best rate."
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
S = {"r": 8, "lora_alpha": 8}
ARMS = {
    "LoRA": Arm("lora", RATES, S),
    "OLoRA": Arm("olora", RATES, S),
    "PiSSA": Arm("pissa", RATES, S),
    "LoRA at 1e-3": Arm("lora", RATES[:1], S),
    "OLoRA at 1e-3": Arm("olora", RATES[:1], S),
    "PiSSA at 1e-3": Arm("pissa", RATES[:1], S),
}
COLUMNS = {"early": Column("loss after 30 steps", "low"), "end": Column("after 80", "low")}
CHOICE, SEEDS = "", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    model, new = pretrained(seed), shifted(seed)
    generator = torch.Generator().manual_seed(77 + seed)
    adapters = lorica.attach(model, arm.method, fresh=(), seed=seed, verbose=False, **arm.fields)
    early: list[float] = []

    def look(step: int) -> None:
        if step == 29:
            early.append(loss(model, new))

    train(
        adapters, lambda _: model(**batch(new, generator)).loss, lr=lr, steps=80, seed=seed,
        after=look,
    )  # fmt: skip
    return {"early": early[0], "end": loss(model, new)}


def effects(seen: Seen) -> Iterable[Effect]:
    for name in ("OLoRA", "PiSSA"):
        equal = f"{name} at 1e-3"
        yield Effect(f"{name}: faster at an equal rate of 1e-3 (30 steps)",
                     seen.below(equal, "LoRA at 1e-3", "early"))  # fmt: skip
        yield Effect(f"{name}: faster at the best rate of each (30 steps)",
                     seen.below(name, "LoRA", "early"))  # fmt: skip
        yield Effect(
            f"{name}: better in the end, at the best rate of each",
            seen.below(name, "LoRA", "end"),
            "A higher rate gives LoRA most of what the start gives.",
        )
