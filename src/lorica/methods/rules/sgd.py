"""Stochastic gradient descent with momentum and decoupled weight decay.

    b ← μb + g (b = 0 at the start);   p ← (1 − ηλ)p − ηb

torch's own SGD adds λp to the gradient, so the decay passes through the momentum; without momentum
the two are the same. Here decay is decoupled, as in every rule of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.methods.fields import number
from lorica.methods.groups.base import Options
from lorica.methods.rules._elementwise import Elementwise, Sgd
from lorica.methods.rules._engine import EngineRule


@dataclass(frozen=True, kw_only=True)
class SGD(EngineRule):
    """Plain gradient descent with momentum: half the state of Adam, and a rate to be tuned.

    Cost: one element of state for each trained one, none without momentum.
    When: state has to be small; the rate has to be tuned.

    Args:
        momentum: μ in [0, 1); default 0.9, the usual one. 0 keeps no state.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+sgd(momentum=0.5)").rule.momentum
        0.5

    Reference:
        @article{robbins1951stochastic,
          title = {A Stochastic Approximation Method}, author = {Robbins, Herbert and Monro,
          Sutton}, journal = {The Annals of Mathematical Statistics}, year = {1951}
        }
    """

    momentum: float = 0.9

    trainer_names: ClassVar[frozenset[str]] = frozenset({"sgd"})
    state_per_element: ClassVar[int] = 1
    gives: ClassVar[frozenset[str]] = frozenset({"sharded", "row_state", "row_wise"})
    experts: ClassVar[bool] = True
    # The Riemannian paper's tuned rate of plain SGD on GPT-2 (9e-2), less a tenth for momentum 0.9.
    default_learning_rate: ClassVar[float | None] = 1e-2

    def __post_init__(self) -> None:
        number(self, "momentum", least=0, below=1, say="a number in [0, 1), e.g. 0.9")

    @property
    def plain(self) -> Elementwise:
        return Sgd()

    def options(self, given: Options) -> tuple[Options, Options]:
        plain = {"momentum": self.momentum, **given}
        return plain, plain
