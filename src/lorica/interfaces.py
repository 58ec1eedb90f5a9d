"""What the parts of a method know of each other: the small value types, and one Protocol per seam.

    Site, Factors, Pair     where an adapter is, and how its ΔW is made
    Trained                 one trained parameter, with its role
    BaseLike, UpdateLike, KernelLike, LayerLike
                            the frozen weight, ΔW, the order of the products, and the layer of them
    AdaptersLike            the handle on an adapted model
    TrainingLike            one optimizer step, as a schedule sees it
    RecipeLike              the user's choices

A method imports these and never the classes behind them (`lorica.model`, `lorica.training`). This
module imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Where an adapter is: everything a delta may know of its layer."""

    name: str  # module path
    in_features: int
    out_features: int
    r: int  # 0 where the delta takes no `r`
    scale: float  # s in ΔW = s·B·A
    lookup: bool  # the input is a token id: x is one-hot and A is read by column
    dtype: torch.dtype  # of what trains
    device: torch.device
    biased: bool  # the layer has a bias
    experts: int = 0  # matrices in a stack (E, out, in) that is adapted as one; 0: a single matrix

    def shape(self, *one: int) -> tuple[int, ...]:
        """Of a tensor that holds `one` for each expert, or just that of a single matrix."""
        return (self.experts, *one) if self.experts else one


@dataclass(frozen=True)
class Factors:
    """An exact low-rank view ΔW = scale · B @ A, of a stack of experts one for each; read only."""

    A: Tensor  # ([E,] k, in)
    B: Tensor  # ([E,] out, k)
    scale: float = 1.0

    def weight(self) -> Tensor:
        """ΔW (out, in) in at least float32: half precision would lose small updates."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        with torch.autocast(self.A.device.type, enabled=False):
            return self.scale * (self.B.to(wide) @ self.A.to(wide))


@dataclass(frozen=True)
class Pair:
    """The trained factors themselves: inits fill them, rules update them, schedules slice them.

    With a leading dimension of E, of a stack of experts, where the recipe serves those.
    """

    A: nn.Parameter  # (r, in)
    B: nn.Parameter  # (out, r)
    scale: float
    lookup: bool = False
    E: nn.Parameter | None = None  # (r, 1), a trained diagonal between the two
    mask: nn.Parameter | None = None  # (r, 1), frozen: 1 where a rank counts, 0 where it is gone

    def middle(self) -> Tensor | None:
        """What is between the two (r, 1), gathered: E, of the ranks that count; None: nothing."""
        if self.E is None:
            return None
        return _whole(self.E) if self.mask is None else _whole(self.mask) * _whole(self.E)

    def right(self) -> Tensor:
        """The product's right factor (r, in), gathered: A, or A times the diagonal before it."""
        middle = self.middle()
        return _whole(self.A) if middle is None else middle * _whole(self.A)


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@dataclass(frozen=True)
class Trained:
    """One trained parameter, as its owner declares it."""

    name: str  # path in the model
    parameter: nn.Parameter
    # "A", "B", "diagonal", "core", "magnitude"; a target's own "weight" and "bias"; "module": of
    # one that trains in full beside the targets
    role: str
    site: str  # path of the layer it belongs to
    lookup: bool = False  # belongs to an embedding that is adapted or trains itself
    transposed: bool = False  # a target's weight, stored as (in, out)

    @property
    def matrix(self) -> bool:
        """Whether it multiplies activations: no table that token ids are looked up in, no vector,
        nothing that scales others, no head."""
        hidden = self.role in ("A", "B", "core", "weight") and not self.lookup
        return hidden and self.parameter.ndim == 2


# A model's keyword arguments, and what it returns: each model defines its own, hence Any.
Batch = Mapping[str, Any]
Outputs = Mapping[str, Any]

# A combine's gain on each row of W + ΔW: g (out,), in at least float32. Called once in a forward,
# by the kernel, with whether W + ΔW (out, in) would be used if it was formed on the way; the second
# value is that sum where it was formed and is the kernel's to change, else None.
RowScale = Callable[[bool], tuple[Tensor, Tensor | None]]


# -- seams -----------------------------------------------------------------------------------------


class BaseLike(Protocol):
    """A frozen weight, presented as W (out, in) however it is stored."""

    @property
    def module(self) -> nn.Module:
        """The plain module that holds it, as `weight`."""
        ...

    @property
    def lookup(self) -> bool:
        """The input is a token id."""
        ...

    @property
    def transposed(self) -> bool:
        """The stored weight is Wᵀ (in, out)."""
        ...

    @property
    def dense(self) -> bool:
        """What is stored are W's values; otherwise `weight` makes them, for a moment."""
        ...

    @property
    def parameter(self) -> nn.Parameter:
        """What is stored, in its own layout."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of W's values."""
        ...

    def weight(self) -> Tensor:
        """W (out, in)."""
        ...

    def bias(self) -> Tensor | None:
        """b (out,)."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        ...

    def linear(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        ...


class DeltaLike(Protocol):
    """ΔW of one weight; see `lorica.methods.deltas.base.AbstractDelta`."""

    @property
    def scale(self) -> float: ...

    def __call__(self, x: Tensor, base: BaseLike) -> Tensor: ...

    def weight(self, base: BaseLike) -> Tensor | None: ...

    def factors(self) -> Factors | None: ...

    def pair(self) -> Pair | None: ...

    def restart(self, link: int, generator: torch.Generator) -> None: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


class UpdateLike(Protocol):
    """The trained delta and the frozen factors beside it, with the dropout that falls on them."""

    @property
    def delta(self) -> DeltaLike: ...

    @property
    def lookup(self) -> bool: ...

    @property
    def dropout(self) -> float: ...

    @property
    def drop_frozen(self) -> bool:
        """Dropout falls on the frozen factors, too."""
        ...

    @property
    def dropping(self) -> bool:
        """Whether this call drops inputs, so that no one matrix is the update."""
        ...

    @property
    def frozen_factors(self) -> Factors | None: ...

    def __call__(self, x: Tensor, base: BaseLike) -> Tensor:
        """x ΔWᵀ: (..., in) -> (..., out)."""
        ...

    def weight(self, base: BaseLike) -> Tensor:
        """ΔW (out, in) in at least float32."""
        ...

    def factors(self) -> Factors | None: ...

    def drop(self, x: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def dropped_part(self, x: Tensor, base: BaseLike, keep: Tensor | None = None) -> Tensor: ...

    def undropped_part(self, x: Tensor) -> Tensor | None: ...

    def row_norms(self, base: BaseLike) -> Tensor: ...

    def formed_norms(self, base: BaseLike, *, keep: bool) -> tuple[Tensor, Tensor | None]: ...

    def accumulate_(self, base: BaseLike, accumulate: str, share: float = 1.0) -> None: ...


class KernelLike(Protocol):
    """The order in which the products of one layer are computed."""

    def product(
        self, x: Tensor, base: BaseLike, update: UpdateLike, *, gain: RowScale | None = None
    ) -> Tensor:
        """g ∘ (x Wᵀ + update(x)) + b: (..., in) -> (..., out)."""
        ...


class CombineLike(Protocol):
    """How W and ΔW make the effective weight."""

    def effective(self, base: BaseLike, update: UpdateLike) -> tuple[Tensor, Tensor | None]: ...


class LayerLike(Protocol):
    """One adapted layer."""

    @property
    def site(self) -> Site: ...

    @property
    def store(self) -> BaseLike: ...

    @property
    def update(self) -> UpdateLike: ...

    @property
    def combine(self) -> nn.Module: ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def frozen_for_now(self) -> tuple[str, ...]:
        """Names of parameters that do not train at present."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def trained(self) -> list[tuple[str, nn.Parameter, str]]:
        """(name within the layer, parameter, role)."""
        ...

    def effective(self) -> tuple[Tensor, Tensor | None]: ...


class HooksLike(Protocol):
    """What methods asked to see of a forward."""

    @property
    def wanted(self) -> frozenset[str]: ...

    @property
    def input_squares(self) -> dict[str, Tensor]:
        """{module path: (in,) float32}."""
        ...


class ChoiceLike(Protocol):
    """A point on an axis."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def gives(self) -> frozenset[str]: ...


class ScaleLike(ChoiceLike, Protocol):
    def factor(self, alpha: float | None, r: int) -> float: ...

    def alpha_for(self, s: float, r: int) -> float | None: ...


class InitLike(ChoiceLike, Protocol):
    @property
    def reads_weight(self) -> bool: ...

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None: ...


class RecipeLike(Protocol):
    """The user's choices; see `lorica.Recipe`."""

    @property
    def r(self) -> int | None: ...

    @property
    def lora_alpha(self) -> float | None: ...

    @property
    def lora_dropout(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def rank_pattern(self) -> Mapping[str, int]: ...

    @property
    def alpha_pattern(self) -> Mapping[str, float]: ...

    @property
    def delta(self) -> Any: ...  # Any: each axis' abstract class lies above this module

    @property
    def init(self) -> Any: ...  # Any: as above

    @property
    def scale(self) -> Any: ...  # Any: as above

    @property
    def rank(self) -> Any: ...  # Any: as above

    @property
    def schedules(self) -> tuple[Any, ...]: ...  # Any: as above

    @property
    def groups(self) -> tuple[Any, ...]: ...  # Any: as above

    @property
    def objectives(self) -> tuple[Any, ...]: ...  # Any: as above

    def text(self) -> str:
        """The methods as a user would type them."""
        ...


class AdaptersLike(Protocol):
    """The handle on an adapted model; see `lorica.Adapters`."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def recipe(self) -> RecipeLike: ...

    @property
    def layers(self) -> Mapping[str, LayerLike]: ...

    @property
    def hooks(self) -> HooksLike: ...

    @property
    def signals(self) -> dict[str, Any]:  # Any: what a schedule tells its own objective
        ...

    def __iter__(self) -> Iterator[tuple[str, LayerLike]]: ...

    def __len__(self) -> int: ...

    def pairs(self) -> Iterator[tuple[str, Pair]]: ...

    def trained(self) -> list[Trained]: ...

    def disabled(self) -> AbstractContextManager[None]: ...


class TrainingLike(Protocol):
    """One optimizer step, as a schedule sees it."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def adapters(self) -> AdaptersLike: ...

    @property
    def step(self) -> int:
        """0-based index of this step."""
        ...

    @property
    def total_steps(self) -> int | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def fresh(self) -> set[str]:
        """Layers that were started anew after this step."""
        ...

    def generator(self, *key: object) -> torch.Generator:
        """CPU generator for this step and key: equal on every process and after every resume."""
        ...

    def restarted(self, layers: Iterable[str]) -> None: ...

    def lr_scale(self, factor: float) -> None: ...

    def lr_factor(self, factor: float) -> None: ...

    def set_trainable(
        self, layers: Collection[str] | None = None, *, base: bool = False
    ) -> None: ...

    def merge_(
        self, layer: LayerLike, *, link: int, generator: torch.Generator,
        accumulate: str = "base", keep_state: bool = False,
    ) -> None:  # fmt: skip
        ...

    def swap_(
        self, layer: LayerLike, side: str, index: Sequence[int], rows: Tensor, *,
        keep_state: bool = False,
    ) -> None:  # fmt: skip
        ...
