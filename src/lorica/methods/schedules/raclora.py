"""RAC-LoRA: a chain in which one factor of each link is a frozen random draw.

    side B:  W_{t+1} = W_t + s·B̂·A_t,  A_t (r, in) drawn,   B̂ (out, r) trained from 0
    side A:  W_{t+1} = W_t + s·B_t·Â,  B_t (out, r) drawn,  Â (r, in) trained from 0

Linear in what trains, so each link inherits the smoothness of the loss. A step of gradient descent
moves W by −η·s²·∇·AᵀA (or −η·s²·BBᵀ·∇): a randomly sketched gradient. Where the sketch is the
projector H, E[H] = (r/n)·I, n the width of the drawn side: descent reaches what full training
reaches, n/r times as slowly. That is proved for gradient descent, not for AdamW.

Entries of a Gaussian sketch have variance 1/n, so that AAᵀ (or BᵀB) is I on average; orthonormal
ones make AᵀA (or BBᵀ) the projector H itself, for which the theory otherwise asks a pseudo-inverse
((AAᵀ)⁻¹ in B's gradient: the rule `riemannian`). The published script trains both factors, scales
by α, calls the factors the other way round and keeps Adam's moments over a new sketch; here as in
the paper, with a fresh optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair
from lorica.methods.fields import one_of
from lorica.methods.groups.base import AbstractGroup
from lorica.methods.inits.base import AbstractInit
from lorica.methods.schedules._restart import Chain
from lorica.tensors.dtensor_ops import draw
from lorica.tensors.linalg import qr


@dataclass(frozen=True, kw_only=True)
class RacloraInit(AbstractInit):
    """The sketch in the factor that is frozen, zero in the one that trains."""

    side: str = "B"
    sketch: str = "gaussian"

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def __post_init__(self) -> None:
        one_of(self, "side", "A", "B")
        one_of(self, "sketch", "gaussian", "orthonormal")

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        tall, trained = (pair.A.T, pair.B) if self.side == "B" else (pair.B, pair.A)  # (n, r)
        drawn = draw(tall.shape, generator).double()
        tall.copy_(qr(drawn)[0] if self.sketch == "orthonormal" else drawn * tall.shape[0] ** -0.5)
        trained.zero_()


@dataclass(frozen=True, kw_only=True)
class RacloraGroup(AbstractGroup):
    """One side trains."""

    side: str = "B"

    needs: ClassVar[frozenset[str]] = frozenset({"pair"})

    def __post_init__(self) -> None:
        one_of(self, "side", "A", "B")
        object.__setattr__(self, "freezes", frozenset("AB") - {self.side})


@dataclass(frozen=True, kw_only=True)
class Raclora(Chain):
    """Chained half-updates: in each link one factor is a frozen random draw, and the other trains.

    Half of LoRA's trained parameters. In the paper's comparisons it stays a little behind LoRA;
    what it has is a proof of convergence. A start that depends on the data would break the proof,
    so no other start than the sketch is allowed.

    Cost: half of LoRA's trained parameters and state.
    When: its proof of convergence matters; it converges n/r times slower than full steps.

    Args:
        every: steps of a link. Default: fitted, 9 restarts a run, the paper's 10 links on GLUE.
        side: the factor that *trains*: `B` (default: out·r parameters a layer, and only x Aᵀ need
            be kept for backward, as in `lorafa`) or `A` (r·in).
        sketch: law of the other one: `gaussian` (default, the paper's) or `orthonormal`.
        accumulate: where finished links go: `factors` (default: frozen beside the base, which keeps
            its bytes; saved as one plain LoRA whose rank grows) or `base`.
        lr_scheduler_type: `continued` (default: the run's scheduler covers all links), or the rate
            within each link, in its place: `cosine`, `linear` or `constant`.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("raclora(side='A', sketch='orthonormal')")
        >>> recipe.init.sketch, sorted(recipe.groups[0].freezes)
        ('orthonormal', ['B'])

    Reference:
        @misc{malinovsky2024randomized,
          title = {Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework
                   for Low-Rank Adaptation},
          author = {Malinovsky, Grigory and Michieli, Umberto and Hammoud, Hasan Abed Al Kader and
                    Ceritli, Taha and Elesedy, Hayder and Ozay, Mete and Richtárik, Peter},
          year = {2024}, eprint = {2410.08305}
        }
    """

    side: str = "B"
    sketch: str = "gaussian"

    links: ClassVar[int] = 9
    preset: ClassVar[Mapping[str, str]] = {"inits": "init.raclora", "groups": "groups.raclora"}
    requires: ClassVar[frozenset[str]] = frozenset({"inits", "groups"})

    def __post_init__(self) -> None:
        super().__post_init__()
        init = RacloraInit(side=self.side, sketch=self.sketch)
        preset = {"inits": init.text(), "groups": RacloraGroup(side=self.side).text()}
        object.__setattr__(self, "preset", preset)
