"""Deltas: how the update ΔW (out, in) of one weight is parametrised.

A file here holds a choice (frozen dataclass of hyperparameters) whose `build(site)` makes the
module that owns the trained parameters. The suite holds every file to: forward(x) equals x @
weight(base).T; factors reproduce the weight; dtype and device are kept; the state survives a round
trip; gradients pass gradcheck.

To add one: copy `lowrank.py`, change the equations, add the paper's claims as a test.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.interfaces import Factors, Pair, Site
from lorica.methods.choice import Choice


class AbstractDelta(nn.Module, abc.ABC):
    """ΔW of one weight. `roles` names every trained parameter's part, so nobody guesses it from its
    name."""

    roles: ClassVar[dict[str, str]]  # parameter -> "A", "B", "diagonal", "core", "bias"
    scale: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_tell)

    @abc.abstractmethod
    def forward(self, x: Tensor, base) -> Tensor:
        """(..., in) -> (..., out): x ΔWᵀ."""

    @abc.abstractmethod
    def weight(self, base) -> Tensor | None:
        """ΔW (out, in), or None where none exists."""

    def factors(self) -> Factors | None:
        """An exact low-rank view, or None."""
        return None

    def pair(self) -> Pair | None:
        """The trained pair, or None."""
        return None

    @abc.abstractmethod
    def restart(self, link: int, generator: torch.Generator) -> None:
        """Become a fresh adapter with ΔW = 0.

        Args:
            link: how many restarts this layer has had, this one included; 0: the start, of a delta
                that has no pair for an init to fill.
            generator: on the CPU; the same on every process.
        """

    def loaded(self) -> None:
        """Called once the parameters were loaded, by `Adapters.load_state_dict` or by torch's: the
        place to forget or form anew what is derived from them. On every process."""


def _tell(delta: AbstractDelta, _keys: Any) -> None:
    delta.loaded()


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """A type of PEFT's own that computes a delta, beside its LORA for whatever has factors."""

    peft_type: str
    tensors: Mapping[str, str]  # trained parameter -> suffix of PEFT's key
    dropout: str  # PEFT's field for `lora_dropout`
    bias: str  # PEFT's value of `bias` for `lora_only`
    fields: Mapping[str, Any]  # the other fields of PEFT's configuration that tell the formula


@dataclass(frozen=True, kw_only=True)
class DeltaChoice(Choice):
    """What the user names; `build` makes the module for one layer."""

    axis: ClassVar[str] = "deltas"
    wraps: ClassVar[bool] = True  # False: no adapter, the weights themselves train
    takes: ClassVar[frozenset[str]] = frozenset(  # fields of the recipe that mean something here
        {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
    )

    def __init_subclass__(cls) -> None:
        if "pair" in cls.gives:
            cls.gives = cls.gives | {"sides"}  # a pair has both

    def built_rank(self, site: Site, recipe: Any) -> int:
        """Rank that a layer is built with, and that s is made of; `site.r` is what shall remain.

        Raises:
            ValueError: an argument that does not fit this layer.
        """
        return site.r

    def build(self, site: Site) -> AbstractDelta:
        raise AssertionError(f"{self.name} builds no adapter")

    def link(self, deltas: Mapping[str, AbstractDelta]) -> None:
        """Called once by `attach`, before any layer starts: let the deltas of a model know each
        other.

        A delta keeps others in a tuple, which a module does not register: parameters stay one
        layer's own, and a copy of the model links its own deltas.

        Args:
            deltas: {module path: what `build` made there}, in model order.
        """

    def stand_in(
        self, adapters: Any, batches: Sequence[Mapping[str, Any]]
    ) -> AbstractContextManager[dict[str, float]]:
        """For a delta without a ΔW: within, each layer has one that nearly computes its update.

        Args:
            adapters: the handle.
            batches: keyword arguments of the model, to fit it to.

        Returns:
            A context of {module path: ‖y − y'‖ / ‖y‖}, y the update's output over the batches and
            y' the matrix's.
        """
        raise AssertionError(f"{self.name} has a ΔW")

    def peft_form(self) -> PeftForm | None:
        """PEFT's own type for this delta, or None."""
        return None

    def peft_serves(self, site: Site) -> bool:
        """Whether that type computes the same for a linear layer of these sizes."""
        return self.peft_form() is not None

    # A type of PEFT's that is LORA in other clothes: its files are read through `as_plain`.
    peft_synonym: ClassVar[str | None] = None

    @classmethod
    def as_plain(
        cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and tensors of the LORA file that computes what one of type `peft_synonym`
        does.

        Raises:
            ValueError: a value or a tensor that is not of that type.
        """
        raise AssertionError(f"{cls.__name__} has no `peft_synonym`")

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> DeltaChoice | None:
        """The choice that computes what PEFT does under a configuration (a dict of its fields), or
        None."""
        return None
