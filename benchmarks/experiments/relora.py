"""ReLoRA: restarts pass the floor of a rank."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _student import student

PAPER = (
    "a sum of merged low-rank updates reaches a high rank and comes near full training; resetting"
    " the optimizer at a merge needs a re-warm-up of the rate, else the loss jumps."
)
SETTING = (
    "A random 64 x 64 layer learns another, r = 8, 800 steps under a cosine, restarts every 100."
    " 1 is the least error of any single update of rank 8. Spike: the largest loss in the 20 steps"
    " after a restart over the mean of the 20 before, at worst."
)
RATES = (1e-2, 2e-2, 5e-2)
ALPHA, EVERY = {"lora_alpha": 8}, {"every": 100}
PRUNED = "reset='random', prune_ratio=0.999, masks='separate'"
ARMS = {
    "LoRA": Arm("lora", RATES, ALPHA, EVERY),
    "reset, re-warmed": Arm("relora(every=100, rewarm=20)", RATES, ALPHA, EVERY),
    "reset, no re-warm-up": Arm("relora(every=100, rewarm=0)", RATES, ALPHA, EVERY),
    "99.9 % pruned, re-warmed": Arm(f"relora(every=100, rewarm=20, {PRUNED})", RATES, ALPHA, EVERY),
    "99.9 % pruned, no re-warm-up": Arm(f"relora(every=100, rewarm=0, {PRUNED})", RATES, ALPHA,
                                      EVERY),
    "full training": Arm("full", (3e-3, 1e-2), {"r": None}),
}  # fmt: skip
COLUMNS = {
    "left": Column("error, of the floor", "low"),
    "rank": Column("rank of the change"),
    "spike": Column("spike"),
}
CHOICE, SEEDS, measure = "left", 3, student


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect("LoRA stays at the floor", [x > 0.98 for x in seen.each("LoRA", "left")])
    yield Effect("ReLoRA goes far below it (under a tenth)",
                 [x < 0.1 for x in seen.each("reset, re-warmed", "left")])  # fmt: skip
    yield Effect("the rank of its change exceeds r by far (over 32)",
                 [x > 32 for x in seen.each("reset, re-warmed", "rank")])  # fmt: skip
    why = (
        "A zero reset clears the step count as well, so the first step is as long as any other, and"
        " a fresh update starts at zero: there is no jump to soften."
    )
    yield Effect("a reset without re-warm-up makes the loss jump (spike over 2)",
                 [x > 2 for x in seen.each("reset, no re-warm-up", "spike")], why)  # fmt: skip
    yield Effect("the re-warm-up lowers the error",
                 seen.below("reset, re-warmed", "reset, no re-warm-up", "left"), why)  # fmt: skip
    yield Effect(
        "pruned moments: the re-warm-up lowers the error",
        seen.below("99.9 % pruned, re-warmed", "99.9 % pruned, no re-warm-up", "left"),
    )
    yield Effect(
        "pruned moments without re-warm-up: a higher spike than with",
        seen.above("99.9 % pruned, no re-warm-up", "99.9 % pruned, re-warmed", "spike"),
    )
