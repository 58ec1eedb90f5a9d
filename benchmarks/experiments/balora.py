"""BA-LoRA: three penalties on the outputs, over a PiSSA start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen, train
from _language import batch, chain, pretrained

import lorica

PAPER = (
    "consistency with the original model, diverse outputs and a concentrated spectrum of the"
    " outputs beat PiSSA alone (average of five benchmarks 26.2 against 21.5 with a 7B model)."
)
SETTING = (
    "A Llama 64 wide knows two tagged Markov chains and learns a third in 50 steps, r = 8, weights"
    " of the terms constant; on new sentences."
)
CONSTANT = "+schedules.balora(floor=1, wait=0, ramp=0)"
RATES = (3e-3, 1e-2)


def term(**weights: float) -> Arm:
    given = ", ".join(f"{k}={v:g}" for k, v in {"cr": 0, "dr": 0, "svdr": 0, **weights}.items())
    return Arm(f"balora({given}){CONSTANT}", RATES)


ARMS = {
    "PiSSA": Arm("pissa", RATES),
    "published weights": Arm("balora", RATES),
    "consistency 0.1": term(cr=0.1),
    "consistency 1": term(cr=1),
    "diversity 0.3": term(dr=0.3),
    "spectrum 1": term(svdr=1),
}
COLUMNS = {
    "loss": Column("loss on the new chain", "low"),
    "old": Column("loss on the first chain"),
    "kl": Column("KL to the original on the first chain"),
    "entropy": Column("entropy of the 20 likeliest"),
    "energy": Column("part of ‖Z‖² in 10 directions"),
}
CHOICE, SEEDS = "loss", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    model = pretrained(seed, steps=300, tags=True)
    old, new = chain(seed), chain(seed + 200)
    adapters = lorica.attach(
        model, arm.method, r=8, target_modules="all-linear", fresh=(), seed=seed, verbose=False
    )
    generator = torch.Generator().manual_seed(77 + seed)

    def loss(_: int) -> tuple[Any, Any]:
        inputs = batch(new, generator, tag=2)
        return model(**inputs), inputs

    train(adapters, loss, lr=lr, steps=50, seed=seed)
    held_out = torch.Generator().manual_seed(10**6)
    first, third = batch(old, held_out, 128, 0), batch(new, held_out, 128, 2)
    with torch.no_grad():
        before, after = model(**first), model(**third)
        own = before.logits[:, :-1].log_softmax(-1)
        with adapters.disabled():
            original = model(**first).logits[:, :-1].log_softmax(-1)
        top = after.logits[:, :-1].topk(20, -1).values.log_softmax(-1)
        values = torch.linalg.svdvals(after.logits[:, :-1].flatten(0, 1)).square()
    return {
        "loss": float(after.loss),
        "old": float(before.loss),
        "kl": float((original.exp() * (original - own)).sum(-1).mean()),
        "entropy": float(-(top.exp() * top).sum(-1).mean()),
        "energy": float(values[:10].sum() / values.sum()),
    }


def effects(seen: Seen) -> Iterable[Effect]:
    near, nearer = "consistency 0.1", "consistency 1"
    falls = zip(seen.below(near, "PiSSA", "kl"), seen.below(nearer, near, "kl"), strict=True)
    yield Effect("consistency: the KL to the original falls with its weight",
                 [a and b for a, b in falls])  # fmt: skip
    yield Effect("consistency: less is forgotten of the first chain",
                 seen.below(nearer, "PiSSA", "old"))  # fmt: skip
    yield Effect("diversity: the entropy rises", seen.above("diversity 0.3", "PiSSA", "entropy"))
    yield Effect("spectrum: the leading directions gain",
                 seen.above("spectrum 1", "PiSSA", "energy"))  # fmt: skip
    yield Effect(
        "published weights: a lower loss on the new task than PiSSA",
        seen.below("published weights", "PiSSA", "loss"),
        "The published weights are small beside the task's loss: every column is nearly PiSSA's.",
    )
