"""What a choice may offer beside its axis' contract, one abstract class each.

A method that offers one inherits from it; the one place that uses it asks with `isinstance`. So the
abstract classes hold only what every method of an axis answers.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.interfaces import AdaptersLike, Factors, RecipeLike, Site, UpdateLike

# -- deltas ----------------------------------------------------------------------------------------


class LinksDeltas(abc.ABC):
    """The deltas of a model know each other. Used by `lorica.attach`."""

    @abc.abstractmethod
    def link(self, deltas: Mapping[str, nn.Module]) -> None:
        """Called once, before any layer starts.

        A delta keeps others in a tuple, which a module does not register: parameters stay one
        layer's own, and a copy of the model links its own deltas.

        Args:
            deltas: {module path: what `build` made there}, in model order.
        """


class BuildsOtherRank(abc.ABC):
    """Layers are built with another rank than they end with. Used when targets are resolved."""

    @abc.abstractmethod
    def built_rank(self, site: Site, recipe: RecipeLike) -> int:
        """Rank that a layer is built with, and that s is made of; `site.r` is what shall remain.

        Raises:
            ValueError: an argument that does not fit this layer.
        """


class ApproximatesWeight(abc.ABC):
    """A delta without a ΔW, of which a matrix can be made that computes nearly the same. Used by
    merging and export."""

    @abc.abstractmethod
    def approximated(
        self,
        adapters: AdaptersLike,
        batches: Sequence[Mapping[str, Any]],  # Any: a model's inputs
    ) -> AbstractContextManager[dict[str, float]]:
        """Within, every layer has such a matrix.

        Args:
            batches: keyword arguments of the model, to fit it to.

        Returns:
            A context of {module path: ‖y − y'‖ / ‖y‖}, y the update's output over the batches and
            y' the matrix's.
        """


class ReadsAsLora(abc.ABC):
    """PEFT has a type of its own whose files hold what LORA's could. Used when such a file is
    read."""

    peft_synonym: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def as_plain(
        cls,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],  # Any: a JSON file's values
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and tensors of the LORA file that computes what one of type `peft_synonym`
        does.

        Raises:
            ValueError: a value or a tensor that is not of that type.
        """


# -- combine ---------------------------------------------------------------------------------------


class OutlivesBase(abc.ABC):
    """A combine that may stop reading its base. Used by the compressed export."""

    @abc.abstractmethod
    def remains(self, update: UpdateLike) -> tuple[Factors, Tensor | None] | None:
        """Factors and bias (out,) of a layer that does not read its base any more; None: it does,
        or its update has no factors."""


# -- schedules -------------------------------------------------------------------------------------


class BringsCurves(abc.ABC):
    """A schedule with learning-rate curves of its own. Used by the command line."""

    lr_scheduler_types: ClassVar[frozenset[str]]  # values of `--lr-scheduler-type`

    @abc.abstractmethod
    def with_curve(self, name: str, warmup_steps: int) -> BringsCurves:
        """The same schedule with one of these curves."""


class TrainsBase(abc.ABC):
    """A schedule under which the targets' own weights may train for a while. Used when the trained
    parameters are listed."""

    @property
    @abc.abstractmethod
    def trains_base(self) -> bool: ...


class FreezesLayers(abc.ABC):
    """A schedule under which some of what trains may be frozen for a while, without a gradient.
    Used by the Trainer, whose DDP has to look for unused parameters then."""

    @property
    @abc.abstractmethod
    def freezes_layers(self) -> bool: ...


class Regrows(abc.ABC):
    """A schedule that takes parts of a factor away which have to grow back. Used by the check that
    nothing freezes them."""

    regrows: ClassVar[frozenset[str]]  # roles


# -- rules -----------------------------------------------------------------------------------------


class ClipsItself(abc.ABC):
    """A rule that limits its own step: clipping gradients before it would spoil that. Used by the
    Trainer, which then does not clip."""

    clips: ClassVar[bool]


class RefusesOptim(abc.ABC):
    """A rule with a name that transformers uses for something else. Used where `--optim` is read."""

    trainer_refusals: ClassVar[Mapping[str, str]]  # value of `--optim` -> why it is not this rule


class FitsHorizon(abc.ABC):
    """A rule with intervals. Used when an optimizer is bound."""

    @abc.abstractmethod
    def horizon(self, optimizer: torch.optim.Optimizer, total_steps: int | None) -> str:
        """Fit what was left out to the number of steps; returns what will happen when, for people.

        Raises:
            ValueError: a given interval that never fires.
        """


# -- objectives ------------------------------------------------------------------------------------


class Reweights(abc.ABC):
    """An objective that gives the task's own loss another weight, and so comes before all that add
    to it, in whatever order they were typed. Used by `adapters.loss`."""

    reweights: ClassVar[bool]


__all__ = [
    "ApproximatesWeight", "BringsCurves", "BuildsOtherRank", "ClipsItself",
    "FitsHorizon", "FreezesLayers", "LinksDeltas", "OutlivesBase", "ReadsAsLora", "RefusesOptim",
    "Regrows", "Reweights", "TrainsBase",
]  # fmt: skip
