"""What a recipe must satisfy before anything expensive happens. Every failure is a ValueError."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any

from lorica.methods.choice import AXES, CAPABILITIES
from lorica.methods.optional import Regrows
from lorica.methods.ranks.base import flaw
from lorica.recipe.registry import find, names

DENSE = frozenset(
    {"base_unchanged", "writable_base", "base", "separate"}
)  # what a dense base gives; attach asks the real one
MOST = 3.4e38  # of float32
LEAST = 1e-37  # of a scale, in whole digits of float32
MOST_R = 2**31 - 1  # above any layer's size
_NUMERIC = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
_AXES = {name for name, _, _ in AXES.values()}
_ALLOWED = {
    "train_rest": (True, False),
    "bias": ("none", "all", "lora_only"),
    "lora_dropout_on": ("update", "delta"),
}


def check_fields(known: list[str], method: Any, fields: Mapping[str, Any]) -> None:
    """Fields exist, and a choice among them is an object: words belong into the method's text."""
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"its fields: {', '.join(known)}"
            raise ValueError(f"a recipe has no field `{name}`; {hint}")
        several = value if isinstance(value, (list, tuple)) else [value]
        for word in several if name in _AXES else ():
            if isinstance(word, str):
                text = method if isinstance(method, str) else "..."
                raise ValueError(
                    f"`{name}={value!r}` is a word; put it into the method's text: `{text}+{word}`"
                )


def check_effects(recipe: Any) -> None:
    """What was given has an effect on this method."""
    if not recipe.delta.wraps:
        useless: dict[str, Any] = {"bias": "none", "lora_dropout_on": "update"}
        if recipe.whole:
            useless |= {"modules_to_save": (), "train_rest": False}
        for name, default in useless.items():
            if (value := getattr(recipe, name)) != default:
                raise ValueError(
                    f"`{name}={value!r}` has no effect with `{recipe.delta.name}`, which trains the"
                    " weights themselves; leave it out"
                )
    for name, default in (
        {"bias": "none", "modules_to_save": ()}.items() if recipe.train_rest else ()
    ):
        if (value := getattr(recipe, name)) != default:
            raise ValueError(
                f"`{name}={value!r}` has no effect with `train_rest`, which trains that in place"
                " already; leave it out"
            )
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        idle = f.name in _NUMERIC and f.name not in recipe.takes
        if idle and value is not None and value != f.default and value != {}:
            who = recipe.delta if f.name not in recipe.delta.takes else recipe.scale
            raise ValueError(f"`{f.name}={value!r}` has no effect with `{who.name}`; leave it out")
    patterns = recipe.rank_pattern or recipe.alpha_pattern
    rank: Any = recipe.rank
    if patterns and rank is not None and not rank.reads_patterns:
        raise ValueError(
            f"`rank_pattern` and `alpha_pattern` have no effect with `{rank.name}`; leave it"
            " out of the method, or leave the patterns out"
        )


def check_values(recipe: Any) -> None:
    """Numbers are in their range."""
    if "r" in recipe.takes and not _whole(recipe.r):
        raise ValueError(
            f"`r={short(recipe.r)}`: the rank is a whole number of at least 1, and of at most a"
            " layer's size, e.g. `r=16`"
        )
    if not _number(recipe.lora_dropout) or not 0 <= recipe.lora_dropout < 1:
        raise ValueError(
            f"`lora_dropout={short(recipe.lora_dropout)}` is a probability in [0, 1), e.g. 0.05"
        )
    for choice in recipe.choices if "r" in recipe.takes else ():
        if choice.only_r is not None and (recipe.r != choice.only_r or recipe.rank_pattern):
            name = "rank_pattern" if recipe.rank_pattern else "r"
            by = f" (`{recipe.rank.name}`)" if recipe.rank_pattern else ""
            raise ValueError(
                f"`{name}={getattr(recipe, name)!r}`{by} beside `{choice.name}`, which is defined"
                f" for rank {choice.only_r} alone; leave one of the two out"
            )
    ranks = [r for r in (recipe.r, *recipe.rank_pattern.values()) if _whole(r)]
    least = LEAST * max(ranks, default=1)
    if recipe.lora_alpha is not None and not _alpha(recipe.lora_alpha, least):
        raise ValueError(
            f"`lora_alpha={short(recipe.lora_alpha)}` must be a positive number that float32 holds,"
            " also divided by the rank; left out, the method's own is taken"
        )
    for name, allowed in _ALLOWED.items():
        if getattr(recipe, name) not in allowed:
            raise ValueError(
                f"`{name}={getattr(recipe, name)!r}`; allowed: {', '.join(map(str, allowed))}"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(recipe, name):
            if (why := flaw(pattern)) is not None:
                raise ValueError(
                    f"`{name}` has {pattern!r}, which is no regular expression ({why}); a"
                    " pattern ends a module path, e.g. 'q_proj', and a character such as `(` is"
                    r" written `\(`"
                )
    for pattern, value in recipe.rank_pattern.items():
        if not _whole(value):
            raise ValueError(
                f"`rank_pattern[{pattern!r}]={short(value)}` is a whole number >= 1, and at most a"
                " layer's size"
            )
    for pattern, value in recipe.alpha_pattern.items():
        if not _alpha(value, least):
            raise ValueError(
                f"`alpha_pattern[{pattern!r}]={short(value)}` must be a positive number that"
                " float32 holds, also divided by the rank"
            )


def check_capabilities(recipe: Any, base: frozenset[str]) -> None:
    """Every need of a choice is met, no two schedules edit the same thing, and nothing is frozen
    that one of them wants to train."""
    have = recipe.given(base)
    for choice in recipe.choices:
        for need in sorted(choice.needs - have):
            word = _typed(recipe, choice)
            blame = [_typed(recipe, c, word) for c in recipe.choices if need in c.withdraws]
            blame += ["train_rest"] if need == "base_unchanged" and recipe.train_rest else []
            blame = blame or [_typed(recipe, c, word) for c in _givers(recipe, need)]
            blame = blame or [_typed(recipe, recipe.delta, word)]
            raise ValueError(
                f"`{word}` cannot stand beside `{blame[0]}`: `{word}` needs `{need}`"
                f" ({CAPABILITIES[need]}), which `{blame[0]}` does not leave. Leave one of the two"
                f" out of `{recipe.text()}`"
            )
    _check_owners(recipe.groups, lambda group: group.freezes, "freeze")
    _check_owners(recipe.schedules, lambda schedule: schedule.edits, "edit the")
    for schedule, group in itertools.product(recipe.schedules, recipe.groups):
        regrows = schedule.regrows if isinstance(schedule, Regrows) else frozenset()
        for role in sorted(regrows & group.freezes):
            raise ValueError(
                f"`{schedule.name}` takes parts of {role} away which have to grow back, and"
                f" `{group.name}` freezes {role}; leave one of the two out"
            )


def _check_owners(choices: Any, things: Callable[[Any], frozenset[str]], does: str) -> None:
    """No two of these do it to the same thing."""
    owner: dict[str, str] = {}
    for choice in choices:
        for thing in sorted(things(choice)):
            if (other := owner.setdefault(thing, choice.name)) != choice.name:
                raise ValueError(
                    f"`{other}` and `{choice.name}` both {does} {thing}; name one of them"
                )


def _typed(recipe: Any, choice: Any, other: str = "") -> str:
    """The word that was typed, not what it fills in; the choice's own where that is `other`."""
    by = [c.name for c in recipe.choices if c.preset.get(choice.axis) == choice.text()]
    defaults = {word for _, word, _ in AXES.values()}  # nobody need have typed these
    return next((w for w in by if w != other and w not in defaults), choice.name)


def _givers(recipe: Any, need: str) -> list[Any]:
    """The recipe's choices on the axes where another one would give this."""
    rooms = [r for r in AXES if any(need in find(n, r).gives for n in names(r))]
    return [c for room in rooms for c in recipe.of(room)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_R


def _alpha(value: Any, least: float) -> bool:
    return _number(value) and least <= value <= MOST
