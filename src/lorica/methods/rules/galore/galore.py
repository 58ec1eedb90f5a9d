"""GaLore: Adam on the gradient's projection onto its own leading singular subspace.

    G = ∂L/∂W (m, n), as the weight is stored;  G = U Σ Vᵀ anew every T steps
    right (m ≥ n):  R = G Qᵀ (m, r), Q = the first r rows of Vᵀ;  ΔW = −ηα·N Q
    left  (m < n):  R = Pᵀ G (r, n), P = the first r columns of U;  ΔW = −ηα·P N
    N = Adam's step for R;  W ← (W + ΔW)(1 − ηλ)

Moments (m, r) or (r, n) and a basis instead of moments (m, n). When the basis changes, moments stay
as they are, in the paper and in the authors' code.

Paper and code differ in ε: the paper adds 1e-8 to √V̂ after the bias corrections, the code 1e-6 to
√V before, so that at step 1 it weighs 32 times as much. This follows the code, with which the
published numbers were made. The code refreshes all matrices at once, so that one step in T is slow;
here they take turns, matrix i of n at steps ⌊iT/n⌋ + kT, unless asked otherwise. The code rounds
the basis to the gradient's dtype and keeps it where a safe load refuses it; here it is a tensor of
the state, in float32 or wider. What is not projected (norms, biases, embeddings, the head) gets
torch's AdamW here, ε = 1e-8 after the corrections; the code's own AdamW has 1e-6 before them there
too, by which such weights differed by 1.3e-3 after 40 steps of a trial: `eps_for="all"`.

Singular vectors have no sign of their own. Moments outlive a refresh, so signs count, and the
code's results depend on the library that decomposes. Here the largest entry of each right vector is
positive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike, Trained
from lorica.methods.fields import number, one_of, whole
from lorica.methods.groups.base import Options, grouped
from lorica.methods.optional import FitsHorizon, RefusesOptim
from lorica.methods.rules._engine import EngineRule
from lorica.methods.rules.galore.projection import PROJ_TYPES, ProjectedOptimizer, shapes

GAP = 200
_ELSEWHERE = "here the method is the rule, with its arguments: leave `optim` out"
_LAYERWISE = (
    "it steps within the backward pass, where the norm of the whole gradient is not known, so"
    " nothing can be clipped, and where a micro-batch cannot be told from an update; " + _ELSEWHERE
)


@dataclass(frozen=True, kw_only=True)
class GaLore(EngineRule, RefusesOptim, FitsHorizon):
    """Full training with Adam's moments in low-rank subspaces of the gradients.

    Projected are the weight matrices of the targeted layers; all else that trains (embeddings,
    norms, head, biases) gets AdamW at the full rate. It is no adapter: a wrapped layer's W is
    frozen and has no full gradient. Sides go by the stored shape: where that is (in, out), as in
    GPT-2, `left` is the input's side and not the output's. Every process finds its own bases, in
    the same averaged gradient and by the same code.

    Cost: gradients of all weights; moments of rank r; an SVD a matrix every T steps.
    When: full training is wanted and its optimizer state does not fit.

    Args:
        update_proj_gap: T, in steps, at least 1. Default 200, the paper's, or fewer so that every
            matrix has two refreshes within the run.
        scale: α > 0, on the projected step; default 0.25, the paper's for pre-training.
        proj_type: `std` (default; the basis is that of the shorter side), `reverse_std` (the longer
            one), `left`, `right`, or `full`: both, with moments (r, r).
        svd: `exact` (default), or `random`: a seeded sketch, far cheaper where r is small.
        betas, eps: of the projected matrices' Adam. Default: what the caller gives for all, else
            (0.9, 0.999) and 1e-6, the code's (the paper's ε is 1e-8).
        eps_placement: `before` the bias correction (default, the code's) or `after` it (the
            paper's, torch's).
        eps_for: what these two hold for: `projected` matrices (default; the rest has torch's
            AdamW), or `all` that trains, as in the code.
        spread: matrices take turns (default), so that no step waits for all; False: all at steps
            0, T, 2T, ..., as in the code.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("galore(proj_type='left')")
        >>> recipe.delta.name, recipe.r, recipe.learning_rate
        ('full', 128, (0.01, 'galore'))

    Reference:
        @inproceedings{zhao2024galore,
          title = {GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection},
          author = {Zhao, Jiawei and Zhang, Zhenyu and Chen, Beidi and Wang, Zhangyang and
          Anandkumar, Anima and Tian, Yuandong}, booktitle = {ICML}, year = {2024}, eprint =
          {2403.03507}
        }
    """

    update_proj_gap: int | None = None
    scale: float = 0.25
    proj_type: str = "std"
    svd: str = "exact"
    betas: tuple[float, float] | None = None
    eps: float | None = None
    eps_placement: str = "before"
    eps_for: str = "projected"
    spread: bool = True

    preset: ClassVar[Mapping[str, str]] = {"deltas": "full"}
    requires: ClassVar[frozenset[str]] = frozenset({"deltas"})
    takes: ClassVar[frozenset[str]] = frozenset({"r"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    withdraws: ClassVar[frozenset[str]] = frozenset(
        {"pair", "factors", "weight", "diagonal", "base", "lookup", "wrapped", "row_state",
         "vector_step"}
    )  # fmt: skip
    below_full: ClassVar[bool] = True
    default_r: ClassVar[int | None] = 128  # the code's; the paper's are a half to a fourth of W's
    default_learning_rate: ClassVar[float | None] = 0.01  # the paper's
    trainer_names: ClassVar[frozenset[str]] = frozenset({"adamw_torch", "adamw_torch_fused"})
    trainer_refusals: ClassVar[Mapping[str, str]] = {
        f"galore_{inner}{end}": why
        for inner in ("adamw", "adamw_8bit", "adafactor")
        for end, why in (("", _ELSEWHERE), ("_layerwise", _LAYERWISE))
    }

    def __post_init__(self) -> None:
        self.plain.check(self.options({})[1])
        one_of(self, "proj_type", *PROJ_TYPES)
        one_of(self, "svd", "exact", "random")
        one_of(self, "eps_placement", "before", "after")
        one_of(self, "eps_for", "projected", "all")
        one_of(self, "spread", True, False)
        number(self, "scale", above=0, say="a number above 0, e.g. 0.25")
        say = f"whole optimizer steps, at least 1, e.g. {GAP}; left out, it is fitted to the run"
        whole(self, "update_proj_gap", optional=True, say=say)

    def groups(self, adapters: AdaptersLike, lr: float, weight_decay: float) -> list[Options]:
        recipe, trained = adapters.recipe, adapters.trained()
        projected = {id(t.parameter): t for t in trained if _has_projection(t)}
        if not projected:
            raise ValueError(
                f"`{self.name}` has nothing to project in `{recipe.text()}`: only a weight matrix"
                " that trains itself has a full gradient. Name linear layers in `target_modules`"
            )
        out = grouped(projected.values(), recipe.groups, lr, weight_decay)
        for group in out:
            group["names"] = [projected[id(p)].name for p in group["params"]]
            group.update(rank=recipe.r, seed=recipe.seed)
        others = [t for t in trained if id(t.parameter) not in projected]
        return out + grouped(others, recipe.groups, lr, weight_decay)

    def options(self, given: Options) -> tuple[Options, Options]:
        own = {k: v for k, v in vars(self).items() if v is not None}
        default = {"betas": (0.9, 0.999), "eps": 1e-6, "update_proj_gap": GAP}
        plain, projected = {**self.plain.defaults, **given}, {**default, **given, **own}
        if self.eps_for == "all":
            plain |= {name: projected[name] for name in ("eps", "eps_placement")}
        return plain, projected

    def build(self, groups: list[Options], options: Options) -> torch.optim.Optimizer:
        super().build(groups, options)  # refuses options that it does not have
        plain, own = self.options(options)
        return ProjectedOptimizer(self, [{**g, **(own if "rank" in g else plain)} for g in groups])

    def state_shapes(self, group: Options, parameter: Tensor) -> Mapping[str, tuple[int, ...]]:
        if "rank" not in group:
            return super().state_shapes(group, parameter)
        return shapes(tuple(parameter.shape), group)

    def horizon(self, optimizer: torch.optim.Optimizer, total_steps: int | None) -> str:
        gap, steps = self.update_proj_gap, total_steps or 2 * GAP + 1
        fitted = max(1, min(GAP, (steps - 1) // 2))
        if gap is not None and total_steps is not None and gap >= total_steps:
            raise ValueError(
                f"`{self.name}(update_proj_gap={gap})` in {total_steps} steps: subspaces are set at"
                f" step 0 and never again. Give a gap below {total_steps}, or leave it out, which"
                f" here means {fitted}"
            )
        for group in (mine := [g for g in optimizer.param_groups if "rank" in g]):
            group["update_proj_gap"] = gap or fitted
        count = sum(len(g["params"]) for g in mine)
        return f"the subspace of each of {count} matrices is refreshed every {gap or fitted} steps"

    def state_elements(self, adapters: AdaptersLike) -> int:
        options, total = {**self.options({})[1], "rank": adapters.recipe.r}, 0
        for t in adapters.trained():
            kept = shapes if _has_projection(t) else self.plain.shapes
            sizes = map(math.prod, kept(tuple(t.parameter.shape), options).values())
            total += sum(n for n in sizes if n > 1)
        return total


def _has_projection(t: Trained) -> bool:
    return t.role == "weight" and t.parameter.ndim == 2
