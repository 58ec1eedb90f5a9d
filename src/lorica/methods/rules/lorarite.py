"""LoRA-RITE: Adam in an orthonormal basis of the other factor, so that no factorisation matters.

Held wide: X (r, d) is A or Bᵀ, Y (r, d') its partner. With Yᵀ = Q R, Q orthonormal, R⁺ = Wᵀ:

    ḡ = W ∂L/∂X                       the unmagnified gradient, s·QᵀG: no trace of Y's size
    P = Qᵀ Q_old                      from the basis of the last step into this one
    Ṽ = P V Pᵀ;  V ← (1−β₂)·ḡḡᵀ/d + β₂Ṽ;   ρ ← β₂(ρ + e), e = what Ṽ's eigenvalues lost to V's
    S = (V + ρI)^(−1/2) ḡ;  M ← (1−β₁)S + β₁PM;   X ← X − η(WᵀM + λX)

with decays b(k) = β(1−βᵏ)/(1−βᵏ⁺¹), k = 0, 1, ... in place of bias corrections. Before that: a
matrix with RMS(ḡ) > `skip` counts as zero, and all ḡ are scaled to a joint norm of at most `clip`.
Any orthonormal basis gives the same step; here it comes from the Gram matrix of Y, which also shows
the directions that Y lacks: they are left out, as by a pseudo-inverse.

Paper and code differ; this follows the code (moving averages, not sums; escaped mass off unless
asked for) with repairs: eigenvalues of V are clamped at 0 (below it the code drops the update), the
state is all tensors (the code starts anew after a resume), skipped matrices are counted and logged.
The code's `skip` of 1 is absolute and stops a loss that is a sum for good, so it is off here unless
asked for; the clip bounds a single large gradient already.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lorica.methods.fields import number, one_of
from lorica.methods.groups.base import Options
from lorica.methods.optional import ClipsItself
from lorica.methods.rules._elementwise import Shape
from lorica.methods.rules._engine import Factor, PairRule, PairState, Shared, Stack
from lorica.methods.rules._spectral import inverse_root, largest_fall, product, symmetric, whiten
from lorica.tensors.linalg import floats, vector_norm


@dataclass(frozen=True, kw_only=True)
class LoraRite(PairRule, ClipsItself):
    """Adam for pairs whose steps on ΔW are the same for (A, B) and (MA, BM⁻¹), clip and decay
    included.

    It clips by itself: clipping raw gradients as well would spoil that. What is in no pair gets
    AdamW. A rate of its own for B keeps the invariance, though the sizes that it makes up for are
    out of the gradient already. All directions of a pair share one step count, so a whole pair can
    start anew but single vectors cannot (no `vector_step`, no `row_state`).

    Cost: eigenvalues of r × r matrices for each factor and step; about the state of Adam.
    When: the sizes of A and B differ a lot: unusual starts, ranks, scales.

    Args:
        betas: β₁, β₂ in [0, 1); default (0.9, 0.999), the code's.
        eps: added to the roots of V's eigenvalues; default 1e-6, the code's.
        clip: joint norm of all unmagnified gradients, at most; 0: no limit. Default 1, the code's.
        skip: matrices whose unmagnified gradient has a larger RMS are left out and logged; 0
            (default): none are. The code's 1 suits a loss that is a mean over tokens.
        escape: add the mass that V loses at a change of basis; default False, the code's. True is
            the paper's, whose convergence proof needs it.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora-rite(skip=1, escape=True)").text()
        'lorarite(skip=1, escape=True)'

    Reference:
        @inproceedings{yen2025lorarite,
          title = {LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA
          Optimization}, author = {Yen, Jui-Nan and Si, Si and Meng, Zhao and Yu, Felix and Duvvuri,
          Sai Surya and Dhillon, Inderjit S. and Hsieh, Cho-Jui and Kumar, Sanjiv},
          booktitle = {ICLR}, year = {2025}, eprint = {2410.20625}
        }
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    clip: float = 1.0
    skip: float = 0.0
    escape: bool = False

    trainer_names: ClassVar[frozenset[str]] = frozenset({"adamw_torch", "adamw_torch_fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    clips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.plain.check({**self.plain.defaults, "betas": self.betas})
        number(self, "eps", least=0, say="a number, at least 0, e.g. 1e-6; 0: none")
        number(self, "clip", least=0, say="a norm, at least 0, e.g. 1; 0: no limit")
        number(self, "skip", least=0, say="an RMS, at least 0, e.g. 1; 0: none is skipped")
        one_of(self, "escape", True, False)

    def options(self, given: Options) -> tuple[Options, Options]:
        own = {n: getattr(self, n) for n in ("betas", "eps", "clip", "skip", "escape")}
        return {**self.plain.defaults, **given}, own

    def shapes(self, r: int, d: int, partner: int, options: Options) -> dict[str, Shape]:
        escaped: dict[str, Shape] = {"escaped": ()} if options["escape"] else {}
        return {
            "step": (), "skipped": (), **escaped,
            "moment": (r, d), "second": (r, r), "basis": (r, partner),
        }  # fmt: skip

    def prepare(self, stacks: list[Stack]) -> Sequence[tuple[_Plan | None, _Plan | None]]:
        """Plans of A and of B in each stack, clipped together; None for a factor that does not
        move."""
        plans = [_plan(*sides) if sides[0].moves else None for s in stacks for sides in s.sides]
        weights = iter(_weights([p.gradient for p in plans if p is not None], stacks[0].options))
        for plan in plans:
            if plan is None:
                continue
            kept, g = next(weights), plan.gradient
            if min(kept) < 1:
                factors = torch.tensor(kept, dtype=g.dtype, device=g.device)[:, None, None]
                g.masked_fill_(factors == 0, 0).mul_(factors)  # 0·inf is no number
            plan.skipped.extend(k == 0 for k in kept)
        return list(zip(plans[::2], plans[1::2], strict=True))

    def update(self, stack: Stack, state: PairState, shared: Shared) -> Sequence[Tensor | None]:
        plans: tuple[_Plan | None, _Plan | None] = shared
        out: list[Tensor | None] = []
        o = stack.options
        for (factor, _), own, plan in zip(stack.sides, state, plans, strict=True):
            if plan is None:
                out.append(None)
                continue
            stack.note_skipped(factor, own["skipped"], plan.skipped)
            step = product(plan.whitener.mT, _moment(plan.gradient, plan.basis, own, o))  # R⁺M
            value = factor.value().mul_(1 - factor.lr * o["weight_decay"])
            out.append(value.sub_(step.mul_(factor.lr)))
        return out


class _Plan(NamedTuple):
    """Of one factor of n pairs."""

    whitener: Tensor  # W (n, r, r)
    basis: Tensor  # Qᵀ (n, r, d')
    gradient: Tensor  # ḡ (n, r, d); clipped in place
    skipped: list[bool]  # of each pair, once that is known


def _plan(factor: Factor, partner: Factor) -> _Plan:
    Y = partner.as_partner()
    W = whiten(Y)
    return _Plan(W, product(W, Y), product(W, factor.gradient()), [])


def _weights(gradients: list[Tensor], options: Options) -> list[list[float]]:
    """What to multiply each matrix by: 0 where skipped, else the factor of the global clip."""
    clip, skip = options["clip"], options["skip"]
    norms = [vector_norm(g, dim=(1, 2)).double() for g in gradients]
    squares = floats(torch.cat([n.to(norms[0].device) for n in norms]).square())  # the one wait
    limits = [g[0].numel() * skip**2 if skip else math.inf for g in gradients for _ in g]
    kept = [q <= limit and q < math.inf for q, limit in zip(squares, limits, strict=True)]
    norm = math.sqrt(math.fsum(q for q, k in zip(squares, kept, strict=True) if k))
    scale = clip / norm if 0 < clip < norm else 1.0
    weights = iter([scale * k for k in kept])
    return [list(itertools.islice(weights, len(g))) for g in gradients]


def _moment(g: Tensor, basis: Tensor, own: dict[str, Tensor], options: Options) -> Tensor:
    """M (n, r, d) of this step; updates the state."""
    b1, b2 = (_decay(beta, own["step"]).to(g) for beta in options["betas"])
    P = product(basis, own["basis"].mT)  # (n, r, d')·(n, d', r)
    rotated = symmetric(product(product(P, own["second"]), P.mT))
    second = symmetric((1 - b2) * (product(g, g.mT) / g.shape[2]) + b2 * rotated)
    rho = 0.0
    if options["escape"]:
        own["escaped"] = b2 * (own["escaped"] + largest_fall(own["second"], rotated))
        rho = own["escaped"].double()
    S = product(inverse_root(second, rho, options["eps"]), g)
    own["moment"] = torch.lerp(product(P, own["moment"]), S, 1 - b1)
    own["second"], own["basis"] = second, basis
    own["step"] += 1
    return own["moment"]


def _decay(beta: float, k: Tensor) -> Tensor:
    """b(k) = β(1 − βᵏ)/(1 − βᵏ⁺¹), in float64."""
    k = k.double()
    return beta * (1 - beta**k) / (1 - beta ** (k + 1))
