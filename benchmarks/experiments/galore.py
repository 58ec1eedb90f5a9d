"""GaLore: subspaces that change."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _student import student

PAPER = (
    "Adam in a low-rank subspace of the gradient that is refreshed now and then trains as well as"
    " full-rank Adam (perplexity 34.9 against 34.1 at 60M), LoRA far behind; refreshing too often"
    " or too seldom is worse."
)
SETTING = (
    "A random 64 x 64 layer learns another, r = 8, 800 steps, warm-up and cosine. 1 is the least"
    " error of any single update of rank 8."
)
RATES = (3e-3, 1e-2, 3e-2)
WARM = {"warmup": 50}


def gap(steps: int) -> Arm:
    return Arm(f"galore(update_proj_gap={steps}, scale=1.0)", RATES, {}, WARM)


ARMS = {
    "Adam": Arm("full", RATES, {"r": None}, WARM),
    "LoRA": Arm("lora", (1e-2, 3e-2), {"lora_alpha": 8}, WARM),
    "gap 1": gap(1),
    "gap 10": gap(10),
    "gap 50": gap(50),
    "one subspace": gap(799),
}
COLUMNS = {"left": Column("error, of the floor", "low"), "rank": Column("rank of the change")}
CHOICE, SEEDS = "left", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    values = student(arm, lr, seed)
    return {k: values[k] for k in COLUMNS}


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect("a refreshed subspace (gap 50) goes far below the floor of its rank (a hundredth)",
                 [x < 0.01 for x in seen.each("gap 50", "left")])  # fmt: skip
    yield Effect(
        "without a refresh it does not", [x > 0.9 for x in seen.each("one subspace", "left")]
    )
    yield Effect(
        "too often is worse: gap 1 above gap 50", seen.above("gap 1", "gap 50", "left"),
        "Without noise each step's own subspace is the best one.",
    )  # fmt: skip
    yield Effect("as good as Adam (within 1 % of the floor)", [
        a < b + 0.01 for a, b in zip(seen.each("gap 50", "left"), seen.each("Adam", "left"),
                                     strict=True)])  # fmt: skip
