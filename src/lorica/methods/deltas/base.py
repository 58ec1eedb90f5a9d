"""Deltas: how the update ΔW (out, in) of one weight is parametrised.

A method here is a choice (a frozen dataclass of hyperparameters) whose `build(site)` makes the
module that owns the trained parameters of one layer. The suite checks every file for this:
`forward(x)` equals `x @ weight(base).T`; the factors reproduce the weight; dtype and device are
kept; the state survives saving and loading; gradients pass gradcheck.

To add one: copy `lowrank.py`, change the equations, add the paper's claims as a test.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.interfaces import BaseLike, Factors, Pair, Site
from lorica.methods.choice import Choice
from lorica.tensors.modules import call_after_loading
from lorica.tensors.shared import SharedTensors


class AbstractDelta(nn.Module, abc.ABC):
    """ΔW of one weight. `roles` says what each trained parameter is, so that no code has to guess
    it from the name."""

    roles: ClassVar[dict[str, str]]  # parameter -> "A", "B", "diagonal", "core", "bias"
    scale: float = 1.0
    shared_tensors: SharedTensors | None = None  # what all layers of the model read

    def __init__(self) -> None:
        super().__init__()
        call_after_loading(self, _loaded)

    @abc.abstractmethod
    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        """(..., in) -> (..., out): x ΔWᵀ."""

    @abc.abstractmethod
    def weight(self, base: BaseLike) -> Tensor | None:
        """ΔW (out, in), or None where none exists."""

    def factors(self) -> Factors | None:
        """An exact low-rank view, or None."""
        return None

    def pair(self) -> Pair | None:
        """The trained pair, or None."""
        return None

    def read_shared(self, name: str) -> Tensor:
        """A frozen tensor that all layers of the model read (`SharesTensors`), whole, in the dtype
        and on the device of this delta's parameters."""
        assert self.shared_tensors is not None, "`lorica.attach` hands them to every layer"
        return self.shared_tensors.read(name, next(self.parameters()))

    @abc.abstractmethod
    def restart(self, link: int, generator: torch.Generator) -> None:
        """Become a fresh adapter with ΔW = 0.

        Args:
            link: how many restarts this layer has had, this one included; 0: the start, of a delta
                that has no pair for an init to fill.
            generator: on the CPU; the same on every process.
        """

    def loaded(self) -> None:
        """Called on every process after the parameters were loaded, by `Adapters.load_state_dict`
        or by torch: discard or recompute here what is derived from them."""


def _loaded(delta: AbstractDelta, _keys: object) -> None:
    delta.loaded()


def zeros(site: Site, *shape: int) -> nn.Parameter:
    """A parameter of zeros, in the dtype and on the device of what trains at `site`; one for each
    expert of a stack."""
    return nn.Parameter(torch.zeros(site.shape(*shape), dtype=site.dtype, device=site.device))


def ones(site: Site, *shape: int, trains: bool = True) -> nn.Parameter:
    """A parameter of ones, as `zeros`; frozen where it doesn't train."""
    value = torch.ones(site.shape(*shape), dtype=site.dtype, device=site.device)
    return nn.Parameter(value, requires_grad=trains)


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """A type of PEFT's own that computes a delta, used instead of its LORA, which needs factors.

    Tensors that all layers share have one key in PEFT's file. A file whose configuration says that
    it leaves them out is read with those that the delta makes from its own arguments.
    """

    peft_type: str
    tensors: Mapping[str, str]  # trained parameter -> suffix of PEFT's key
    dropout: str  # PEFT's field for `lora_dropout`
    bias: str  # PEFT's value of `bias` for `lora_only`
    transposed: str | None = (
        None  # PEFT's switch for weights stored as (in, out); None: it has none
    )
    shared: Mapping[str, str] = field(default_factory=dict[str, str])  # shared tensor -> PEFT's key
    shared_in_file: str | None = None  # PEFT's field that is false where the file leaves them out
    fields: Mapping[str, object]  # the other fields of PEFT's configuration that set the formula


@dataclass(frozen=True, kw_only=True)
class DeltaChoice(Choice):
    """What the user names; `build` makes the module for one layer."""

    axis: ClassVar[str] = "deltas"
    wraps: ClassVar[bool] = True  # False: no adapter, the weights themselves train
    takes: ClassVar[frozenset[str]] = frozenset(  # fields of the recipe that have an effect here
        {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
    )

    def __init_subclass__(cls) -> None:
        if "pair" in cls.gives:
            cls.gives = cls.gives | {"sides"}  # a pair has both
        # See `AbstractDelta.restart`; a delta whose parameters are no matrices withdraws those.
        cls.gives = cls.gives | {"restarts", "matrices"} - cls.withdraws

    def most_r(self, in_features: int, out_features: int) -> int | None:
        """The largest `r` for a weight of this shape; None: r is no bound on the rank here."""
        return min(in_features, out_features)

    def build(self, site: Site) -> AbstractDelta:
        raise AssertionError(f"{self.name} builds no adapter")

    def peft_form(self) -> PeftForm | None:
        """PEFT's own type for this delta, or None."""
        return None

    def peft_serves(self, site: Site) -> bool:
        """Whether that type computes the same for a linear layer of these sizes."""
        return self.peft_form() is not None

    @classmethod
    def from_peft(cls, data: Mapping[str, object]) -> DeltaChoice | None:
        """The choice that computes what PEFT does under a configuration (a dict of its fields), or
        None."""
        return None
