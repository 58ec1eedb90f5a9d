"""LoRA-GA: start from the singular vectors of the weight's gradient.

    G = mean over the batches of ∂L/∂W (out, in) = U S Vᵀ, its largest 2r components;  c = ⁴√out/√γ
    A₀ = c·V[:, 1..r]ᵀ (r, in),   B₀ = c·U[:, r+1..2r] (out, r);   y = x Wᵀ + s·(x(BA − B₀A₀)ᵀ)

The first step of plain gradient descent at rate η then moves ΔW by −η·s²·(G·A₀ᵀA₀ + B₀B₀ᵀ·G) =
−η·s²c²·G₂ᵣ up to a term in η²: along G₂ᵣ, the best approximation of G of rank 2r, which no start
of rank r can beat. Swapping the two halves (`A2rBr`) or alternating them (`ArBr`) gives the same
first step.

This follows the authors' code. PEFT 0.21's `lora_ga` differs: its B carries the singular values,
B₀ = c·U diag(S), and its A no factor at all, so the size of the start follows that of the
gradient; `peft=True` does the same. Both subtract s·B₀A₀ from the base; here the base keeps its
bytes and the layer carries −B₀, A₀. The gradient is taken in evaluation mode, without dropout
(there: in training mode).

G is never held for all layers: they are taken in groups of 1 GiB in float32, and each group has a
backward of its own through every batch (at the peak, a batch's gradients and their sum: 2 GiB).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorica.interfaces import BaseLike, Pair, RecipeLike, Site
from lorica.methods.fields import number, one_of, whole, without_effect
from lorica.methods.inits.base import AbstractInit
from lorica.methods.optional import Batches, StartsFromData
from lorica.tensors.dtensor_ops import draw, seeded, sum_over_processes
from lorica.tensors.linalg import ints, sketched_svd, svd, svdvals

_grad: Any = torch.autograd.grad  # Any: its type leaves out the None of `allow_unused`

HELD = 2**28  # entries of gradients that are held at once: 1 GiB in float32


@dataclass(frozen=True)
class Components:
    """The largest components of one layer's gradient, and W's singular values if asked for."""

    U: Tensor  # (out, k), k = min(2r, in, out)
    S: Tensor  # (k,)
    Vh: Tensor  # (k, in)
    of_weight: Tensor | None  # (min(in, out),)


@dataclass(frozen=True, kw_only=True)
class Loraga(StartsFromData, AbstractInit):
    """Singular vectors of the gradient as the start, so that the first step follows full
    fine-tuning's; the function is kept.

    Brings `rslora`, as the paper does. In a layer with min(in, out) < 2r the two factors share the
    components that are missing.

    Cost: `batches` backwards at the start, once for each GiB of gradients (a 7B model: 25 times),
    and frozen factors as large as the trained ones.
    When: short runs: the paper reports LoRA's loss in 2 to 4 times fewer steps.

    Args:
        batches: batches that the gradient is averaged over, at least 1. Default 8 (the authors'
            runs: 8 examples, one by one).
        direction: `ArB2r` (default, the paper's: A has components 1..r, B r+1..2r), `A2rBr` (the
            reverse), `ArBr` (B has 1, 3, 5, ..., A 2, 4, 6, ...) or `random`.
        scale: `stable` (default: both times ⁴√out/√γ), `weight_svd` (both times the mean root of
            W's r largest singular values over s), `gd_scale` (both divided by s) or `unit`.
        stable_gamma: γ of `stable`, above 0. Default 16, the paper's.
        niter: power iterations of the randomised SVD with 4r columns; 0 is the exact one. Default
            4, the authors'.
        peft: True takes PEFT 0.21's formulas of all four scales, with the singular values in B.
            Default False.

    Raises:
        ValueError: a model that gives no loss; a target whose weight has no gradient, or one that
            is not finite.

    Example:
        >>> import torch, lorica
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)
        >>> ids = torch.arange(6)[None]
        >>> batches = [{"input_ids": ids, "labels": ids}]
        >>> method = "loraga(batches=1)"
        >>> adapters = lorica.attach(
        ...     GPT2LMHeadModel(config), method, r=2, data=batches, verbose=False
        ... )
        >>> adapters.recipe.text()
        'loraga(batches=1)'

    Reference:
        @inproceedings{wang2024loraga,
          title = {LoRA-GA: Low-Rank Adaptation with Gradient Approximation},
          author = {Wang, Shaowen and Yu, Linxi and Li, Jian},
          booktitle = {NeurIPS}, year = {2024}, eprint = {2407.05000}
        }
    """

    batches: int = 8
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16
    niter: int = 4
    peft: bool = False

    preset: ClassVar[Mapping[str, str]] = {"scales": "rslora"}
    experts: ClassVar[bool] = False
    withdraws: ClassVar[frozenset[str]] = frozenset({"restarts"})
    default_learning_rate: ClassVar[float | None] = 2e-5  # the authors' example on a 7B model

    def __post_init__(self) -> None:
        whole(self, "batches", say="a whole number of batches, at least 1, e.g. 8")
        one_of(self, "direction", "ArB2r", "A2rBr", "ArBr", "random")
        one_of(self, "scale", "stable", "weight_svd", "gd_scale", "unit")
        number(self, "stable_gamma", above=0, say="a number above 0, e.g. 16")
        if self.scale != "stable":
            without_effect(self, "stable_gamma", 16, "it belongs to `scale='stable'`")
        say = "a whole number up to 1,000, e.g. 4; 0 is the exact SVD"
        whole(self, "niter", least=0, most=1000, say=say)
        one_of(self, "peft", True, False)

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return 16 if recipe.scale.uses_alpha else None  # the authors'

    # -- what the data say

    def observe(
        self, model: nn.Module, layers: Mapping[str, BaseLike], sites: Mapping[str, Site],
        data: Batches,
    ) -> Mapping[str, Components]:  # fmt: skip
        seen: dict[str, Components] = {}
        for names in groups({n: s.out_features * s.in_features for n, s in sites.items()}):
            G = gradients(model, {n: layers[n] for n in names}, data)
            while G:
                name = next(iter(G))
                seen[name] = self._components(G.pop(name), layers[name], sites[name])
        return seen

    def _components(self, G: Tensor, store: BaseLike, site: Site) -> Components:
        if not G.isfinite().all():
            raise ValueError(
                f"the gradient of {site.name!r} over `data` has values that are not finite, so"
                f" `{self.name}` can make no start of it; load the model in bfloat16 or float32"
            )
        k = min(2 * site.r, *G.shape)
        probe = draw((G.shape[1], min(4 * site.r, *G.shape)), seeded(site.name))
        U, S, Vh = sketched_svd(G, probe, self.niter) if self.niter else svd(G)
        of_weight = None
        if self.scale == "weight_svd":
            of_weight = svdvals(store.weight().detach().to(G.dtype))
        return Components(U[:, :k].clone(), S[:k].clone(), Vh[:k].clone(), of_weight)

    # -- the start

    def fill_from(
        self, seen: Components, weight: Tensor, pair: Pair, generator: torch.Generator
    ) -> None:
        of_A, of_B = self._halves(pair.A.shape[0], len(seen.S), generator)
        times_A, times_B = self._factors(seen, of_B, pair.scale)
        pair.A.copy_(times_A * seen.Vh[of_A])
        pair.B.copy_(times_B * seen.U[:, of_B])

    def _halves(self, r: int, k: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Which r of the k components A takes, and which B."""
        every = [*range(k)]
        if self.direction == "random":
            every = ints(torch.randperm(k, generator=generator))
        first, second = every[:r], every[r : 2 * r]
        if self.direction == "ArBr":
            second, first = every[0 : 2 * r : 2], every[1 : 2 * r : 2]
        # Where there are fewer than 2r, one side lacks some, and takes the other's largest.
        first, second = first + second[: r - len(first)], second + first[: r - len(second)]
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def _factors(
        self, seen: Components, of_B: list[int], s: float
    ) -> tuple[Tensor | float, Tensor | float]:
        """What A's rows and B's columns, of length 1 so far, are multiplied by."""
        values = seen.S[of_B] if self.peft else 1.0
        if self.scale == "stable":
            c = seen.U.shape[0] ** 0.25 / self.stable_gamma**0.5
            return (1.0 if self.peft else c), c * values
        if self.scale == "gd_scale":
            return 1 / s, values / s
        if self.scale == "weight_svd":
            assert seen.of_weight is not None  # observed with this scale
            if not self.peft:
                root = (seen.of_weight[: len(of_B)] / s).sqrt().mean()
                return root, root
            lead = seen.S[of_B[0]]
            return 1.0, values * (seen.of_weight[0] / lead if lead > 0 else 1.0)
        return 1.0, values


def groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The layers in order, in runs of at most `HELD` entries (or of one layer)."""
    out: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not out or held + size > HELD:
            out.append([])
            held = 0
        out[-1].append(name)
        held += size
    return out


def gradients(model: nn.Module, layers: Mapping[str, BaseLike], data: Batches) -> dict[str, Tensor]:
    """Mean gradient of the loss by each weight (out, in), over batches and processes, in at
    least float32. A weight that another module shares counts where it is this layer's.

    Raises:
        ValueError: no loss, or a weight that it does not depend on.
    """
    dense = {n: store for n, store in layers.items() if store.dense}
    leaves = {n: store.parameter.detach().requires_grad_() for n, store in dense.items()}
    named: dict[str, Any] = {f"{n}.weight": leaf for n, leaf in leaves.items()}
    total: dict[str, Tensor] = {}

    def count_in(name: str, gradient: Tensor) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total[name] = wide if name not in total else total[name].add_(wide)

    with torch.enable_grad(), _watching(layers) as calls:
        for i, batch in enumerate(data):
            calls.clear()
            outputs: Any = functional_call(model, named, (), dict(batch), tie_weights=False)
            loss = _loss(outputs, batch)
            if not loss.isfinite():
                raise ValueError(
                    f"the loss of batch {i} is {loss.item()}, so no start can be made from its"
                    " gradient; every batch needs a loss that is a number: leave out rows whose"
                    " labels are all -100, or load the model in bfloat16 or float32"
                )
            wanted = [*leaves.values(), *(call.y for call in calls)]
            found: Sequence[Tensor | None] = _grad(loss, wanted, allow_unused=True)
            for name, gradient in zip(leaves, found[: len(leaves)], strict=True):
                if gradient is not None:
                    count_in(name, gradient)
            for call, dy in zip(calls, found[len(leaves) :], strict=True):
                if dy is not None:
                    count_in(call.name, call.outer(dy))
    if missing := [n for n in layers if n not in total]:
        raise ValueError(
            f"the loss over `data` does not depend on {missing[0]!r} ({len(missing)} such"
            " layer(s)), so its weight has no gradient to start from; every target has to take"
            " part in the loss: leave such layers out with `exclude_modules`, or give batches that"
            " reach them"
        )
    count = torch.tensor([float(len(data))])
    means = {n: _mean(total.pop(n), count) for n in layers}
    return {n: G.T if layers[n].transposed else G for n, G in means.items()}


@dataclass(frozen=True)
class _Call:
    """One call of a layer whose weight is packed, and so can have no gradient."""

    name: str
    x: Tensor  # (..., in)
    y: Tensor  # (..., out)

    def outer(self, dy: Tensor) -> Tensor:
        """The weight's gradient dYᵀ X (out, in), in at least float32."""
        wide = torch.promote_types(dy.dtype, torch.float32)
        return dy.to(wide).flatten(0, -2).T @ self.x.to(wide).flatten(0, -2)


@contextmanager
def _watching(layers: Mapping[str, BaseLike]) -> Generator[list[_Call]]:
    """Within, every call of a packed layer is noted."""
    calls: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            y = y if y.requires_grad else y.detach().requires_grad_()
            calls.append(_Call(name, args[0].detach(), y))
            return y

        return hook

    packed = {n: store for n, store in layers.items() if not store.dense}
    handles = [s.module.register_forward_hook(note(n)) for n, s in packed.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    total, count = sum_over_processes([total, count.to(total)])
    return total / count


def _loss(outputs: object, batch: Mapping[str, object]) -> Tensor:
    fields: dict[str, object] = {**outputs} if isinstance(outputs, Mapping) else {}
    loss = fields.get("loss")
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model gives no loss for a batch of {', '.join(sorted(batch))}, and `loraga` makes"
            " its start from the gradient of one; `data` has to hold all that the loss needs: add"
            " the labels, e.g. `{**batch, 'labels': batch['input_ids']}`"
        )
    return loss
