"""Optimizer state that lives in a subspace of the gradient.

    left (m, r), right (r, n): orthonormal; a matrix has one of the two, or both
    G (m, n)  ->  R = leftᵀ G, G rightᵀ, or leftᵀ G rightᵀ  ->  Adam's N, of R's shape
    W ← (W + left N right)·(1 − ηλ), the side that is missing left out

A matrix keeps its bases beside its moments; at a step count of 0 there are none yet.
Matrices of equal shape are stacked and updated together. Under FSDP2 the gradient is gathered for
its matrix alone; every process finds the same bases in it, moves its own part of the weight, and
holds the whole state.
"""

# The papers' symbols are upper case.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorica.methods.groups.base import Options
from lorica.methods.rules import _engine
from lorica.methods.rules._elementwise import Adam, Shape
from lorica.tensors import foreach
from lorica.tensors.dtensor_ops import copy_, draw, outer_add_, read_full, seeded
from lorica.tensors.linalg import LinAlgError, ints, qr, svd

logger = logging.getLogger("lorica")

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
MOMENTS = ("exp_avg", "exp_avg_sq")
OVERSAMPLE, POWERS = 8, 2  # of the range finder; Halko, Martinsson and Tropp's advice


def sides(proj_type: str, shape: Shape) -> tuple[str, ...]:
    """Which bases a matrix of the stored `shape` has; std: that of its shorter side."""
    tall = shape[0] >= shape[1]
    if proj_type in ("std", "reverse_std"):
        return ("right",) if tall == (proj_type == "std") else ("left",)
    return ("left", "right") if proj_type == "full" else (proj_type,)


def shapes(shape: Shape, options: Options) -> dict[str, Shape]:
    """State of a matrix: name -> shape."""
    (m, n), have = shape, sides(options["proj_type"], shape)
    r = min(options["rank"], m, n)
    small = (r if "left" in have else m, r if "right" in have else n)
    own = {"left": (m, r), "right": (r, n)}
    return {**Adam().shapes(small, options), **{side: own[side] for side in have}}


def bases(
    gradient: Tensor, r: int, generator: torch.Generator | None = None
) -> dict[str, Tensor] | None:
    """Orthonormal bases of the r largest singular values of G (m, n): left (m, r), right (r, n).

    Args:
        gradient: finite, float32 or wider.
        generator: on the CPU; with one, the bases are found in a random sketch of G, much faster
            where r is small.

    Returns:
        None where the gradient is zero, and so spans nothing.

    Raises:
        LinAlgError: the decomposition does not converge.
    """
    size = gradient.abs().amax()
    if not size:
        return None
    G = gradient / size.log2().floor().exp2()  # rounds nothing; a sketch multiplies several of it
    if generator is None:
        U, _, V = svd(G)
        return _signed(U[:, :r], V[:r])
    width = min(r + OVERSAMPLE, *G.shape)
    Q = qr(G @ draw((G.shape[1], width), generator).to(G))[0]
    for _ in range(POWERS):  # sharpen the spectrum; a QR between, or all columns turn into one
        Q = qr(G @ qr(G.mT @ Q)[0])[0]  # (m, width)
    U, _, V = svd(Q.mT @ G)
    return _signed(Q @ U[:, :r], V[:r])


def _signed(U: Tensor, V: Tensor) -> dict[str, Tensor]:
    """The bases U (m, r) and V (r, n) with each pair's signs fixed: V's largest entry is positive.

    A decomposition leaves the signs open, and libraries choose differently; moments outlive a
    refresh, so the same run would come out differently on another machine.
    """
    at = V.abs().argmax(1, keepdim=True)
    signs = torch.where(V.gather(1, at) < 0, -1.0, 1.0).to(V.dtype)  # (r, 1)
    return {"left": U * signs.mT, "right": V * signs}


class ProjectedOptimizer(_engine.RuleOptimizer):
    """A `RuleOptimizer` whose groups with a `rank` are updated in subspaces of their gradients."""

    def _update_plain(self, parameters: list[Tensor], group: Options) -> None:
        if "rank" not in group:
            for step, some in self._by_age(parameters).items() if _early(group) else ():
                super()._update_plain(some, {**group, "eps": _eps(group, step)})
            return None if _early(group) else super()._update_plain(parameters, group)
        offsets = self._offsets(group)
        for p in parameters:
            for name, shape in shapes(tuple(p.shape), group).items():
                self._state(p, name, shape, like=None if shape else p)
        counts = ints(torch.stack([self.state[p]["step"] for p in parameters]).long())
        alike: dict[tuple[int, torch.Size, torch.dtype, torch.device, bool], list[Tensor]] = {}
        for p, step in zip(parameters, counts, strict=True):
            offset, name = offsets[id(p)]
            due = step == 0 or (step - offset) % group["update_proj_gap"] == 0
            if due and not self._refresh(p, name, step, group):
                continue
            key = (step, p.shape, p.dtype, p.device, isinstance(p, DTensor))
            alike.setdefault(key, []).append(p)
        for (step, shape, *_), some in alike.items():
            count = max(1, _engine.STACKED // shape.numel())
            for i in range(0, len(some), count):
                self._move(some[i : i + count], step, group)

    def _by_age(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        """{steps taken so far: parameters}."""
        counts = [self.state[p].get("step") for p in parameters]
        ages: dict[int, list[Tensor]] = {}
        for p, count in zip(parameters, counts, strict=True):
            ages.setdefault(0 if count is None else int(count), []).append(p)
        return ages

    def _offsets(self, group: Options) -> dict[int, tuple[int, str]]:
        """{id of each matrix of the group: (the first step after 0 at which it gets new bases, as a
        remainder of the gap, and its name)}. Turns go by name, so the order of groups has no
        effect."""
        every = sorted(n for g in self.param_groups if "rank" in g for n in g["names"])
        turn = {name: i if group["spread"] else 0 for i, name in enumerate(every)}
        gap, named = group["update_proj_gap"], zip(group["params"], group["names"], strict=True)
        return {id(p): (turn[n] * gap // len(every), n) for p, n in named}

    def _refresh(self, p: Tensor, name: str, step: int, group: Options) -> bool:
        """Give p new bases; whether it has any."""
        G = read_full(*_engine.gradients([p]))
        random = group["svd"] == "random"
        generator = seeded(f"{group['seed']}/{step}/{name}") if random else None
        r = min(group["rank"], *G.shape)
        try:
            found = bases(G.to(_engine.wide_dtype(G.dtype)), r, generator)
        except LinAlgError as error:
            then = "no step here" if step == 0 else "the old subspace stays until the next refresh"
            logger.warning("%s: no singular vectors at step %d, %s (%s)", name, step, then, error)
            found = None
        if found is None:
            return step > 0
        for side in sides(group["proj_type"], tuple(G.shape)):
            copy_(self.state[p][side], found[side])
        return True

    def _move(self, parameters: Sequence[Tensor], step: int, group: Options) -> None:
        """One step of matrices of equal shape and age."""
        states = [self.state[p] for p in parameters]
        left, right = (
            _engine.stack_wide([s[side] for s in states], False) if side in states[0] else None
            for side in ("left", "right")
        )
        R = _engine.stack_wide(_engine.gradients(parameters), False)
        R = R if left is None else left.mT @ R  # (k, r, m)·(k, m, n)
        R = R if right is None else R @ right.mT
        own = {n: _engine.stack_wide([s[n] for s in states], False) for n in MOMENTS}
        eps, lr = _eps(group, step), float(group["lr"])
        N = Adam().stacked(
            torch.zeros_like(R), R, {**own, "step": torch.tensor(float(step))},
            lr * group["scale"], 0.0, {"betas": group["betas"], "eps": eps},
        )  # fmt: skip
        for name, moment in own.items():
            _engine.unstack_([s[name] for s in states], moment, False)
        foreach.add_([s["step"] for s in states], 1)
        if right is None:
            assert left is not None  # `sides` names one at least
            B, A = left, N  # (k, m, r), (k, r, n)
        else:
            B, A = N if left is None else left @ N, right
        _add(parameters, B, A, 1 - lr * group["weight_decay"])


def _early(group: Options) -> bool:
    """Whether ε is added before the bias correction; groups that have torch's AdamW don't say."""
    return group.get("eps_placement") == "before"


def _eps(group: Options, step: int) -> float:
    """ε for torch's order of operations: before the correction it is √v + ε, over √(1−β₂ᵗ) as a
    whole."""
    after: float = group["eps"]
    return after / math.sqrt(1 - group["betas"][1] ** (step + 1)) if _early(group) else after


def _add(parameters: Sequence[Tensor], B: Tensor, A: Tensor, kept: float) -> None:
    """W ← (W + B A)·kept for each."""
    if isinstance(parameters[0], DTensor):
        for p, b, a in zip(parameters, B, A, strict=True):
            outer_add_(p, b, a)
        values = list(parameters)
    else:
        values = [p.to(B.dtype) for p in parameters]
        foreach.add_(values, list((B @ A).unbind(0)))
    if kept != 1:
        foreach.mul_(values, kept)
    for p, v in zip(parameters, values, strict=True):
        if v is not p:  # was narrower
            p.copy_(v)
