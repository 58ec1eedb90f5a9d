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

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorica.rooms import CAPABILITIES, ROOMS, Choice, build, plain, room_of, source, unknown

_PART = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", re.S)
# Whose default counts first where several choices have one: what changes most decides.
_PRECEDENCE = (
    "schedules", "deltas", "inits", "ranks", "groups", "optim", "combine", "scales", "objectives",
)  # fmt: skip
_DENSE = frozenset(
    {"pristine", "writable_base"}
)  # what a dense base gives; attach asks the real one


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
            `all-linear`: every linear layer but the head.
        exclude_modules: the same forms; what they match is left out.
        layers_to_transform: indices of the blocks to adapt; None means all.
        modules_to_save: names of modules that train in full and are saved with the adapter.
        bias: `none`, `lora_only` (biases of the adapted layers train) or `all`.
        rank_pattern, alpha_pattern: {pattern: value} over `r` and `lora_alpha`; the first match
        counts.
        seed: of every random draw at attach, together with the layer's name.

    Raises:
        ValueError: an argument out of range, two words on one axis, or a combination that the
            declarations of its parts rule out.
    """

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_dropout_on: str = "update"
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    delta: Choice | None = None
    combine: Choice | None = None
    init: Choice | None = None
    scale: Choice | None = None
    rank: Choice | None = None
    schedules: tuple[Choice, ...] = ()
    groups: tuple[Choice, ...] = ()
    rule: Choice | None = None
    objectives: tuple[Choice, ...] = ()
    kernel: Choice | None = None
    filled: dict[str, tuple[Any, str]] = field(default_factory=dict, compare=False, repr=False)

    # -- construction --------------------------------------------------------------------------

    @classmethod
    def parse(cls, method: str | Mapping[str, Any] | Recipe = "lora", **fields: Any) -> Recipe:
        """Read the text form (`"dora+olora+rslora"`, `"loraplus(loraplus_lr_ratio=8)"`).

        `method` may also be a mapping {word: {argument: value}} as a YAML file has it, or a recipe,
        whose fields `fields` then replace.
        """
        if isinstance(method, Recipe):
            return cls.from_dict({**method.to_dict(), **fields}) if fields else method
        choices = _choices(_words(method))
        for name in [f for f in ("delta", "combine", "init", "scale", "rank", "rule", "kernel")]:
            if name in fields and isinstance(fields[name], str):
                raise ValueError(
                    f"`{name}={fields[name]!r}` is a word; put it into the method's text: "
                    f"`{method}+{fields[name]}`"
                )
        return cls(**{**choices, **fields})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; unknown keys are an error."""
        data = dict(data)
        known = {f.name for f in dataclasses.fields(cls)} - {"filled"} | {"method"}
        if extra := sorted(set(data) - known):
            raise ValueError(f"unknown recipe fields {extra}; known: {sorted(known)}")
        return cls.parse(data.pop("method", "lora"), **data)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the method's text and every plain field, defaults filled in."""
        plain_fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in _CHOICES
        }
        plain_fields.pop("filled")
        for name, value in plain_fields.items():
            if isinstance(value, tuple):
                plain_fields[name] = list(value)
            elif isinstance(value, Mapping):
                plain_fields[name] = dict(value)
        return {"method": self.text(), **plain_fields}

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (list, set)):
                put(self, name, tuple(sorted(value) if isinstance(value, set) else value))
        put(self, "modules_to_save", tuple(self.modules_to_save or ()))
        defaulted = []
        for room, (name, word, several) in ROOMS.items():
            if getattr(self, name) is None and not several:
                patterns = self.rank_pattern or self.alpha_pattern
                word = "pattern" if room == "ranks" and patterns else word
                put(self, name, build(str(word), {}))
                defaulted.append(name)
        have = self.given()
        for name in defaulted:  # an axis nobody spoke of is empty where it has nothing to act on
            if getattr(self, name).needs - have:
                put(self, name, None)
        self._check_takes()
        if "r" in self.takes:
            self._fill("r", self._own(lambda c: c.default_r) or (16, "Lorica"))
        self._check_values()
        if "lora_alpha" in self.takes:
            self._fill("lora_alpha", self._own(lambda c: c.default_lora_alpha(self)))
        self.check()

    @property
    def takes(self) -> frozenset[str]:
        """Which of the numeric fields mean something to this delta and scale."""
        takes = self.delta.takes  # type: ignore[union-attr]
        return takes if self.scale is not None and self.scale.uses_alpha else takes - {"lora_alpha"}  # type: ignore[attr-defined]

    def _check_takes(self) -> None:
        for f in dataclasses.fields(self):
            if f.name not in _NUMERIC or f.name in self.takes:
                continue
            value = getattr(self, f.name)
            if value is not None and value != f.default and value != {}:
                who = self.delta if f.name not in self.delta.takes else self.scale  # type: ignore[union-attr]
                raise ValueError(
                    f"`{f.name}={value!r}` has no effect with `{who.word}`; leave it out"  # type: ignore[union-attr]
                )

    def _fill(self, name: str, default: tuple[Any, str] | None) -> None:
        if getattr(self, name) is None and default is not None:
            object.__setattr__(self, name, default[0])
            self.filled[name] = default

    def _own(self, value: Callable[[Choice], Any]) -> tuple[Any, str] | None:
        """The first choice, by precedence, that has a value of its own, and its word."""
        for room in _PRECEDENCE:
            for choice in self.of(room):
                if (own := value(choice)) is not None:
                    return own, choice.word
        return None

    @property
    def learning_rate(self) -> tuple[float, str] | None:
        """The method's default rate and the word it comes from."""
        return self._own(lambda choice: choice.default_learning_rate)

    # -- access --------------------------------------------------------------------------------

    def of(self, room: str) -> tuple[Choice, ...]:
        value = getattr(self, ROOMS[room][0])
        if value is None:
            return ()
        return value if isinstance(value, tuple) else (value,)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(c for room in ROOMS for c in self.of(room))

    def text(self) -> str:
        """The shortest text that `parse` reads back as these choices."""
        named, implied = [], {}
        for choice in self.choices:
            for room, text in choice.preset.items():
                implied[room] = text
        for room, (_, default, _several) in ROOMS.items():
            for choice in self.of(room):
                if room == "ranks" and choice.word == "pattern":
                    continue  # follows from rank_pattern and alpha_pattern
                if choice.text() != implied.get(room, default) or choice.preset:
                    named.append(choice.text())
        lead = [t for t in named if t != "lora"]
        return "+".join(lead) or "lora"

    # -- checks --------------------------------------------------------------------------------

    def _check_values(self) -> None:
        whole = isinstance(self.r, int) and not isinstance(self.r, bool) and self.r >= 1
        if "r" in self.takes and not whole:
            raise ValueError(
                f"`r={self.r!r}`: the rank is a whole number of at least 1, e.g. `r=16`"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"`lora_dropout={self.lora_dropout!r}` is a probability in [0, 1), e.g. 0.05"
            )
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"`lora_alpha={self.lora_alpha!r}` must be positive; left out, "
                             "the method's own is taken")  # fmt: skip
        if (self.rank_pattern or self.alpha_pattern) and not self.rank.reads_patterns:  # type: ignore[union-attr]
            raise ValueError(
                f"`rank_pattern` and `alpha_pattern` have no effect with `{self.rank.word}`; "  # type: ignore[union-attr]
                "leave it out of the method, or leave the patterns out"
            )
        for name, allowed in (
            ("bias", ("none", "all", "lora_only")),
            ("lora_dropout_on", ("update", "delta")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}`; allowed: {', '.join(allowed)}")
        for pattern, value in self.rank_pattern.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`rank_pattern[{pattern!r}]={value!r}` is a whole number >= 1")
        for pattern, value in self.alpha_pattern.items():
            if not value > 0:
                raise ValueError(f"`alpha_pattern[{pattern!r}]={value!r}` must be positive")

    def given(self, base: frozenset[str] = _DENSE) -> frozenset[str]:
        """All capabilities at hand: what the choices and the base give, less what a choice
        withdraws."""
        have = base.union(*(c.gives for c in self.choices))
        return have.difference(*(c.withdraws for c in self.choices))

    def check(self, base: frozenset[str] = _DENSE) -> None:
        """Every `needs` is met by somebody's `gives`; else ValueError naming both, why, and a way
        out."""
        have = self.given(base)
        for choice in self.choices:
            for need in sorted(choice.needs - have):
                blame = [c.word for c in self.choices if need in c.withdraws]
                blame = blame or [self.delta.word if self.delta else "the base"]
                raise ValueError(
                    f"`{choice.word}` cannot stand beside `{blame[0]}`: `{choice.word}` needs"
                    f" `{need}` ({CAPABILITIES[need]}), which `{blame[0]}` does not leave. Leave"
                    f" one of the two out of `{self.text()}`"
                )
        touched: dict[str, str] = {}
        for schedule in self.schedules:
            for thing in schedule.edits:  # type: ignore[attr-defined]
                if thing in touched:
                    raise ValueError(
                        f"`{touched[thing]}` and `{schedule.word}` both edit the {thing}; name one"
                        " of them"
                    )
                touched[thing] = schedule.word


_NUMERIC = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
_CHOICES = {name for name, _, _ in ROOMS.values()}


def _words(method: str | Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(method, Mapping):
        return [(str(word), dict(arguments or {})) for word, arguments in method.items()]
    if not method.strip():
        raise ValueError("the method is empty; a method is words joined by `+`, e.g. `dora+olora`")
    parts, depth, start = [], 0, 0
    for i, c in enumerate(method + "+"):
        depth += (c == "(") - (c == ")")
        if c == "+" and depth <= 0:
            parts.append(method[start:i])
            start = i + 1
    if depth:
        raise ValueError(f"`{method}`: a bracket is open or missing; write e.g. `pissa(niter=16)`")
    return [_word(part, method) for part in parts]


def _word(part: str, method: str) -> tuple[str, dict[str, Any]]:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(
            f"`{part}` in `{method}` is no word; write e.g. `dora` or `pissa(niter=16)`"
        )
    word, arguments = match.groups()
    if not (arguments or "").strip():
        return word, {}
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError("arguments have names")
        return word, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"`{part.strip()}`: the arguments are not of the form name=value ({error}); "
            "write e.g. `pissa(niter=16)`"
        ) from None


def _choices(given: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Fields of Recipe from words: the user's first, then the presets' where nothing was said."""
    by_room: dict[str, list[Choice]] = {}
    for word, arguments in given:
        room = room_of(plain(word))
        if room is None:
            raise ValueError(unknown(plain(word)))
        choice = build(plain(word), arguments)
        others = by_room.setdefault(room, [])
        if any(o.word == choice.word for o in others) or (others and not ROOMS[room][2]):
            raise ValueError(
                f"`{others[0].word}` and `{choice.word}` both choose the axis `{ROOMS[room][0]}`; "
                "name one of them"
            )
        others.append(choice)
    named = {room: list(choices) for room, choices in by_room.items()}
    whose: dict[str, str] = {}
    for choice in [c for choices in named.values() for c in choices]:
        for room, text in choice.preset.items():
            word, arguments = _words(text)[0]
            wanted = build(plain(word), arguments, room)
            if ROOMS[room][2]:
                if all(o.word != wanted.word for o in by_room.setdefault(room, [])):
                    by_room[room].append(wanted)
                continue
            held = named.get(room) or by_room.get(room)
            if held and held[0] != wanted and (room in choice.requires or room not in named):
                by = held[0].word if room in named else whose[room]
                raise ValueError(
                    f"`{choice.word}` fills the axis `{ROOMS[room][0]}` with `{text}`, and `{by}`"
                    f" fills it with `{held[0].text()}`; leave one of the two out"
                )
            if not held:
                by_room[room], whose[room] = [wanted], choice.word
    return {
        ROOMS[room][0]: tuple(choices) if ROOMS[room][2] else choices[0]
        for room, choices in by_room.items()
        if choices
    }


def cite(recipe: Recipe | str) -> str:
    """BibTeX of exactly the methods that this recipe uses.

    Example:
        >>> "2402.09353" in cite("dora+olora")
        True
    """
    recipe = Recipe.parse(recipe)
    entries = [b for c in recipe.choices for b in source(type(c)).bibtex]
    return "\n\n".join(dict.fromkeys(entries))
