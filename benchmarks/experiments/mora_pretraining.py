"""MoRA and ReMoRA: pre-training from random weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen, train
from _language import build, chain, two_back, weights

import lorica

PAPER = (
    "pre-training at equal size: perplexity of a 250M model 33.4 with LoRA, 32.2 with ReLoRA, 28.5"
    " with MoRA, 26.7 with ReMoRA."
)
SETTING = (
    "A Llama 64 wide with 2 layers learns from random weights, in 160 steps of 8 sentences, words"
    " that follow from the last two; frozen linear layers with r = 4, everything else trains;"
    " restarts every 40 steps. Loss on new"
    " sentences."
)
RATES = (1e-2, 3e-2)
LINKS = "relora(every=40, rewarm=5)"
REST: dict[str, Any] = {"r": 4, "train_rest": True}
ARMS = {
    "LoRA": Arm("lora", RATES, {**REST, "lora_alpha": 4}),
    "ReLoRA": Arm(LINKS, RATES, {**REST, "lora_alpha": 4}),
    "MoRA": Arm("mora(type=1)", (5e-3, *RATES), REST),
    "ReMoRA": Arm(f"mora(type=1)+{LINKS}", (5e-3, *RATES), REST),
    "full training": Arm("full", (3e-3, 1e-2), {"r": None}),
}
COLUMNS = {"loss": Column("loss", "low"), "rank": Column("singular values above a tenth, of 64")}
CHOICE, SEEDS = "loss", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    model, first, second = build(seed), chain(seed), chain(seed + 50)
    generator = torch.Generator().manual_seed(seed)
    adapters = lorica.attach(model, arm.method, fresh=(), seed=seed, verbose=False, **arm.fields)
    before = weights(adapters)

    def forward(_: int) -> torch.Tensor:
        return model(**two_back(first, second, generator, 8)).loss

    train(
        adapters, forward, lr=lr, steps=160, seed=seed,
        curve="cosine", warmup=10,
    )  # fmt: skip
    ranks = []
    for name, weight in weights(adapters).items():
        values = torch.linalg.svdvals(weight - before[name])
        ranks.append(float((values > 0.1 * values[0]).sum()))
    held_out = two_back(first, second, torch.Generator().manual_seed(10**6), 128)
    with torch.no_grad():
        end = float(model.eval()(**held_out).loss)
    return {"loss": end, "rank": sum(ranks) / len(ranks)}


def effects(seen: Seen) -> Iterable[Effect]:
    why = (
        "In a run this short the rank is not what holds LoRA back: full training ends no lower."
        if seen.mean("full training", "loss") > seen.mean("LoRA", "loss")
        else "Full training ends lower, so there is something for a higher rank to win."
    )
    for a, b in (("MoRA", "LoRA"), ("ReMoRA", "MoRA"), ("ReMoRA", "ReLoRA"), ("ReLoRA", "LoRA")):
        yield Effect(f"{a} below {b}", seen.below(a, b, "loss"), why)
    yield Effect("the rank of what was learnt rises in that order", [
        a < b < c < d for a, b, c, d in zip(
            *(seen.each(arm, "rank") for arm in ("LoRA", "ReLoRA", "MoRA", "ReMoRA")), strict=True)
    ])  # fmt: skip
