"""BA-LoRA: three penalties on the logits, over PiSSA's start.

    L = L_task + λ₁·CR + λ₂·DR + λ₃·SVDR        Z (N, D): the logits that have a label, σ their
                                                singular values; Z_P: the original model's
    CR    T²·mean_n KL(softmax(Z_P/T) ‖ softmax(Z/T))
    DR    nlu: (1/D)·Σ_{i≠j} C_ij²,  C = Z_cᵀZ_c/(N − 1), Z_c with centred columns
          nlg: −mean_n H(softmax over the K largest logits)
    SVDR  nlu: −Σ_{i≤k} σ_i / Σ_j σ_j            nlg: −Σ_{i≤k} σ_i / ‖Z‖_F

the formulas of the ICLR version; the preprint's first versions, and the first of two repositories,
have others. In float32. The authors' code takes the places whose *own* label counts, one beside the
next-token loss; here a row is a place that predicts a label. Their k of 5 makes SVDR the constant
−1 for up to five classes; left out, k is here below the number of classes and of rows. They load a
second model as the teacher; here it is the same model with its adapters off.

Over the run (their code), in fractions p of it: λ₁·(f + (1 − f)(1 + cos πp)/2), and λ₂, λ₃ times
(p − wait)/ramp in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.methods.objectives.balora.moving_weights import MovingWeights, check_number, factors
from lorica.methods.objectives.balora.output_penalties import (
    certainty,
    correlation,
    divergence,
    labelled,
    share_of_all,
    share_of_norm,
)
from lorica.methods.objectives.base import AbstractObjective, Context
from lorica.tensors.dtensor_ops import seeded
from lorica.tensors.matmul import no_autocast

# form -> (λ₁, λ₂, λ₃), k: the authors'
OWN = {"nlu": ((0.15, 0.03, 0.03), 5), "nlg": ((0.025, 0.005, 0.005), 10)}
TERMS = {"cr": ("temperature",), "dr": ("top_k",), "svdr": ("k",)}  # what each one alone reads


@dataclass(frozen=True, kw_only=True)
class Balora(AbstractObjective):
    """Stay near the original model's predictions, keep outputs diverse, concentrate their spectrum.

    Micro-batches weigh by their labels; SVDR, and DR of `nlu`, are no sums over rows and so are
    those of each micro-batch. CR costs a forward without gradient.

    Cost: a forward of the original model a step for CR, an SVD of the logits for SVDR.
    When: the model must not drift from what it knew, or must stay diverse.

    Args:
        cr, dr, svdr: λ₁, λ₂, λ₃ ≥ 0; 0 leaves the term out. Default: the authors', 0.15, 0.03, 0.03
            (`nlu`) or 0.025, 0.005, 0.005 (`nlg`).
        form: `nlu`, `nlg`, or `auto` (default): by the logits, (N, D) or (N, length, D).
        k: leading singular values. Default 10 (`nlg`); 5 (`nlu`), or one less than there are
            classes or rows.
        top_k: K ≥ 2 of the `nlg` DR; default 20, the authors'.
        temperature: T > 0 of CR; default 2, the authors'.

    Raises:
        ValueError: in training: no logits or labels beside the loss, a single class, `k` of at
            least the number of classes in `nlu`, or an optimizer that was not bound.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("balora(cr=0.1)")
        >>> recipe.init.name, recipe.text()
        ('pissa', 'balora(cr=0.1)')
        >>> constant = "balora+schedules.balora(floor=1, wait=0, ramp=0)"

    Reference:
        @inproceedings{chang2026balora,
          title = {BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic
          Inheritance in Large Language Models},
          author = {Chang, Yupeng and Chang, Yi and Wu, Yuan},
          booktitle = {ICLR}, year = {2026}, eprint = {2408.04556}
        }
    """

    cr: float | None = None
    dr: float | None = None
    svdr: float | None = None
    form: str = "auto"
    k: int | None = None
    top_k: int = 20
    temperature: float = 2.0

    preset: ClassVar[Mapping[str, str]] = {"inits": "pissa", "schedules": "schedules.balora"}
    needs: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})

    def __post_init__(self) -> None:
        if self.form not in ("auto", *OWN):
            raise ValueError(f"`balora(form={self.form!r})`; allowed: 'auto', 'nlu', 'nlg'")
        check_number(self, "temperature", 1e-3)
        check_number(self, "k", 1)
        check_number(self, "top_k", 2)
        for term, names in TERMS.items():
            check_number(self, term, 0.0)
            for name in names:
                idle = getattr(self, term) == 0 or (name == "top_k" and self.form == "nlu")
                if idle and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"`{self.text()}`: `{name}` has no effect"
                        + (f" with `{term}=0`" if getattr(self, term) == 0 else " in form 'nlu'")
                        + "; leave it out"
                    )

    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        logits, keep = labelled(self.name, context)
        form = self.form if self.form != "auto" else ("nlu" if logits.ndim == 2 else "nlg")
        falls, comes = factors(self, context.adapters)
        given = zip((self.cr, self.dr, self.svdr), OWN[form][0], strict=True)
        weights = [default if own is None else own for own, default in given]
        cr, dr, svdr = (w * f for w, f in zip(weights, (falls, comes, comes), strict=True))
        if not (cr or dr or svdr):
            return task_loss
        # In the caller's autocast, and also without a label: other processes wait in its forward.
        teacher = context.reference["logits"] if cr else logits
        if not keep.any():
            return task_loss
        with no_autocast(logits.device.type):
            z = logits[keep]
            z = z.to(torch.promote_types(z.dtype, torch.float32))  # (N, D)
            terms = []
            if cr:
                terms.append(cr * divergence(z, teacher[keep].to(z), self.temperature))
            if dr:
                spread = correlation(z) if form == "nlu" else certainty(z, self.top_k)
                terms.append(dr * spread)
            if svdr:
                terms.append(-svdr * self._spectrum(z, form, context))
            return task_loss + context.share * torch.stack(terms).sum()

    def _spectrum(self, z: Tensor, form: str, context: Context) -> Tensor:
        if form == "nlg":
            # The same probe each time: nothing to save, and the same on every process.
            generator = seeded(f"{context.adapters.recipe.seed}/{self.name}")
            return share_of_norm(z, min(self.k or OWN[form][1], *z.shape), generator)
        if self.k is not None and self.k >= z.shape[1]:
            raise ValueError(
                f"`{self.text()}`: of {z.shape[1]} classes the first {self.k} singular values are"
                f" all there are, and the term is a constant; `k` below {z.shape[1]}, or `svdr=0`"
            )
        return share_of_all(z, self.k or max(1, min(OWN[form][1], *(n - 1 for n in z.shape))))


@dataclass(frozen=True, kw_only=True)
class Weights(MovingWeights):
    """The three weights over the run: consistency falls, diversity and spectrum come in late.

    Args:
        floor: what is left of λ₁ at the end, in [0, 1]; default 0.1, the authors' code.
        wait: part of the run without λ₂ and λ₃; default 0.2, the authors' code.
        ramp: part of the run over which these two then rise; default 0.05, the authors' code.
    """
