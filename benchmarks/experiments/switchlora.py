"""SwitchLoRA: exchanging vectors passes the floor of a rank."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _student import student

PAPER = (
    "exchanging rows of A and columns of B while training gives a full-rank change: pre-training"
    " comes near full-rank training (perplexity 30.3 against 27.7 for 130M) where LoRA stays far"
    " behind; the more exchanges the better."
)
SETTING = (
    "A random 64 x 64 layer learns another, r = 8, 800 steps, warm-up and cosine. 1 is the least"
    " error of any single update of rank 8."
)
RATES = (3e-2, 1e-1)
WARM = {"warmup": 50}
ALPHA = {"lora_alpha": 1}
ARMS = {
    "LoRA from that start": Arm("vectoradamw+init.switchlora", RATES, ALPHA, WARM),
    "interval 40": Arm("switchlora(interval=40)", RATES, ALPHA, WARM),
    "interval 10": Arm("switchlora(interval=10)", RATES, ALPHA, WARM),
    "interval 10, never fewer": Arm("switchlora(interval=10, kappa=1)", RATES, ALPHA, WARM),
    "interval 10, without reset": Arm("switchlora(interval=10, reset=False)", RATES, ALPHA, WARM),
}
COLUMNS = {"left": Column("error, of the floor", "low"), "rank": Column("rank of the change")}
CHOICE, SEEDS = "left", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    values = student(arm, lr, seed)
    return {k: values[k] for k in COLUMNS}


def effects(seen: Seen) -> Iterable[Effect]:
    lora = seen.each("LoRA from that start", "left")
    yield Effect("without exchanges the floor holds", [0.98 < x for x in lora])
    yield Effect("exchanges go below it",
                 [x < 0.9 for x in seen.each("interval 40", "left")])  # fmt: skip
    yield Effect("more exchanges, lower: interval 10 below 40",
                 seen.below("interval 10", "interval 40", "left"))  # fmt: skip
    yield Effect("more exchanges, lower: no decay below decay",
                 seen.below("interval 10, never fewer", "interval 10", "left"))  # fmt: skip
    yield Effect(
        "resetting the counterpart's state helps",
        seen.below("interval 10", "interval 10, without reset", "left"),
        "A regression without noise forgives stale moments: they fade within a few steps.",
    )
