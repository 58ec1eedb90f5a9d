"""LoRA+: η_B = λ·η_A with λ ≫ 1.

In wide networks A and B cannot both learn efficiently at one rate (efficient: η_A = Θ(1/n),
η_B = Θ(1)). Parameters are sorted by their declared role: B at λη, everything else at η. PEFT also
moves every one-dimensional parameter (DoRA's magnitudes, norms, biases) to λη, because it sorts by
dimension; the theory is about B alone, and this file follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import Trained
from lorica.methods.fields import number
from lorica.methods.groups.base import AbstractGroup, Options


@dataclass(frozen=True, kw_only=True)
class LoraPlus(AbstractGroup):
    """B learns `loraplus_lr_ratio` times faster than A.

    Cost: none, but a ratio to tune.
    When: hard tasks, where features have to change; with a lower rate than LoRA's.

    Args:
        loraplus_lr_ratio: λ; default 16, the authors' advice together with a lower η (default here
            5e-5).
        loraplus_lr_embedding: rate of both factors of an adapted embedding; default 1e-6, PEFT's
            and the authors'.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("loraplus(loraplus_lr_ratio=4)").groups[0].loraplus_lr_ratio
        4

    Reference:
        @inproceedings{hayou2024loraplus,
          title = {LoRA+: Efficient Low Rank Adaptation of Large Models},
          author = {Hayou, Soufiane and Ghosh, Nikhil and Yu, Bin},
          booktitle = {ICML}, year = {2024}, eprint = {2402.12354}
        }
    """

    loraplus_lr_ratio: float = 16
    loraplus_lr_embedding: float = 1e-6

    needs: ClassVar[frozenset[str]] = frozenset({"sides"})

    def __post_init__(self) -> None:
        number(self, "loraplus_lr_ratio", above=0, say="a number above 0, e.g. 16")
        number(self, "loraplus_lr_embedding", above=0, say="a rate above 0, e.g. 1e-6")

    default_learning_rate: ClassVar[float | None] = 5e-5

    def adjust(self, trained: Trained, options: Options) -> Options:
        if trained.lookup and trained.role in ("A", "B"):
            return {**options, "lr": self.loraplus_lr_embedding}
        if trained.role == "B":
            return {**options, "lr": options["lr"] * self.loraplus_lr_ratio}
        return options
