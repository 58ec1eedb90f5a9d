"""BA-LoRA: three penalties on the logits, with PiSSA's start.

    L = L_task + λ₁·CR + λ₂·DR + λ₃·SVDR        Z (N, D): the logits that have a label, σ their
                                                singular values; Z_P: the original model's
    CR    T²·mean_n KL(softmax(Z_P/T) ‖ softmax(Z/T))
    DR    nlu: (1/D)·Σ_{i≠j} C_ij²,  C = Z_cᵀZ_c/(N − 1), Z_c with centred columns
          nlg: −mean_n H(softmax over the K largest logits)
    SVDR  nlu: −Σ_{i≤k} σ_i / Σ_j σ_j            nlg: −Σ_{i≤k} σ_i / ‖Z‖_F

These are the formulas of the ICLR version, in float32; the preprint's first versions, and the first
of two repositories, have others. The authors' code takes the positions whose *own* label counts,
off by one from the next-token loss; here a row of Z is a position that predicts a label. Their
k = 5 makes SVDR the constant −1 for up to five classes; the default k here is below the number of
classes and of rows. They load a second model as the teacher; here it is the same model with its
adapters off.

Over the run (their code), p being the fraction that is over: λ₁·(f + (1 − f)(1 + cos πp)/2), and
λ₂, λ₃ times (p − wait)/ramp in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.methods.fields import number, one_of, whole, without_effect
from lorica.methods.objectives.balora.moving_weights import MovingWeights, factors
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
from lorica.tensors.linalg import all_finite
from lorica.tensors.matmul import no_autocast

# form -> (λ₁, λ₂, λ₃), k: the authors'
OWN = {"nlu": ((0.15, 0.03, 0.03), 5), "nlg": ((0.025, 0.005, 0.005), 10)}
# What only this term reads, with its default.
TERMS = {"cr": ("temperature", 2.0), "dr": ("top_k", 20), "svdr": ("k", None)}


@dataclass(frozen=True, kw_only=True)
class Balora(AbstractObjective):
    """Keep predictions near the original model's, outputs diverse, and their spectrum concentrated.

    Micro-batches are weighted by their number of labels; SVDR, and DR of `nlu`, are no sums over
    rows and are computed for each micro-batch. CR costs a forward without gradient.

    Cost: a forward of the original model per step for CR, an SVD of the logits for SVDR.
    When: the model must not drift from what it knew, or its outputs must remain diverse.

    Args:
        cr, dr, svdr: λ₁, λ₂, λ₃ ≥ 0; 0 leaves the term out. Default: the authors', 0.15, 0.03, 0.03
            (`nlu`) or 0.025, 0.005, 0.005 (`nlg`).
        form: `nlu`, `nlg`, or `auto` (default): by the shape of the logits, (N, D) or
            (N, length, D).
        k: leading singular values. Default 10 (`nlg`); 5 (`nlu`), or one less than there are
            classes or rows.
        top_k: K ≥ 2 of the `nlg` DR; default 20, the authors'.
        temperature: T > 0 of CR; default 2, the authors'.

    Raises:
        ValueError: in training: no logits or labels beside the loss, a single class, `k` not below
            the number of classes in `nlu`, or no optimizer bound yet.

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
        one_of(self, "form", "auto", *OWN)
        number(self, "temperature", least=1e-3, say="a number of at least 0.001; the default is 2")
        whole(self, "k", optional=True, say="a whole number of at least 1, e.g. `k=5`")
        whole(self, "top_k", least=2, say="a whole number of at least 2; the default is 20")
        for term, (name, default) in TERMS.items():
            say = f"a number of at least 0; 0 leaves the term out, and without `{term}` it has the"
            number(self, term, least=0, optional=True, say=f"{say} authors' weight")
            if getattr(self, term) == 0:
                without_effect(self, name, default, f"`{term}=0` leaves its term out")
        if self.form == "nlu":
            without_effect(self, "top_k", 20, "it belongs to `form='nlg'`")

    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        logits, keep = labelled(self.name, context)
        form = self.form if self.form != "auto" else ("nlu" if logits.ndim == 2 else "nlg")
        falls, comes = factors(self, context.adapters)
        given = zip((self.cr, self.dr, self.svdr), OWN[form][0], strict=True)
        weights = [default if own is None else own for own, default in given]
        cr, dr, svdr = (w * f for w, f in zip(weights, (falls, comes, comes), strict=True))
        if not (cr or dr or svdr):
            return task_loss
        # Under the caller's autocast, and even without labels: other processes may run it, too, and
        # a sharded forward waits for all of them.
        teacher: Tensor = context.reference["logits"] if cr else logits
        if not keep.any():
            return task_loss
        with no_autocast(logits.device.type):
            z = logits[keep]
            z = z.to(torch.promote_types(z.dtype, torch.float32))  # (N, D)
            if not all_finite(z):  # no spectrum; the task's loss says that it has diverged
                return task_loss
            terms: list[Tensor] = []
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
            # The same probe each time, so there is nothing to save, and all processes agree.
            generator = seeded(f"{context.adapters.recipe.seed}/{self.name}")
            return share_of_norm(z, min(self.k or OWN[form][1], *z.shape), generator)
        if self.k is not None and self.k >= z.shape[1]:
            raise ValueError(
                f"`{self.text()}`: {z.shape[1]} classes have no more than {self.k} singular values,"
                f" so the term is a constant; give a `k` below {z.shape[1]}, or `svdr=0`"
            )
        return share_of_all(z, self.k or max(1, min(OWN[form][1], *(n - 1 for n in z.shape))))


@dataclass(frozen=True, kw_only=True)
class Weights(MovingWeights):
    """The three weights over the run: λ₁ falls, λ₂ and λ₃ start late.

    Args:
        floor: fraction of λ₁ at the end of the run, in [0, 1]; default 0.1, the authors' code.
        wait: fraction of the run without λ₂ and λ₃; default 0.2, the authors' code.
        ramp: fraction of the run over which these two then rise; default 0.05, the authors' code.
    """
