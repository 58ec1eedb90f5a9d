"""Recipe: the user's whole choice, one field per axis, checked before anything expensive happens.

Example:
    >>> from lorica.recipe import Recipe
    >>> recipe = Recipe.parse("dora + olora + rslora", r=8)
    >>> recipe.text()
    'dora+olora+rslora'
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from lorica.methods.choice import AXES, Choice, source
from lorica.methods.combine.base import CombineChoice
from lorica.methods.deltas.base import DeltaChoice
from lorica.methods.groups.base import AbstractGroup
from lorica.methods.inits.base import AbstractInit
from lorica.methods.kernels.base import AbstractKernel
from lorica.methods.objectives.base import AbstractObjective
from lorica.methods.ranks.base import AbstractRank
from lorica.methods.rules.base import AbstractRule
from lorica.methods.scales.base import AbstractScale
from lorica.methods.schedules.base import AbstractSchedule
from lorica.recipe.compatibility import (
    DENSE,
    by_pattern,
    check_capabilities,
    check_effects,
    check_fields,
    check_values,
    listed,
    tokens,
)
from lorica.recipe.parse import choices_of
from lorica.recipe.registry import build, find, names
from lorica.text import clear_errors

T = TypeVar("T")
# Whose default counts first where several choices have one: what changes most decides.
_PRECEDENCE = (
    "schedules", "deltas", "inits", "ranks", "groups", "rules", "combine", "scales", "objectives",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a user decides about an update; frozen, comparable, saved beside every result.

    Args:
        r: rank of what trains. Default: the method's own, else 16.
        lora_alpha: numerator of the scale. Default: the method's own (`filled` says which and
        whose).
        lora_dropout: probability in [0, 1) that an input feature of the update is dropped.
        lora_dropout_on: `update` (the trained factors and what is carried, so that an anchored
            start stays exact in training mode) or `delta` (the trained factors alone, PEFT's form).
        target_modules: names (suffixes of module paths), one regular expression (full match), or
            `all-linear`: every linear layer but the head, what is too thin for the rank and, where
            a language model has towers of other modalities beside it, all that is outside of it.
        target_parameters: names (suffixes of parameter paths) of expert tensors, parameters that
            hold a weight for each expert (E, out, in). None: beside `all-linear` all of them, where
            the method serves them, else none.
        exclude_modules: the same forms as `target_modules`; what they match is left out.
        adapt_towers: `all-linear` takes in vision and audio towers, and what connects them to the
            language model.
        layers_to_transform: indices of the blocks to adapt; None means all.
        modules_to_save: names of modules that train in full and are saved with the adapter.
        trainable_token_indices: token ids whose rows train: a list means the input embeddings and
            the output embeddings (tied ones as one table), {name of a module: list} exactly these.
            None: no rows.
        bias: `none`, `lora_only` (biases of the adapted layers train) or `all`.
        train_rest: everything but the targets' weights trains too, in place (embeddings, norms,
            head, biases), as in pre-training.
        rank_pattern, alpha_pattern: {pattern: value} over `r` and `lora_alpha`; the first match
        counts.
        seed: of every random draw at attach, together with the layer's name.

    Raises:
        ValueError: an argument out of range, two methods on one axis, or a combination that the
            declarations of its parts rule out.
    """

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_dropout_on: str = "update"
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    adapt_towers: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    bias: str = "none"
    train_rest: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    seed: int = 0
    # Given as None, an axis of one choice takes its default; afterwards it is None only where the
    # method leaves nothing for it to act on.
    delta: DeltaChoice = field(default=None)  # pyright: ignore[reportAssignmentType]
    combine: CombineChoice | None = None
    init: AbstractInit | None = None
    scale: AbstractScale | None = None
    rank: AbstractRank | None = None
    schedules: tuple[AbstractSchedule, ...] = ()
    groups: tuple[AbstractGroup, ...] = ()
    rule: AbstractRule = field(default=None)  # pyright: ignore[reportAssignmentType]
    objectives: tuple[AbstractObjective, ...] = ()
    kernel: AbstractKernel | None = None
    filled: dict[str, tuple[float, str]] = field(  # field -> default taken, method it comes from
        default_factory=dict[str, tuple[float, str]], compare=False, repr=False
    )

    # -- construction

    @classmethod
    @clear_errors()
    def parse(
        cls,
        method: str | Mapping[str, Any] | Recipe = "lora",  # Any: arguments of each method's own
        **fields: Any,  # Any: this class' fields
    ) -> Recipe:
        """Read the text form (`"dora+olora+rslora"`, `"loraplus(loraplus_lr_ratio=8)"`).

        `method` may also be a mapping {word: {argument: value}} as a YAML file has it, or a recipe,
        whose fields `fields` then replace.
        """
        check_fields([f.name for f in dataclasses.fields(cls)], method, fields)
        if isinstance(method, Recipe):
            given = {k: v for k, v in method.to_dict().items() if k not in method.filled}
            return cls.from_dict({**given, **fields}) if fields else method
        return cls(**{**choices_of(method), **fields})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:  # Any: a JSON file's values
        """The inverse of `to_dict`; unknown keys are an error."""
        data = dict(data)
        known = {f.name for f in dataclasses.fields(cls)} - {"filled"} | {"method"}
        if extra := sorted(set(data) - known):
            raise ValueError(f"unknown recipe fields {extra}; known: {sorted(known)}")
        return cls.parse(data.pop("method", AXES["scales"].default), **data)

    def to_dict(self) -> dict[str, Any]:  # Any: as above
        """JSON-ready: the method's text and every plain field, defaults filled in."""
        own = [f.name for f in dataclasses.fields(self) if f.name not in {*_CHOICES, "filled"}]
        values: dict[str, Any] = {"method": self.text()}  # Any: a JSON file's values
        for name in own:
            value: object = getattr(self, name)
            if isinstance(value, tuple):
                values[name] = [*cast(tuple[str, ...], value)]
            elif isinstance(value, Mapping):
                items = cast(Mapping[str, object], value).items()
                values[name] = {k: [*v] if isinstance(v, tuple) else v for k, v in items}
            else:
                values[name] = value
        return values

    @clear_errors()
    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in (
            "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
            "modules_to_save",
        ):  # fmt: skip
            put(self, name, listed(name, getattr(self, name)))
        put(self, "modules_to_save", self.modules_to_save or ())
        for name in ("rank_pattern", "alpha_pattern"):
            put(self, name, by_pattern(name, getattr(self, name)))
        put(self, "trainable_token_indices", tokens(self.trainable_token_indices))
        defaulted: list[str] = []
        for axis, (name, default, several) in AXES.items():
            if getattr(self, name) is None and not several:
                put(self, name, build(self._implied(axis) or str(default), {}))
                defaulted.append(name)
        have = self.given()
        for name in defaulted:  # an axis without a choice is empty where it has nothing to act on
            if getattr(self, name).needs - have:
                put(self, name, None)
        check_effects(self)
        if "r" in self.takes:
            own = self._own(lambda c: c.only_r) or self._own(lambda c: c.default_r)
            self._fill("r", own or (16, "Lorica"))
        check_values(self)
        if isinstance(self.lora_alpha, float) and self.lora_alpha.is_integer():
            put(self, "lora_alpha", int(self.lora_alpha))  # one way to write it
        if "lora_alpha" in self.takes:
            self._fill("lora_alpha", self._own(lambda c: c.default_lora_alpha(self)))
        self.check()

    @property
    def takes(self) -> frozenset[str]:
        """Which of the numeric fields mean something to one of the choices."""
        takes = frozenset[str]().union(*(c.takes for c in self.choices))
        return takes if self.scale is not None and self.scale.uses_alpha else takes - {"lora_alpha"}

    @property
    def whole(self) -> bool:
        """Every weight of the model trains in place."""
        narrowed = self.exclude_modules or self.layers_to_transform is not None
        return not self.delta.wraps and self.target_modules == "all-linear" and not narrowed

    def no_experts(self) -> str | None:
        """Why expert tensors can't be adapted with this recipe; None: they can."""
        if self.train_rest:
            return "`train_rest` trains the experts themselves"
        single = [c.name for c in self.choices if not c.serves_experts()]
        if not single:
            return None
        return f"`{single[0]}` works on single matrices, not on stacks of experts' weights"

    def _implied(self, axis: str) -> str | None:
        """The method that this recipe's patterns ask for on this axis."""
        if axis != "ranks" or not (self.rank_pattern or self.alpha_pattern):
            return None
        classes = ((name, find(name)) for name in names(axis))
        return next(n for n, c in classes if issubclass(c, AbstractRank) and c.implied)

    def _fill(self, name: str, default: tuple[float, str] | None) -> None:
        if getattr(self, name) is None and default is not None:
            object.__setattr__(self, name, default[0])
            self.filled[name] = default

    def _own(self, value: Callable[[Choice], T | None]) -> tuple[T, str] | None:
        """The first choice, by precedence, that has a value of its own, and its name."""
        for axis in _PRECEDENCE:
            for choice in self.of(axis):
                if (own := value(choice)) is not None:
                    return own, choice.name
        return None

    @property
    def learning_rate(self) -> tuple[float, str] | None:
        """The method's default rate and the part it comes from: the rule's own, else a schedule's,
        else the lowest that one of the parts asks for. A part that another one, with a rate of its
        own, has to fill in is not asked."""
        filled = {a for c in self.choices if c.default_learning_rate for a in c.requires}
        for choices in (self.of("rules"), self.schedules, self.choices):
            asked = [c for c in choices if c.axis not in filled]
            rates = [(r, c.name) for c in asked if (r := c.default_learning_rate)]
            if rates:
                return min(rates, key=lambda pair: pair[0])
        return None

    # -- access

    def of(self, axis: str) -> tuple[Choice, ...]:
        """The choices on one axis, by the name of its package."""
        value: Choice | tuple[Choice, ...] | None = getattr(self, AXES[axis].field)
        if value is None:
            return ()
        return value if isinstance(value, tuple) else (value,)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(c for axis in AXES for c in self.of(axis))

    def text(self) -> str:
        """The shortest text that `parse` reads back as these choices."""
        named: list[str] = []
        implied: dict[str, set[str]] = {}
        for choice in self.choices:
            for axis, text in choice.preset.items():
                implied.setdefault(axis, set()).add(text)
        for axis, (_, default, several) in AXES.items():
            brought = implied.get(axis, set())
            for choice in self.of(axis):
                text = choice.text()
                if isinstance(choice, AbstractRank) and choice.implied and not brought:
                    continue  # follows from rank_pattern and alpha_pattern
                known = text in brought if several else brought == {text}
                if not known and (brought or text != default or choice.preset):
                    named.append(text)
        plain = str(AXES["scales"].default)
        needless = "" if "scales" in implied else plain
        return "+".join(t for t in named if t != needless) or plain

    def given(self, base: frozenset[str] = DENSE) -> frozenset[str]:
        """All capabilities at hand: what the choices and the base give, less what is withdrawn."""
        have = base.union(*(c.gives for c in self.choices))
        own = frozenset({"base_unchanged"} if self.train_rest else ())
        return have.difference(own, *(c.withdraws for c in self.choices))

    def check(self, base: frozenset[str] = DENSE) -> None:
        """Every `needs` is met by somebody's `gives`; else ValueError: the pair, why, a way out."""
        check_capabilities(self, base)


_CHOICES = {name for name, _, _ in AXES.values()}


def cite(recipe: Recipe | str) -> str:
    """BibTeX of exactly the methods that this recipe uses.

    Example:
        >>> "2402.09353" in cite("dora+olora")
        True
    """
    recipe = Recipe.parse(recipe)
    entries = [b for c in recipe.choices for b in source(type(c)).bibtex]
    return "\n\n".join(dict.fromkeys(entries))
