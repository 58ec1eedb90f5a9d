"""PC-LoRA: the frozen weights fade out during training, until low-rank layers alone are left.

    y = λ(t)·(x Wᵀ + b) + s·(x Aᵀ) Bᵀ + c,    λ(0) = 1, λ(t) = 0 for t ≥ q = fade·total_steps
    L = α·L_task + (1 − α)·mean over blocks of MSE(feature, the original model's feature)

    linear 1 − t/q     cosine cos(πt/2q)     one_minus_sine 1 − sin(πt/2q)     identity 1

with t the optimizer step that the forward belongs to, not the micro-batch. The authors' code is not
public; re-implementations use `linear`, `cosine` (there called sine), q of 0.8 of the steps and α
of 0.1 or 0.2. λ multiplies W and b together; c stays, so that the layers keep a bias.

How much a gradual fade gains over starting at λ = 0 from the truncated singular value decomposition
of W depends on the model: compare with `fade+pissa` at λ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch

from lorica.interfaces import AdaptersLike, LayerLike, RecipeLike, TrainingLike
from lorica.methods.fields import number, one_of
from lorica.methods.objectives.distillation import Distillation
from lorica.methods.schedules.base import AbstractSchedule, State

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Fading(Protocol):
    """A combine with a factor λ on what is frozen."""

    @property
    def number(self) -> float:
        """λ, rounded to the dtype it is held in."""
        ...

    def fade_(self, number: float) -> None:
        """λ ← number."""
        ...

    def loaded(self) -> None:
        """λ may have been written by other means."""
        ...


def fading(layer: LayerLike) -> Fading:
    """The layer's combine; the method `requires` one that fades."""
    assert isinstance(layer.combine, Fading)
    return layer.combine


def curve(shape: str, part: float) -> float:
    """λ when `part` of the fade, in [0, 1], is over; 0 at the end of it, exactly."""
    if part >= 1:
        return 0.0
    angle = math.pi / 2 * part
    values = {"linear": 1 - part, "cosine": math.cos(angle), "identity": 1.0}
    return {**values, "one_minus_sine": 1 - math.sin(angle)}[shape]


@dataclass(frozen=True, kw_only=True)
class PcLora(AbstractSchedule):
    """Compression by fading: the frozen weights go, and factors trained beside them take over.

    The rank decides how small the layers get; once λ is 0 a layer costs r·(in + out) in place of
    in·out. Over a start from the singular values of W (`pclora+pissa`) its residual fades. Merging
    leaves dense weights of rank r. No other schedule may write to the base meanwhile.

    Cost: a forward of the original model a step, unless `alpha=1`; afterwards r·(in + out) a
    layer is all that is left.
    When: the model itself has to become smaller; compare with a truncated SVD.

    Args:
        fade: part of the run in (0, 1] after which λ is 0; after that the factors train alone.
            Default 0.6 (the paper's is not known; a re-implementation takes 0.8).
        alpha: of the task's loss, in [0, 1]; the rest, 1 − alpha, is distillation from the original
            model. Default 0.2 (a re-implementation's). 1 leaves distillation, and the original
            model's forward, out.
        shape: of λ's way down: `linear` (default), `cosine`, `one_minus_sine`, or `identity`: 1 all
            along, then 0 at once.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("pclora(alpha=0.1)", r=8)
        >>> recipe.combine.name, recipe.objectives[0].text()
        ('fade', 'distillation(alpha=0.1)')

    Reference:
        @inproceedings{hwang2024pclora,
          title = {PC-LoRA: Low-Rank Adaptation for Progressive Model Compression with Knowledge
                   Distillation},
          author = {Hwang, Injoon and Park, Haewon and Lee, Youngwan and Yang, Jooyoung and
                    Maeng, SunJae}, booktitle = {CVPR Workshop on Transformers for Vision},
          year = {2024}, eprint = {2406.09117}
        }
    """

    fade: float = 0.6
    alpha: float = 0.2
    shape: str = "linear"

    preset: ClassVar[Mapping[str, str]] = {"combine": "fade", "objectives": "distillation"}
    requires: ClassVar[frozenset[str]] = frozenset({"combine"})
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"base"})  # an update may not need W at the end
    edits: ClassVar[frozenset[str]] = frozenset({"base"})

    def __post_init__(self) -> None:
        number(self, "fade", above=0, most=1, say="a number above 0 and at most 1, e.g. 0.6")
        number(self, "alpha", least=0, most=1, say="a number at least 0 and at most 1, e.g. 0.2")
        one_of(self, "shape", "linear", "cosine", "one_minus_sine", "identity")
        own = dict(type(self).preset)
        if self.alpha == 1:
            del own["objectives"]
        else:
            own["objectives"] = Distillation(alpha=self.alpha).text()
        object.__setattr__(self, "preset", own)

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return recipe.scale.alpha_for(1.0, recipe.r)  # s = 1

    # -- when

    def fit(self, total_steps: int | None) -> Self:
        if total_steps is None:
            raise ValueError(
                f"`{self.text()}` fades over a part of the run; give `total_steps` to"
                " `lorica.optimizer`"
            )
        if self.end(total_steps) < 1:
            raise ValueError(
                f"`{self.text()}`: {self.fade:g} of {total_steps} steps is not one step, and what"
                " is left at λ = 0 would be zero; train longer, or give a larger `fade`"
            )
        return self

    def end(self, total_steps: int) -> int:
        """q, the first step whose forward has λ = 0."""
        return round(self.fade * total_steps)

    def final_from(self, total_steps: int | None) -> int:
        assert total_steps is not None
        return self.end(total_steps)  # until then W is part of the model that is measured

    def at(self, step: int, total_steps: int) -> float:
        """λ(t) of the forward that belongs to a step."""
        return curve(self.shape, step / self.end(total_steps))

    def plan(self, total_steps: int | None) -> str:
        assert total_steps is not None
        q = self.end(total_steps)
        return f"λ {self.shape} from 1 to 0 at step {q}, {total_steps - q} steps without W"

    # -- what

    def init(self, adapters: AdaptersLike) -> State:
        default = type(self).alpha
        for other in adapters.recipe.objectives:
            mine = self.preset.get("objectives")
            if isinstance(other, Distillation) and self.alpha != default and other.text() != mine:
                raise ValueError(
                    f"`{self.text()}` and `{other.text()}` give the task's loss two weights; give"
                    " it once, in one of the two"
                )
        return {}

    def restore(self, state: State, training: TrainingLike) -> None:
        for layer in training.adapters.layers.values():
            fading(layer).loaded()  # λ may have been loaded

    def before_step(self, state: State, training: TrainingLike) -> None:
        layer = next(iter(training.adapters.layers.values()))
        own, held = self._at(training.step, training), fading(layer).number
        if abs(own - held) > torch.finfo(layer.combine.get_parameter("share").dtype).eps:
            raise ValueError(
                f"`{self.name}`: at step {training.step} of {training.total_steps} λ is {own:.4g},"
                f" and {layer.site.name!r} holds {held:.4g}: adapters and optimizer are of"
                " different steps. Load both of one checkpoint, or attach anew"
            )

    def after_step(self, state: State, training: TrainingLike) -> None:
        now, then = (self._at(training.step + i, training) for i in (0, 1))
        if now != then:
            for layer in training.adapters.layers.values():
                fading(layer).fade_(then)

    def _at(self, step: int, training: TrainingLike) -> float:
        assert training.total_steps is not None  # `fit` refuses a run without
        return self.at(step, training.total_steps)
