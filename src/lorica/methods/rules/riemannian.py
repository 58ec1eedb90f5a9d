"""Riemannian preconditioning: each factor's gradient times the inverse Gram matrix of the other.

    Ā = (BᵀB + δI)⁻¹ ∂L/∂A  (r, r)·(r, in);    B̄ = ∂L/∂B (AAᵀ + δI)⁻¹  (out, r)·(r, r)

The inner rule (AdamW or SGD) then takes Ā and B̄ as gradients. With SGD and δ → 0 the step on ΔW
is −η s² (P_B G + G P_A), the full gradient projected onto the present column and row spaces,
for all sizes of A and B; the s² is left to the rate.

Both inverses are made of the factors before the step, as in PEFT and in the authors' SGD; their
AdamW moves A first and takes the new A for B, by a slip. Where a Gram matrix is singular its
pseudo-inverse is used (the authors take the identity, silently). At B = 0 the gradient of A is 0
and so is Ā. One step later ‖B‖ is about η, and a δ far below η² makes Ā very long: AdamW hides its
length but its second moment stays inflated, hence the authors' low betas (0.7, 0.8) and large δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorica.methods.fields import number, one_of
from lorica.methods.groups.base import Options
from lorica.methods.rules._elementwise import Adam, Elementwise, Sgd
from lorica.methods.rules._engine import PairRule, PairState, Shared, Stack
from lorica.methods.rules._spectral import damped_inverse, product

_INNER: dict[str, type[Elementwise]] = {"adamw": Adam, "sgd": Sgd}


@dataclass(frozen=True, kw_only=True)
class Riemannian(PairRule):
    """Gradients measured in the metric of the low-rank product, then AdamW or SGD.

    Not to be confused with `lorarite`, whose moments are free of the factors' sizes as well. What
    is in no pair gets the inner rule unchanged. Where one factor of a pair is frozen, the other's
    half of the step is taken alone.

    Cost: an r × r inverse for each factor and step.
    When: plain SGD (`inner='sgd'`), which it helps most; δ has to be tuned.

    Args:
        delta: δ ≥ 0, the damping; default 1e-2, PEFT's (the authors': 1e-6, tuned from 1e-7 to
            100).
        inner: `adamw` (default) or `sgd` (without momentum, as in the paper).
        relative: count δ in units of the Gram matrix' mean eigenvalue, so that it means the same
            at every size of the factors; default False, the paper's.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("riemannian(delta=1e-6, inner='sgd')").learning_rate
        (0.02, 'riemannian')

    Reference:
        @inproceedings{zhang2024riemannian,
          title = {Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models},
          author = {Zhang, Fangzhao and Pilanci, Mert}, booktitle = {ICML}, year = {2024},
          eprint = {2402.02347}
        }
    """

    delta: float = 1e-2
    inner: str = "adamw"
    relative: bool = False

    trainer_names: ClassVar[frozenset[str]] = frozenset({"adamw_torch", "adamw_torch_fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded", "row_state"})

    def __post_init__(self) -> None:
        number(self, "delta", least=0, say="a number, at least 0, e.g. 1e-2 or 1e-6")
        one_of(self, "inner", *_INNER)
        one_of(self, "relative", True, False)

    @property  # and no class variable, for it depends on `inner`
    def default_learning_rate(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> float | None:
        return 2e-2 if self.inner == "sgd" else None  # the paper's on GPT-2; None: as without

    @property
    def plain(self) -> Elementwise:
        return _INNER[self.inner]()

    def options(self, given: Options) -> tuple[Options, Options]:
        plain = {**self.plain.defaults, **given}
        return plain, {**plain, "delta": self.delta, "relative": self.relative}

    def update(self, stack: Stack, state: PairState, shared: Shared) -> Sequence[Tensor | None]:
        o = stack.options
        out: list[Tensor | None] = []
        for (factor, partner), own in zip(stack.sides, state, strict=True):
            if not factor.moves:
                out.append(None)
                continue
            inverse = damped_inverse(partner.as_partner(), o["delta"], relative=o["relative"])
            gradient = product(inverse, factor.gradient())  # (n, r, r)·(n, r, d)
            out.append(
                self.plain.stacked(factor.value(), gradient, own, factor.lr, o["weight_decay"], o)
            )
        return out
