"""MELoRA: n times the rank at the same number of parameters."""

from __future__ import annotations

from collections.abc import Iterable

from _bench import Arm, Effect, Seen
from _fit import COLUMNS as COLUMNS
from _fit import all_four

PAPER = (
    "a row of mini adapters has a higher rank than LoRA of the same size, and does better with 8 to"
    " 36 times fewer parameters."
)
SETTING = (
    "A 64 x 64 layer learns a change of its weight (r = 4), and random pairs (r = 2), 300 steps"
    " each; all arms have the same number of parameters."
)
RATES = (1e-2, 3e-2, 1e-1)
ARMS = {
    "LoRA": Arm("lora", RATES, {"r": 4}),
    "MELoRA, n = 2": Arm("melora(n=2)", RATES, {"r": 4}),
    "MELoRA, n = 4": Arm("melora(n=4)", RATES, {"r": 4}),
    "MELoRA, n = 8": Arm("melora(n=8)", RATES, {"r": 4}),
}
CHOICE, SEEDS, measure = "", 3, all_four


def effects(seen: Seen) -> Iterable[Effect]:
    for column, what in (("flat", "of a flat spectrum"), ("decaying", "of a decaying spectrum")):
        yield Effect(
            f"n = 4 captures more {what} than LoRA",
            seen.above("MELoRA, n = 4", "LoRA", column),
            "Blocks outside the diagonal are out of reach, and the leading directions, which hold"
            " most of such a change, lie in all blocks.",
        )
    yield Effect(
        "it remembers at least as many of 128 pairs",
        [not low for low in seen.below("MELoRA, n = 4", "LoRA", "many")],
        "Each output sees a quarter of the inputs.",
    )
