"""Muon: momentum, orthogonalised, for hidden weight matrices.

    M ← μM + (1 − μ)G;   N = μM + (1 − μ)G with Nesterov, else M       G = ∂L/∂W (out, in)
    O = NS(N) ≈ U Vᵀ of N = U Σ Vᵀ
    W ← (1 − ηλ)W − ηf·O;   f = 0.2·√max(out, in), or √max(1, out/in)

    NS: X ← N/‖N‖_F, then five times  S = XXᵀ;  X ← aX + (bS + cS²)X
    (a, b, c) = (3.4445, −4.7750, 2.0315), in bfloat16, on Nᵀ where N is tall

The polynomial takes every singular value to about 1 (0.7 to 1.2), not exactly to 1: it is the one
that is steepest at 0. The first f is Moonshot's (`match_rms_adamw`): entries of the step have a
root mean square of 0.2·η, as AdamW's have, so that AdamW's rate and decay fit. The second is
Jordan's (`original`).

Jordan and Moonshot write M ← μM + G. With the factor 1 − μ, as in torch and in Jordan's later code,
M and N are shorter by 1/(1 − μ), and NS divides by their norm anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorica.interfaces import AdaptersLike, Trained
from lorica.methods.fields import number, one_of, whole
from lorica.methods.groups.base import Options, grouped
from lorica.methods.rules import _engine
from lorica.tensors import foreach
from lorica.tensors.dtensor_ops import add_, scale_

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's
PRECISION = torch.bfloat16  # of the iteration
EPS = 1e-7  # least norm to divide by, torch's
ORIGINAL_RATES = 0.02, 3e-4  # Jordan's, of the matrices and of AdamW


@dataclass(frozen=True, kw_only=True)
class Muon(_engine.EngineRule):
    """Momentum orthogonalised by Newton-Schulz: steps along all directions of a matrix alike.

    It is for the weight matrices of the targeted layers under `full`; all else that trains
    (embeddings, head, norms, biases, magnitudes) gets AdamW. Beside an adapter it moves every
    factor that is a matrix, A and B each on its own: an experiment, since it is BA that the model
    sees. Not to be confused with `galore`, whose step is AdamW's in a subspace.

    In a sharded model every process gathers each matrix and orthogonalises it, one stack at a time.

    Cost: one element of state per matrix element, half of AdamW's; five steps of NS, each some
    4·m²·n + 2·m³ FLOPs for a matrix (m, n), m ≤ n.
    When: training from scratch in full; fine-tuning what AdamW has pre-trained gains less.

    Args:
        momentum: μ in [0, 1); default 0.95, Jordan's.
        nesterov: default True, Jordan's.
        ns_steps: iterations of NS, from 1 to 99; default 5, Jordan's.
        adjust_lr_fn: f, by torch's names: `match_rms_adamw` (default, Moonshot's, so that one rate
            serves for all that trains) or `original` (torch's default, Jordan's).
        adamw_lr: rate of what AdamW moves. Default: the rate of the matrices, or 3e-4 with
            `original`, whose rate for the matrices, 0.02 by default, is none of AdamW's.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("full+muon").learning_rate
        (2e-05, 'full')
        >>> Recipe.parse("full+muon(adjust_lr_fn='original')").learning_rate
        (0.02, 'muon')

    Reference:
        @misc{jordan2024muon,
          title = {Muon: An optimizer for hidden layers in neural networks},
          author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista,
          Franz and Newhouse, Laker and Bernstein, Jeremy}, year = {2024}, url =
          {https://kellerjordan.github.io/posts/muon/}
        }
        @article{liu2025muon,
          title = {Muon is Scalable for LLM Training},
          author = {Liu, Jingyuan and Su, Jianlin and others}, year = {2025}, eprint = {2502.16982}
        }
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"
    adamw_lr: float | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"matrices"})
    # A row of N that is 0 stays 0 through NS, whatever the others do.
    gives: ClassVar[frozenset[str]] = frozenset({"sharded", "row_state", "row_wise"})
    trainer_names: ClassVar[frozenset[str]] = frozenset({"adamw_torch", "adamw_torch_fused"})

    def __post_init__(self) -> None:
        number(self, "momentum", least=0, below=1, say="a number in [0, 1), e.g. 0.95")
        one_of(self, "nesterov", True, False)
        whole(self, "ns_steps", least=1, most=99, say="a whole number from 1 to 99, e.g. 5")
        one_of(self, "adjust_lr_fn", "match_rms_adamw", "original")
        say = "a learning rate, at least 0, e.g. 3e-4; left out, that of the matrices"
        number(self, "adamw_lr", least=0, optional=True, say=say)

    @property  # and no class variable, for it depends on `adjust_lr_fn`
    def default_learning_rate(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> float | None:
        return ORIGINAL_RATES[0] if self.adjust_lr_fn == "original" else None

    def groups(self, adapters: AdaptersLike, lr: float, weight_decay: float) -> list[Options]:
        trained, by = adapters.trained(), adapters.recipe.groups
        if not any(t.matrix for t in trained):
            raise ValueError(
                f"`{self.name}` has no matrix to move in `{adapters.recipe.text()}`: embeddings,"
                " heads and vectors get AdamW. Name linear layers in `target_modules`, or leave"
                f" `{self.name}` out"
            )
        out: list[Options] = []
        for transposed in (False, True):
            matrices = [t for t in trained if t.matrix and t.transposed is transposed]
            for group in grouped(matrices, by, lr, weight_decay):
                out.append({**group, "matrices": True, "transposed": transposed})
        others = [t for t in trained if not t.matrix]
        return out + grouped(others, by, self._others_rate(lr), weight_decay)

    def _others_rate(self, lr: float) -> float:
        if self.adamw_lr is not None:
            return self.adamw_lr
        return ORIGINAL_RATES[1] if self.adjust_lr_fn == "original" else lr

    def build(self, groups: list[Options], options: Options) -> torch.optim.Optimizer:
        super().build(groups, options)  # refuses options that AdamW does not have
        if options and all("matrices" in g for g in groups):
            name = next(iter(options))
            raise ValueError(
                f"`{name}={options[name]!r}` is an option of what AdamW moves, and there is nothing"
                f" such here; leave it out. The options of `{self.name}` are"
                f" `{self.name}(momentum=..., nesterov=..., ns_steps=..., adjust_lr_fn=...)`"
            )
        names = ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")
        own: Options = {name: getattr(self, name) for name in names}
        plain, _ = self.options(options)
        made = [{**g, **(own if "matrices" in g else plain)} for g in groups]
        return MatrixOptimizer(self, made)

    def state_shapes(self, group: Options, parameter: Tensor) -> Mapping[str, tuple[int, ...]]:
        if "matrices" not in group:
            return super().state_shapes(group, parameter)
        return {"momentum_buffer": tuple(parameter.shape)}

    def state_elements(self, adapters: AdaptersLike) -> int:
        def elements(t: Trained) -> int:
            shape = tuple(t.parameter.shape)
            shapes = [shape] if t.matrix else self.plain.shapes(shape, {}).values()
            return sum(n for n in map(math.prod, shapes) if n > 1)

        return sum(map(elements, adapters.trained()))


class MatrixOptimizer(_engine.RuleOptimizer):
    """A `RuleOptimizer` whose groups of `matrices` are moved by Muon, stacked by shape."""

    def _update_plain(self, parameters: list[Tensor], group: Options) -> None:
        if "matrices" not in group:
            return super()._update_plain(parameters, group)
        alike: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[Tensor]] = {}
        for p in parameters:
            key = (p.shape, p.dtype, p.device, isinstance(p, DTensor))
            alike.setdefault(key, []).append(p)
        for (shape, *_), some in alike.items():
            count = max(1, _engine.STACKED // shape.numel())
            for i in range(0, len(some), count):
                self._move(some[i : i + count], group)

    def _move(self, parameters: Sequence[Tensor], group: Options) -> None:
        """One step of matrices of equal shape."""
        shape, mu, lr = tuple(parameters[0].shape), group["momentum"], float(group["lr"])
        moments = [self._state(p, "momentum_buffer", shape, like=p) for p in parameters]
        held = _engine.gradients(parameters)
        wide = [g.to(m.dtype) for m, g in zip(moments, held, strict=True)]
        foreach.lerp_(moments, wide, 1 - mu)
        steps = moments
        if group["nesterov"]:
            steps = [*foreach.mul(wide, 1.0)]  # copies
            foreach.lerp_(steps, moments, mu)
        turned = orthogonalised(_engine.stack_wide(steps, False), group["ns_steps"])
        out, inner = reversed(shape) if group["transposed"] else shape
        size = lr * adjustment(out, inner, group["adjust_lr_fn"])
        kept = 1 - lr * group["weight_decay"]
        if isinstance(parameters[0], DTensor):
            for p, step in zip(parameters, turned.unbind(0), strict=True):
                scale_(p, kept)
                add_(p, step.to(moments[0].dtype) * -size)
            return
        values = [p.to(m.dtype) for p, m in zip(parameters, moments, strict=True)]
        foreach.mul_(values, kept)
        foreach.add_(values, [*turned.to(moments[0].dtype).unbind(0)], alpha=-size)
        for p, v in zip(parameters, values, strict=True):
            if v is not p:  # was narrower
                p.copy_(v)


def adjustment(out: int, inner: int, adjust_lr_fn: str) -> float:
    """f of a weight (out, in)."""
    if adjust_lr_fn == "original":
        return math.sqrt(max(1, out / inner))
    return 0.2 * math.sqrt(max(out, inner))


def orthogonalised(N: Tensor, ns_steps: int) -> Tensor:
    """NS of each of the matrices N (n, rows, columns), in `PRECISION`."""
    a, b, c = COEFFICIENTS
    tall = N.shape[1] > N.shape[2]
    x = N.to(PRECISION)
    x = x.mT if tall else x
    norms = torch.stack([*foreach.norm([*x.unbind(0)])])
    x = x / norms.clamp(min=EPS)[:, None, None]
    for _ in range(ns_steps):
        s = x @ x.mT  # (n, m, m)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
