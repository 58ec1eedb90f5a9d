"""Bone, MiSS, Bat: what one shared matrix can express."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _fit import captured, wanted

PAPER = "one matrix, shared by all blocks of the weight, does better than LoRA of the same size."
SETTING = (
    "A 64 x 64 layer learns a change of its weight, 300 steps; all arms have 512 parameters (r = 4"
    " for LoRA, 8 for the others)."
)
RATES = (1e-3, 1e-2, 1e-1)
BASE = {"base": True}  # one form multiplies by the weight that is there
ARMS = {
    "LoRA": Arm("lora", RATES, {"r": 4}, BASE),
    "Bone": Arm("bone", RATES, {"r": 8}, BASE),
    "MiSS": Arm("miss", RATES, {"r": 8}, BASE),
    "Bat": Arm("bat", RATES, {"r": 8}, BASE),
}
COLUMNS = {
    "flat": Column("flat spectrum, part captured", "high"),
    "decaying": Column("decaying spectrum, part captured", "high"),
}
CHOICE, SEEDS = "", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    return {k: captured(arm, wanted(k, seed), lr, seed) for k in COLUMNS}


def effects(seen: Seen) -> Iterable[Effect]:
    for arm in ("Bone", "MiSS", "Bat"):
        yield Effect(f"{arm} captures more of a flat spectrum", seen.above(arm, "LoRA", "flat"))
        yield Effect(
            f"{arm} captures more of a decaying spectrum",
            seen.above(arm, "LoRA", "decaying"),
            "An update that is linear in its numbers takes in about their share of any change; LoRA"
            " takes the leading directions.",
        )
