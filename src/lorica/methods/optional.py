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

from lorica.interfaces import (
    AdaptersLike,
    BaseLike,
    Batch,
    Factors,
    Pair,
    RecipeLike,
    Site,
    UpdateLike,
)

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


class SharesTensors(abc.ABC):
    """All layers of a model read the same frozen tensors. Used by `lorica.attach`: each delta reads
    them by `AbstractDelta.read_shared`. They are outside of the module tree, so that any sharding
    works and every process has them whole; the adapters' state holds them once."""

    @abc.abstractmethod
    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors by name, on the CPU in float32; made once for a model.

        Args:
            sites: of all the layers that will read them.
            generator: on the CPU, seeded by the recipe's seed; the same on every process.
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
        self, adapters: AdaptersLike, batches: Sequence[Batch]
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


# -- inits and ranks -------------------------------------------------------------------------------


Batches = Sequence[Batch]  # labels included


class StartsFromData(abc.ABC):
    """An init that looks at a few batches of the data before it fills pairs. Used by
    `lorica.attach(model, ..., data=batches)`; the command line hands it the first training batches.
    Nothing of it is needed to load an adapter: the start is part of the file.

    Such a class comes before `AbstractInit` among the bases of an init. It cannot start a layer
    anew during training, and so declares `withdraws = {"restarts"}`.
    """

    batches: int  # how many batches it reads; a field, so that a user can type it

    @abc.abstractmethod
    def observe(
        self, model: nn.Module, layers: Mapping[str, BaseLike], sites: Mapping[str, Site],
        data: Batches,
    ) -> Mapping[str, Any]:  # fmt: skip  # Any: whatever `fill_from` of this init reads
        """What the data say about each layer: {module path: what `fill_from` reads}.

        The model is in evaluation mode, its parameters require no gradient except those that this
        method asks for, and both are restored afterwards. On several processes the result must be
        the same on each (`lorica.tensors.dtensor_ops.sum_over_processes`).

        Args:
            layers: {module path: the weight that is about to be adapted, with its plain `module`},
                in model order.
            sites: {module path: its sizes, with the rank and scale that the recipe gives}.
            data: `batches` batches on the model's device.

        Raises:
            ValueError: a layer that no batch reaches; a model that gives no loss where one is
                needed.
        """

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        raise AssertionError("this start is made from data, once, before training")

    @abc.abstractmethod
    def fill_from(
        self, seen: Any, weight: Tensor, pair: Pair, generator: torch.Generator
    ) -> None:  # Any: this layer's entry of `observe`
        """Write the start into a pair, as `fill` does; see `AbstractInit`."""


class StartsFromUnquantised(abc.ABC):
    """An init that reads what a weight was before it was quantised. Used by `lorica.attach`, which
    takes these values from the checkpoint, or from `unquantised=`, one layer at a time. Nothing of
    it is needed to load an adapter: the start is part of the file.

    Such a class comes before `AbstractInit` among the bases of an init. It cannot start a layer
    anew during training, and so declares `withdraws = {"restarts"}`.
    """

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        raise AssertionError("this start reads the unquantised weight, once, before training")

    @abc.abstractmethod
    def fill_from(
        self, seen: Tensor, weight: Tensor, pair: Pair, generator: torch.Generator
    ) -> None:
        """Write the start into a pair, as `fill` does; see `AbstractInit`.

        Args:
            seen: the weight before it was quantised (out, in), of `weight`'s dtype and device.
        """


class RanksFromData(abc.ABC):
    """A choice of ranks that reads what a `StartsFromData` init observed. Used by `lorica.attach`;
    a file's ranks are used as they are."""

    @abc.abstractmethod
    def assign_from(
        self, seen: Mapping[str, Any], sites: Mapping[str, Site], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:  # Any: as above
        """(rank, alpha) of every layer, by module path, in model order; see `AbstractRank`.

        Args:
            sites: as the init saw them, with the ranks that `assign` gave before there was data.
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
    """A rule with a name that transformers uses for something else. Used where `--optim` is
    read."""

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
    "FitsHorizon", "FreezesLayers", "LinksDeltas", "OutlivesBase", "RanksFromData", "ReadsAsLora",
    "RefusesOptim", "Regrows", "Reweights", "SharesTensors", "StartsFromData",
    "StartsFromUnquantised", "TrainsBase",
]  # fmt: skip
