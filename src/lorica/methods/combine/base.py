"""Combines: how W and ΔW make the effective weight.

`effective` is the one definition that merge, export and the tests use. The suite checks every file
for this: forward equals x @ effective weight + bias, with and without a bias, and attaching keeps
the model's function.

To add one: copy `add.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lorica.interfaces import BaseLike, KernelLike, Site, UpdateLike
from lorica.methods.choice import Choice
from lorica.tensors.modules import call_after_loading


class AbstractCombine(nn.Module, abc.ABC):
    """Owns what trains in addition to ΔW (a magnitude, say)."""

    roles: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        call_after_loading(self, _loaded)

    @abc.abstractmethod
    def forward(self, x: Tensor, base: BaseLike, update: UpdateLike, kernel: KernelLike) -> Tensor:
        """(..., in) -> (..., out), bias included."""

    @abc.abstractmethod
    def effective(self, base: BaseLike, update: UpdateLike) -> tuple[Tensor, Tensor | None]:
        """Effective weight (out, in) and bias (out,), in at least float32."""

    def start(self, base: BaseLike, update: UpdateLike) -> None:  # noqa: B027
        """Called once, after the delta has its start and the frozen factors that offset it: set
        what depends on W + ΔW."""

    def loaded(self) -> None:  # noqa: B027
        """Called on every process after the parameters were loaded, by `Adapters.load_state_dict`
        or by torch: discard here what is derived from them."""


def _loaded(combine: AbstractCombine, _keys: object) -> None:
    combine.loaded()


@dataclass(frozen=True, kw_only=True)
class CombineChoice(Choice, abc.ABC):
    """What the user names; `build` makes the module for one layer."""

    axis: ClassVar[str] = "combine"
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    # PEFT's own flags with which it computes this combine; None: it can't.
    peft_flags: ClassVar[Mapping[str, object] | None] = None
    peft_tensors: ClassVar[Mapping[str, str]] = {}  # parameter -> suffix of PEFT's key

    @abc.abstractmethod
    def build(self, site: Site) -> AbstractCombine: ...
