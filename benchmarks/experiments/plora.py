"""PLoRA: unload in stages, keep a momentum."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _linear import student

PAPER = (
    "unloading the update in stages learns up to 1.8 times as much as LoRA of that rank, and"
    " keeping a part of it (momentum) makes the switches stable."
)
SETTING = (
    "A linear teacher that is a change of rank 24 away, r = 2, ten stages of 120 steps; noisy: one"
    " example a step, noise 3."
)
RATES = (2e-3, 5e-3, 1e-2)
HIGH = (5e-3, 1e-2, 2e-2, 4e-2)
NOISY = {"batch": 1, "noise": 3.0}
STAGES = {"every": 120}
ARMS = {
    "LoRA": Arm("lora", RATES, {}, {"curve": "cosine"}),
    "momentum 0": Arm("plora(every=120)", RATES, {}, STAGES),
    "momentum 0.3": Arm("plora(every=120, momentum=0.3)", RATES, {}, STAGES),
    "noisy, LoRA": Arm("lora", HIGH, {}, {"curve": "cosine", **NOISY}),
    "noisy, momentum 0": Arm("plora(every=120)", HIGH, {}, {**STAGES, **NOISY}),
    "noisy, momentum 0.5": Arm("plora(every=120, momentum=0.5)", HIGH, {}, {**STAGES, **NOISY}),
}
COLUMNS = {
    "left": Column("part of the change that is left", "low"),
    "rise": Column("largest rise in 40 steps after an unloading, mean"),
}
CHOICE, SEEDS, measure = "left", 3, student


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect("stages learn more than LoRA", seen.below("momentum 0", "LoRA", "left"))
    yield Effect(
        "momentum learns at least as much", seen.below("momentum 0.3", "momentum 0", "left", 1.02),
        "Keeping a part of B keeps A as well, so the stages go on in one row space.",
    )  # fmt: skip
    yield Effect(
        "under noise, stages learn more than LoRA",
        seen.below("noisy, momentum 0", "noisy, LoRA", "left"),
        "Why was not found out; a stage of 120 noisy steps may be too short to learn anything.",
    )
    yield Effect(
        "under noise, momentum learns more than none, both at 5e-3",
        [a < b for a, b in zip(*(
            seen.at(f"noisy, momentum {m}", 5e-3, "left") for m in ("0.5", "0")), strict=True)],
    )  # fmt: skip
    yield Effect(
        "under noise, momentum learns more than none, at the best rate of each",
        seen.below("noisy, momentum 0.5", "noisy, momentum 0", "left"),
        "A higher rate gives plain stages as much.",
    )
    yield Effect(
        "without momentum the error rises after a switch (by 1 % of the change)",
        [rise > 0.01 for rise in seen.each("noisy, momentum 0", "rise")],
        "A fresh update starts at zero, and so do the optimizer's moments and their step count:"
        " there is hardly anything to damp.",
    )
    rises = zip(
        seen.each("noisy, momentum 0.5", "rise"), seen.each("noisy, momentum 0", "rise"),
        strict=True,
    )  # fmt: skip
    yield Effect(
        "momentum damps the rise of the error after a switch",
        [a < b for a, b in rises],
        "The rises are too small for a comparison.",
    )
