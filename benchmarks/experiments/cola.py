"""COLA: a chain of updates, each learnt on what the last one left."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _linear import student

PAPER = (
    "a chain of low-rank updates, each tied to the model before the next one starts, reaches"
    " further than one LoRA of that rank at the same memory (up to 6.5 % relative over LoRA on"
    " WSC)."
)
SETTING = "A linear teacher that is a change of rank 24 away, r = 2, 1,200 steps."
RATES = (5e-3, 1e-2, 2e-2)
ARMS = {
    "LoRA": Arm("lora", RATES, {}, {"curve": "cosine"}),
    "LoRA, r = 16": Arm("lora", RATES, {"r": 16, "lora_alpha": 16}, {"curve": "cosine"}),
    "COLA, 3 links": Arm("cola(every=400)", RATES),
    "COLA, 10 links": Arm("cola(every=120)", RATES),
    "COLA, 50 links": Arm("cola(every=24)", RATES),
}
COLUMNS = {"left": Column("part of the change that is left", "low")}
CHOICE, SEEDS = "left", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    return {"left": student(arm, lr, seed)["left"]}


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect("10 links reach further than LoRA", seen.below("COLA, 10 links", "LoRA", "left"))
    yield Effect("longer chains reach further: 3 links, then 10",
                 seen.below("COLA, 10 links", "COLA, 3 links", "left"))  # fmt: skip
    yield Effect("10 links of rank 2 are as good as LoRA of rank 16",
                 seen.below("COLA, 10 links", "LoRA, r = 16", "left", 1.2))  # fmt: skip
    yield Effect(
        "50 links reach further than 10", seen.below("COLA, 50 links", "COLA, 10 links", "left"),
        "A link of 24 steps, from B = 0 and through a whole cosine, is too short to learn its"
        " part.",
    )  # fmt: skip
