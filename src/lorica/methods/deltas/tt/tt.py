"""TT-LoRA: the whole update as a tensor train.

    ΔW = α·T,  T (out, in) from cores G_k (r_{k−1}, d_k, r_k), k = 1..D;  d_1·…·d_p = in, the others
    out; r_0 = r_D = 1, every other bond r;  Σ r_{k−1}·d_k·r_k parameters  (see `trains`)

α is not divided by r. The bond between the inputs' cores and the outputs' makes ΔW a product of an
A (r, in) and a B (out, r) that are trains themselves: its rank is at most r, and its factors are a
plain LoRA.

    factors  A and B multiplied out, then x Aᵀ Bᵀ:   once ~ r²·(in + out), per token r·(in + out)
    through  one core after the other:               per token r·(in + out)·(1 + r/d_1 + …)

`forward` takes the order with fewer multiplies for the actual shapes: the cores for a few tokens,
A and B for many. The authors always go through the cores.

The authors publish two index maps, which read different matrices out of the same cores. Their
contraction, the default here, has the digits of the input in the leading cores; an earlier version
reshapes the train straight to (out, in), with the digits of the output there: `leading="outputs"`.
In a trial the two differed by 6.6, so cores are good for the map that they were trained with alone.

The start: each core uniform, divided by its own norm: ‖T‖ ≈ r^(−(D−1)/2). That is not zero, so
attaching changes the authors' model. Here `direct` keeps that start, but ΔW = α·(T − T₀), T₀ from
the first cores, which are frozen and saved, a few hundred per layer. `zero` starts with a last core
of zeros instead. (Their other start, a dense random matrix decomposed into a train, is left out:
‖ΔW‖ = 5 on 2048 x 2048.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, RecipeLike, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice, zeros
from lorica.methods.deltas.tt import trains
from lorica.methods.fields import is_whole, one_of, refused
from lorica.methods.scales.base import AbstractScale
from lorica.tensors.dtensor_ops import copy_, read_full, zero_
from lorica.tensors.matmul import no_autocast

MOST = 64  # cores: 2^32 features on each side have no more prime factors


class TrainDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {f"cores.{k}": "core" for k in range(MOST)}

    def __init__(
        self, site: Site, shape: Sequence[int], inputs: int, *, offset: bool, leading: str
    ) -> None:
        super().__init__()
        cores = [zeros(site, *s) for s in trains.ranks(shape, site.r)]
        self.cores = nn.ParameterList(cores)
        self.origin = nn.ParameterList(
            nn.Parameter(c.detach().clone(), requires_grad=False) for c in cores if offset
        )
        self.site, self.scale, self.inputs = site, site.scale, inputs
        self.outputs: tuple[int, ...] = ()  # digits to bring into order, where outputs lead
        if leading == "outputs":
            self.outputs = (*reversed(shape[: len(shape) - inputs]),)
        once, each, way = trains.multiplies(self._inputs_first(cores), inputs)
        self.few = once / (way - each) if way > each else 0  # fewer tokens go through the cores

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        tokens = x.numel() // max(x.shape[-1], 1)
        if self.site.lookup or tokens >= self.few:
            f = self.factors()
            h = F.embedding(x, f.A.T) if self.site.lookup else F.linear(x, f.A.to(x.dtype))
            return F.linear(h, (f.scale * f.B).to(h.dtype))
        rows = x.reshape(-1, x.shape[-1])
        y = trains.through(rows, self._inputs_first(self.cores), self.inputs)
        if len(self.origin):
            y = y - trains.through(rows, self._inputs_first(self.origin), self.inputs)
        y = trains.reordered(y, self.outputs) if self.outputs else y
        return (self.scale * y).view(*x.shape[:-1], y.shape[-1])

    def weight(self, base: BaseLike) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        """B·A, of rank r, or BA − B₀A₀ = (B − B₀)A + B₀(A − A₀), of rank 2r and exactly zero at the
        start."""
        with no_autocast(self.cores[0].device.type):
            A, B = self._factors(self.cores)
            if not len(self.origin):
                return Factors(A, B, self.scale)
            A0, B0 = self._factors(self.origin)
            return Factors(torch.cat([A, A - A0]), torch.cat([B - B0, B0], 1), self.scale)

    def _factors(self, cores: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        whole = self._inputs_first([read_full(core) for core in cores])
        A, B = trains.factors(whole, self.inputs)
        return A, trains.reordered(B.T, self.outputs).T if self.outputs else B

    def _inputs_first(self, cores: Iterable[Tensor]) -> list[Tensor]:
        return trains.turned([*cores]) if self.outputs else [*cores]

    def restart(self, link: int, generator: torch.Generator) -> None:
        trains.draw_cores(list(self.cores), generator)
        for core, first in zip(self.cores, self.origin, strict=False):
            copy_(first, core)
        if not len(self.origin):
            zero_(self.cores[-1])


def _sizes(given: object) -> tuple[int, ...]:
    """Mode sizes, given as a list or a tuple; empty where it is anything else."""
    if not isinstance(given, (list, tuple)):
        return ()
    values: list[object] = [*given]
    sizes = tuple(d for d in values if is_whole(d))
    return sizes if len(sizes) == len(values) else ()


@dataclass(frozen=True, kw_only=True)
class StraightScale(AbstractScale):
    """s = α for every rank.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("tt", r=4)
        >>> recipe.scale.factor(recipe.lora_alpha, 4)
        16
    """

    def factor(self, alpha: float | None, r: int) -> float:
        assert alpha is not None
        return alpha

    def alpha_for(self, s: float, r: int) -> float:
        return s


@dataclass(frozen=True, kw_only=True)
class Tt(DeltaChoice):
    """A tensor train: an update of rank r with a few hundred parameters per layer.

    LoRA whose A and B are chains of small cores: the number of parameters grows with the sum of the
    mode sizes, not with in + out, and so does what it can express. Merging and PEFT's form are
    exact, the latter with rank 2r (`zero`: r). Leave weight decay at 0: it acts on each of D
    factors.

    Cost: a few hundred parameters per layer, LoRA's products, and small ones to form A and B.
    When: adapters have to be tiny: many users, one model.

    Args:
        shape: mode sizes, the inputs' first, the outputs' in reverse, as the authors write them
            (`[16, 8, 4, 4, 4, 4, 8, 16]` for 2048 x 2048); one shape for all targets, which then
            must have these sizes. Default: for each layer the factors of in and of out that need
            the fewest parameters.
        start: `direct` (default: the authors', with the frozen start subtracted so that the
            function is kept) or `zero` (a last core of zeros: half the cost, and only that core
            learns in the first step).
        leading: whose digits the leading cores hold: `inputs` (default) or `outputs`, as in the
            authors' earlier code; `shape` then has the outputs' sizes first.

    Raises:
        ValueError: a shape that doesn't fit a target.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> lorica.attach(model, "tt", r=4, verbose=False).summary.trainable
        256

    Reference:
        @misc{anjum2024tensor,
          title = {Tensor Train Low-rank Approximation (TT-LoRA): Democratizing AI with Accelerated
                   LLMs},
          author = {Anjum, Afia and Eren, Maksim E. and Boureima, Ismael and Alexandrov, Boian and
                    Bhattarai, Manish}, year = {2024}, eprint = {2408.01008}
        }
    """

    shape: tuple[int, ...] | None = None
    start: str = "direct"
    leading: str = "inputs"

    gives: ClassVar[frozenset[str]] = frozenset(
        {"factors", "weight", "lookup", "sharded", "wrapped"}
    )
    withdraws: ClassVar[frozenset[str]] = frozenset({"matrices"})  # what trains has three axes
    preset: ClassVar[Mapping[str, str]] = {"scales": "scale.tt"}
    requires: ClassVar[frozenset[str]] = frozenset({"scales"})
    default_r: ClassVar[int | None] = 5  # this and the rate: the authors' runs on Llama-3.2-1B
    default_learning_rate: ClassVar[float | None] = 5e-3

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return 16

    def __post_init__(self) -> None:
        one_of(self, "start", "direct", "zero")
        one_of(self, "leading", "inputs", "outputs")
        if self.shape is None:
            return
        modes = _sizes(self.shape)
        if not 2 <= len(modes) <= MOST:
            raise refused(
                self,
                "shape",
                f"2 to {MOST} whole numbers of at least 1, e.g. `tt(shape=[16, 8, 4, 4, 4, 4, 8,"
                " 16])` for 2048 x 2048; left out, each layer gets its own",
            )
        object.__setattr__(self, "shape", modes)

    def build(self, site: Site) -> TrainDelta:
        first, second = site.in_features, site.out_features
        if self.leading == "outputs":
            first, second = second, first
        own = [*trains.modes(first, site.r), *reversed(trains.modes(second, site.r))]
        shape = own if self.shape is None else self.shape
        if (cut := trains.split(shape, first, second)) is None:
            raise ValueError(
                f"`tt(shape={list(shape)})` does not fit {site.name!r} ({site.out_features} x"
                f" {site.in_features}): the leading sizes must multiply to {first} and the others"
                f" to {second}, e.g. `tt(shape={own})`. Leave `shape` out, so that each layer gets"
                " its own, or narrow `target_modules`"
            )
        inputs = cut if self.leading == "inputs" else len(shape) - cut
        offset = self.start == "direct"
        return TrainDelta(site, shape, inputs, offset=offset, leading=self.leading)
