"""RAC-LoRA: a chain with a frozen factor against one that trains both."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _linear import student

PAPER = (
    "from digits 0 to 4 to digits 5 to 9 at r = 1: AsymmLoRA 62 to 82 %, LoRA 84 to 87 %, RAC-LoRA"
    " 92 to 96 %, COLA 93 to 96 %; on GLUE RAC-LoRA 77.0, COLA 77.6, LoRA 78.5."
)
SETTING = "A linear teacher that is a change of rank 24 away, r = 2, 1,200 steps."
RATES = (5e-3, 1.5e-2)
CURVE = "lr_scheduler_type='cosine'"
WIDE = {"lora_alpha": 8}  # a sketch of rank 2 shows 1/32 of the gradient
ARMS = {
    "AsymmLoRA": Arm("lorafa+gaussian", RATES, WIDE, {"curve": "cosine"}),
    "LoRA": Arm("lora", RATES, {}, {"curve": "cosine"}),
    "RAC-LoRA, 10 links": Arm(f"raclora(every=120, {CURVE})", RATES, WIDE),
    "RAC-LoRA, 50 links": Arm(f"raclora(every=24, {CURVE})", RATES, WIDE),
    "COLA, 10 links": Arm("cola(every=120)", RATES),
}
COLUMNS = {"left": Column("part of the change that is left", "low")}
CHOICE, SEEDS = "left", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    return {"left": student(arm, lr, seed)["left"]}


def effects(seen: Seen) -> Iterable[Effect]:
    ten = "RAC-LoRA, 10 links"
    yield Effect("a chain reaches further than its frozen factor alone",
                 seen.below(ten, "AsymmLoRA", "left"))  # fmt: skip
    yield Effect("a chain reaches further than LoRA", seen.below(ten, "LoRA", "left"))
    yield Effect("more links reach further: 10, then 50",
                 seen.below("RAC-LoRA, 50 links", ten, "left"))  # fmt: skip
    yield Effect("COLA of as many links reaches further still",
                 seen.below("COLA, 10 links", ten, "left"))  # fmt: skip
