"""MoRA: a square matrix instead of two factors."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Column, Effect, Seen
from _fit import COLUMNS as FOUR
from _fit import all_four, captured, wanted

PAPER = (
    "a square matrix of the same size has a much higher rank and remembers more: of random pairs of"
    " identifiers a 7B model knows 87 % of the characters after 700 steps with MoRA of r = 8, 11 %"
    " with LoRA. A chain of such matrices (ReMoRA) goes further."
)
SETTING = (
    "A 64 x 64 layer learns a change of its weight (r = 4; the last column: flat, r = 2, four links"
    " of 60 steps), and random pairs (r = 2), 300 steps each; all arms have the same number of"
    " parameters at a time."
)
RATES = (1e-2, 3e-2, 1e-1)
LINKS = "+relora(every=60, rewarm=0)"
ARMS = {
    "LoRA": Arm("lora", RATES, {"r": 4}),
    "MoRA, type 1": Arm("mora(type=1)", RATES, {"r": 4}),
    "MoRA, type 6": Arm("mora(type=6)", RATES, {"r": 4}),
}
COLUMNS = {**FOUR, "chain": Column("four links on a flat spectrum", "high")}
CHOICE, SEEDS = "", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    links = Arm(arm.method + LINKS, arm.rates, {"r": 2})
    chain = captured(links, wanted("flat", seed), lr, seed, steps=240, curve="constant")
    return {**all_four(arm, lr, seed), "chain": chain}


def effects(seen: Seen) -> Iterable[Effect]:
    one, six = "MoRA, type 1", "MoRA, type 6"
    yield Effect("captures more of a flat spectrum than LoRA", seen.above(six, "LoRA", "flat"))
    yield Effect(
        "captures more of a decaying spectrum than LoRA",
        seen.above(six, "LoRA", "decaying"),
        "An update that is linear in its numbers takes in about their share of any change, however"
        " few directions it has; LoRA takes the leading directions.",
    )
    yield Effect(
        "remembers more pairs than LoRA",
        seen.above(six, "LoRA", "many"),
        "In one linear layer a pair needs its own direction of the input, and shared or turned"
        " inputs take that away. The paper's memory is that of many adapted layers in a deep"
        " model.",
    )
    yield Effect("turned inputs (type 6) remember more than shared ones (type 1)",
                 seen.above(six, one, "many"))  # fmt: skip
    yield Effect("a chain of type 6 captures more of a flat spectrum than a chain of LoRA",
                 seen.above(six, "LoRA", "chain"))  # fmt: skip
