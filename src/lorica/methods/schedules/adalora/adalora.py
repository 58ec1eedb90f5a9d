"""AdaLoRA: one shrinking budget of ranks for all layers, spent where it matters most.

    b(t) = b₀ up to t_i;  ⌊b_T + (b₀ − b_T)(1 − (t − t_i)/(T_f − t_i))³⌋ up to T_f = T − t_f;  b_T

t counts steps from 0, b₀ = Σ r₀, b_T = Σ r over the layers. After each step Ī and Ū of every
element of A, E, B are updated (`triplets`). At t > t_i divisible by Δ_T, and at T_f, the b(t)
triplets with the highest scores stay and λ of all others is set to 0. Until T_f those train again
from there, and may come back; from T_f on the mask is part of the layer.

As in the authors' code and PEFT, I is made of the weight after the step (the paper: before it), and
b reaches b₀ at t_i and b_T at T_f (the paper's formula misses both). Unlike there, exactly b(t)
triplets stay where scores tie; a budget not yet below b₀ is no event; t_f = 0 ends at the last step
instead of never; and from T_f on a masked λ has no gradient that counts in clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorica.interfaces import AdaptersLike, LayerLike, TrainingLike
from lorica.methods.fields import number, one_of, whole, without_effect
from lorica.methods.objectives.orthogonality import Orthogonality
from lorica.methods.schedules.adalora import triplets
from lorica.methods.schedules.adalora.budget import Budgeted
from lorica.methods.schedules.base import State
from lorica.tensors.dtensor_ops import copy_

_LEAST = {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}


@dataclass(frozen=True, kw_only=True)
class AdaLora(Budgeted):
    """Ranks move to the layers that need them: more than r to begin with, r a layer on average.

    `r` is the average that remains; a layer may end with any number up to `init_r`, or with none.
    The penalty keeps triplets apart, and counts in their sensitivity. No time or memory is saved in
    training; what is written afterwards has the ranks that remain.

    Cost: LoRA's of 1.5 r, and an average of every trained element's sensitivity.
    When: the budget is small and layers differ in need; not for short runs.

    Args:
        init_r: rank of every layer at first; default 1.5·r, the paper's. α is tied to it (2·init_r)
            for the whole run.
        target_r: another name of `r`; give one of the two.
        tinit: steps at full budget. Default: an eighth of the run, as in the paper.
        tfinal: steps with the pattern frozen, at the end. Default: half of the run, as in the paper
            (there 44 to 58 %).
        deltaT: steps between maskings. Default: 200 maskings, about the paper's number.
        beta1, beta2: β₁, β₂ in (0, 1); default 0.85, the paper's.
        orth_reg_weight: γ of the objective `orthogonality`; default 0.1, 0 for none.
        importance: `sensitivity` (default: Ī·Ū, two averages an element), `instant` (I
            of the one step) or `magnitude` (|λ|): the paper's ablations.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("adalora(init_r=12)+rslora", r=8)
        >>> recipe.delta.init_r, recipe.text()
        (12, 'rslora+adalora(init_r=12)')

    Reference:
        @inproceedings{zhang2023adalora,
          title = {Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning},
          author = {Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis,
                    Nikos and He, Pengcheng and Cheng, Yu and Chen, Weizhu and Zhao, Tuo},
          booktitle = {ICLR}, year = {2023}, eprint = {2303.10512}
        }
    """

    init_r: int | None = None
    target_r: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    importance: str = "sensitivity"

    preset: ClassVar[Mapping[str, str]] = {
        "deltas": "svd(ratio=1.5)", "inits": "init.svd", "objectives": "orthogonality",
    }  # fmt: skip
    requires: ClassVar[frozenset[str]] = frozenset({"deltas"})
    needs: ClassVar[frozenset[str]] = frozenset({"pair", "diagonal"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    edits: ClassVar[frozenset[str]] = frozenset({"rank"})
    default_learning_rate: ClassVar[float | None] = 1e-3  # within the paper's 5e-4 to 2.2e-3

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            say = f"a whole number of at least {least}; left out, it is the method's own"
            whole(self, name, least=least, optional=True, say=say)
        one_of(self, "importance", "sensitivity", "instant", "magnitude")
        for name in ("beta1", "beta2"):
            number(self, name, above=0, below=1, say="a number in (0, 1), e.g. 0.85")
            if self.importance != "sensitivity":
                why = f"`importance={self.importance!r}` keeps no averages"
                without_effect(self, name, 0.85, why)
        number(self, "orth_reg_weight", least=0, say="a number, at least 0, e.g. 0.1; 0: none")
        weight = self.orth_reg_weight
        own = dict(type(self).preset)
        if self.init_r is not None:
            own["deltas"] = f"svd(init_r={self.init_r})"
        own["objectives"] = Orthogonality(weight=weight).text() if weight else ""
        object.__setattr__(self, "preset", {axis: text for axis, text in own.items() if text})
        for name in ("default_r", "only_r"):
            object.__setattr__(self, name, self.target_r)

    def init(self, adapters: AdaptersLike) -> State:
        first, last = _ranks(adapters)
        if first <= last:
            raise ValueError(
                f"`{self.text()}` begins with {first} ranks, and {last} are to remain: there is"
                f" nothing to take away; give a smaller `r` (here {adapters.recipe.r}), or a larger"
                " `init_r`"
            )
        none: dict[str, LayerLike] = {}
        kept = adapters.layers if self.importance == "sensitivity" else none
        return {"budget": first, "mean": triplets.averages(kept), "spread": triplets.averages(kept)}

    def restore(self, state: State, training: TrainingLike) -> None:
        for kept in (state["mean"], state["spread"]):
            for name, own in kept.items():
                device = training.adapters.layers[name].store.device
                own.update({side: value.to(device) for side, value in own.items()})

    def restarted(self, state: State, layers: Sequence[str]) -> None:
        for kept in (state["mean"], state["spread"]):
            triplets.forget(kept, layers)

    def after_step(self, state: State, training: TrainingLike) -> None:
        t, layers, total = training.step, training.adapters.layers, training.total_steps
        assert total is not None  # `fit` refuses a run without
        end = self.end(total)
        if t > end:  # the optimizer has moved what is masked
            for layer in layers.values():
                triplets.mask_(layer, triplets.final_mask(layer))
            return
        if t < end and self.importance == "sensitivity":
            # A layer started anew in this very step has the gradients of vectors that are gone.
            known = {n: layer for n, layer in layers.items() if n not in training.fresh}
            triplets.learn(state["mean"], state["spread"], known, self.beta1, self.beta2)
        if not self.due(t, total):
            return
        first, last = _ranks(training.adapters)
        if (budget := self.budget(t, total, first, last)) == first:
            return
        state["budget"] = budget
        keep = triplets.best(self._scores(state, layers), budget)
        for layer, own in zip(layers.values(), keep, strict=True):
            triplets.mask_(layer, own)
            if t == end:
                mask = triplets.final_mask(layer)
                copy_(mask, own.to(mask.device, mask.dtype).view(-1, 1))

    def _scores(self, state: State, layers: Mapping[str, LayerLike]) -> list[Tensor]:
        if self.importance == "magnitude":
            return triplets.magnitudes(layers.values())
        if self.importance == "instant":
            return triplets.instant(layers.values())
        return triplets.smoothed(state["mean"], state["spread"])


def _ranks(adapters: AdaptersLike) -> tuple[int, int]:
    """b₀ and b_T."""
    given = adapters.recipe.rank.assign([*adapters.layers], adapters.recipe)
    return sum(layer.site.r for _, layer in adapters), sum(r for r, _ in given.values())
