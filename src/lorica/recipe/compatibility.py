"""What a recipe must satisfy before anything expensive happens. Every failure is a ValueError.

Three questions: has every value that was given an effect, is it in its range, and does every choice
have what it needs beside the others?
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lorica.methods.choice import AXES, CAPABILITIES, Choice
from lorica.methods.fields import is_number, is_whole
from lorica.methods.optional import Regrows
from lorica.methods.ranks.base import flaw
from lorica.recipe.registry import find, names

if TYPE_CHECKING:
    from lorica.recipe.recipe import Recipe

C = TypeVar("C", bound=Choice)

# What a dense base gives; attach asks the real one.
DENSE = frozenset({"base_unchanged", "writable_base", "base", "separate"})
MOST = 3.4e38  # of float32
LEAST = 1e-37  # of a scale, in whole digits of float32
MOST_R = 2**31 - 1  # above any layer's size
_NUMERIC = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
_FIELDS = {axis.field for axis in AXES.values()}
_ALLOWED: dict[str, tuple[object, ...]] = {
    "train_rest": (True, False),
    "bias": ("none", "all", "lora_only"),
    "lora_dropout_on": ("update", "delta"),
}


def check_fields(known: Sequence[str], method: object, fields: Mapping[str, object]) -> None:
    """Fields exist, and a choice among them is an object: names go into the method's text."""
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"its fields: {', '.join(known)}"
            raise ValueError(f"a recipe has no field `{name}`; {hint}")
        several: list[object] = [*value] if isinstance(value, (list, tuple)) else [value]
        for method_name in several if name in _FIELDS else ():
            if isinstance(method_name, str):
                text = method if isinstance(method, str) else "..."
                raise ValueError(
                    f"`{name}={value!r}` is a method's name; put it into the method's text:"
                    f" `{text}+{method_name}`"
                )


def check_effects(recipe: Recipe) -> None:
    """What was given has an effect on this method."""
    useless: dict[str, object] = {}
    why = f"`{recipe.delta.name}`, which trains the weights themselves"
    if not recipe.delta.wraps:
        useless = {
            "bias": "none",
            "lora_dropout_on": "update",
            "adapt_towers": False,
            "target_parameters": None,
        }
        if recipe.whole:
            useless |= {"modules_to_save": (), "train_rest": False}
        _refuse_rows(recipe)
    _refuse_idle(recipe, useless, why)
    if recipe.target_modules != "all-linear":
        named = "`target_modules`, which names the layers itself"
        _refuse_idle(recipe, {"adapt_towers": False}, named)
    rest: dict[str, object] = {
        "bias": "none", "modules_to_save": (), "trainable_token_indices": None,
    }  # fmt: skip
    rest = rest if recipe.train_rest else {}
    _refuse_idle(recipe, rest, "`train_rest`, which trains that in place already")
    for f in dataclasses.fields(recipe):
        if f.name in _NUMERIC and f.name not in recipe.takes:
            default: object = f.default
            default = {} if default is dataclasses.MISSING else default
            _refuse_idle(recipe, {f.name: default}, _blamed(recipe, f.name))
    if recipe.rank is not None and not recipe.rank.reads_patterns:
        if recipe.rank_pattern or recipe.alpha_pattern:
            raise ValueError(
                f"`rank_pattern` and `alpha_pattern` have no effect with `{recipe.rank.name}`;"
                " leave it out of the method, or leave the patterns out"
            )


def _refuse_rows(recipe: Recipe) -> None:
    """Rows of a table train beside adapters, not beside weights that train themselves."""
    if (ids := recipe.trainable_token_indices) is None:
        return
    instead = "leave it out, for every row of every table trains already"
    if not recipe.whole:
        instead = (
            "to train the tables whole, name them in `target_modules` or `modules_to_save`; to"
            " train these rows alone, take a method with adapters, e.g. `lora`"
        )
    raise ValueError(
        f"`trainable_token_indices={short(ids)}` has no effect with `{recipe.text()}`, which trains"
        f" whole weights and keeps no row of them frozen: {instead}"
    )


def _refuse_idle(recipe: Recipe, defaults: Mapping[str, object], why: str) -> None:
    """These fields are at their defaults."""
    for name, default in defaults.items():
        if (value := getattr(recipe, name)) != default:
            raise ValueError(f"`{name}={value!r}` has no effect with {why}; leave it out")


def _blamed(recipe: Recipe, field: str) -> str:
    """The part of the method that a numeric field means nothing to."""
    scale = recipe.scale
    who = recipe.delta if field not in recipe.delta.takes or scale is None else scale
    return f"`{who.name}`"


def listed(field: str, value: Any) -> Any:  # Any: whatever the caller wrote
    """A field that names modules or layers, as its tuple, its text, or None.

    Raises:
        ValueError: it is of another form.
    """
    given: object = value
    layers = field == "layers_to_transform"
    if layers and is_whole(given, 0):
        given = (given,)
    elif isinstance(given, (set, frozenset)):
        given = tuple(sorted(cast(set[str], given), key=str))
    elif isinstance(given, (list, range)):
        given = tuple(cast(list[object], given))
    text = field in ("target_modules", "exclude_modules")
    if given is None or (text and isinstance(given, str)):
        return given
    items = cast(tuple[object, ...], given) if isinstance(given, tuple) else ("", 0)
    _require(
        all(is_whole(x, 0) if layers else isinstance(x, str) for x in items),
        f"`{field}={short(cast(object, given))}`: "
        + (
            "a list of block numbers, counted from 0, e.g. [0, 1]; left out, all blocks"
            if layers
            else "a list of module names, e.g. ['q_proj', 'v_proj']"
            + (", or a pattern as text, e.g. '.*_proj'" if text else "")
        ),
    )
    return items


def by_pattern(field: str, given: object) -> dict[str, Any]:  # Any: checked by `check_values`
    """The value of `rank_pattern` or `alpha_pattern`: a whole number names a module of a
    `Sequential` and becomes text, as YAML reads `1: 8`.

    Raises:
        ValueError: it is no mapping, or a pattern is neither text nor a whole number.

    Example:
        >>> by_pattern("rank_pattern", {1: 4, "q_proj": 8})
        {'1': 4, 'q_proj': 8}
    """
    _require(
        isinstance(given, Mapping),
        f"`{field}={short(given)}` is no mapping from patterns of module paths to values, e.g."
        " {'q_proj': 8}; left out, every layer has the same",
    )
    patterns: dict[str, Any] = {}
    for pattern, value in cast(Mapping[object, Any], given).items():
        _require(
            isinstance(pattern, str) or is_whole(pattern, 0, MOST_R),
            f"`{field}` has {short(pattern)} as a pattern, which is no text; a pattern ends a"
            " module path, e.g. 'q_proj'",
        )
        _require(
            str(pattern) not in patterns,
            f"`{field}` has {short(pattern)} twice, as text and as a number; leave one of them out",
        )
        patterns[str(pattern)] = value
    return patterns


def check_values(recipe: Recipe) -> None:
    """Numbers are in their range."""
    _require(
        is_whole(recipe.seed, 0, 2**63),
        f"`seed={short(recipe.seed)}`: a seed is a whole number, at least 0, e.g. `seed=42`",
    )
    if "r" in recipe.takes:
        _require(
            is_whole(recipe.r, 1, MOST_R),
            f"`r={short(recipe.r)}`: the rank is a whole number of at least 1, and of at most a"
            " layer's size, e.g. `r=16`",
        )
    _require(
        is_number(recipe.lora_dropout, 0) and recipe.lora_dropout < 1,
        f"`lora_dropout={short(recipe.lora_dropout)}` is a probability in [0, 1), e.g. 0.05",
    )
    for choice in recipe.choices if "r" in recipe.takes else ():
        if choice.only_r is not None and (recipe.r != choice.only_r or recipe.rank_pattern):
            name = "rank_pattern" if recipe.rank_pattern else "r"
            by = f" (`{recipe.rank.name}`)" if recipe.rank_pattern and recipe.rank else ""
            raise ValueError(
                f"`{name}={getattr(recipe, name)!r}`{by} beside `{choice.name}`, which is defined"
                f" for rank {choice.only_r} alone; leave one of the two out"
            )
    ranks = [r for r in (recipe.r, *recipe.rank_pattern.values()) if is_whole(r, 1, MOST_R)]
    least = LEAST * max(ranks, default=1)  # so that alpha / r is a number of float32, too
    _require(
        recipe.lora_alpha is None or is_number(recipe.lora_alpha, least, MOST),
        f"`lora_alpha={short(recipe.lora_alpha)}` must be a positive number that float32 holds,"
        " also divided by the rank; left out, the method's own is taken",
    )
    for name, allowed in _ALLOWED.items():
        value: object = getattr(recipe, name)
        _require(
            value in allowed, f"`{name}={short(value)}`; allowed: {', '.join(map(str, allowed))}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, float] = getattr(recipe, name)
        for pattern in patterns:
            why = flaw(pattern)
            _require(
                why is None,
                f"`{name}` has {short(pattern)}, which is no regular expression ({why}); a"
                " pattern ends a module path, e.g. 'q_proj', and a character such as `(` is"
                r" written `\(`",
            )
    for pattern, value in recipe.rank_pattern.items():
        _require(
            is_whole(value, 1, MOST_R),
            f"`rank_pattern[{short(pattern)}]={short(value)}` is a whole number >= 1, and at most a"
            " layer's size",
        )
    for pattern, value in recipe.alpha_pattern.items():
        _require(
            is_number(value, least, MOST),
            f"`alpha_pattern[{short(pattern)}]={short(value)}` must be a positive number that"
            " float32 holds, also divided by the rank",
        )


def tokens(given: object) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """The value of `trainable_token_indices`, ids ascending.

    Raises:
        ValueError: it is no list of token ids, and no mapping of names to such lists.

    Example:
        >>> tokens([5, 3]), tokens({"lm_head": range(2)})
        ((3, 5), {'lm_head': (0, 1)})
    """
    if given is None:
        return None
    if isinstance(given, Mapping) and given:
        items = cast(Mapping[str, object], given).items()
        return {name: _ids(value, f"[{name!r}]") for name, value in items}
    return _ids(cast(object, given), "")


def _ids(given: object, where: str) -> tuple[int, ...]:
    several = isinstance(given, (list, tuple, range))
    ids = [*cast(Sequence[object], given)] if several else []
    whole = [i for i in ids if is_whole(i, 0, MOST_R)]
    if not ids or len({*whole}) < len(ids):
        raise ValueError(
            f"`trainable_token_indices{where}={short(given)}`: it is a list of different token ids"
            " (whole numbers from 0), e.g. `[32000, 32001]`, or a mapping of modules' names to such"
            " lists; left out, no rows train"
        )
    return tuple(sorted(whole))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def check_capabilities(recipe: Recipe, base: frozenset[str]) -> None:
    """Every need of a choice is met, no two schedules edit the same thing, and nothing is frozen
    that one of them wants to train."""
    have = recipe.given(base)
    for choice in recipe.choices:
        for need in sorted(choice.needs - have):
            name = _typed(recipe, choice)
            other = _to_blame(recipe, need, name)
            raise ValueError(
                f"`{name}` cannot be combined with `{other}`: `{name}` needs `{need}`"
                f" ({CAPABILITIES[need]}), which `{other}` does not leave. Leave one of the two"
                f" out of `{recipe.text()}`"
            )
    _check_owners(recipe.groups, lambda group: group.freezes, "freeze")
    _check_owners(recipe.schedules, lambda schedule: schedule.edits, "edit the")
    for schedule, group in itertools.product(recipe.schedules, recipe.groups):
        shared = schedule.regrows & group.freezes if isinstance(schedule, Regrows) else ()
        for role in sorted(shared):
            raise ValueError(
                f"`{schedule.name}` takes parts of {role} away which have to grow back, and"
                f" `{group.name}` freezes {role}; leave one of the two out"
            )


def check_quantised(recipe: Recipe, gives: frozenset[str], base: str) -> None:
    """The recipe leaves the frozen weights as they are, since packed ones cannot be written to.

    Args:
        gives: what a quantised base gives.
        base: what is quantised, as the beginning of a sentence, e.g. `'q_proj' is nf4`.

    Raises:
        ValueError: naming the part of the method that writes.
    """
    writes = [_typed(recipe, c) for c in recipe.choices if (c.needs & DENSE) - gives]
    writes += ["train_rest"] * recipe.train_rest
    if writes:
        raise ValueError(
            f"{base}, and `{writes[0]}` writes to the base's weights during training, which a"
            " quantised weight cannot take: the steps are smaller than its rounding. Load the base"
            " in bfloat16 or float32, or choose a method that leaves it unchanged, such as `lora`,"
            " `dora` or `pissa`"
        )


def _to_blame(recipe: Recipe, need: str, name: str) -> str:
    """The part of the method, as it was typed, that leaves `name` without what it needs."""
    withdraws = [_typed(recipe, c, name) for c in recipe.choices if need in c.withdraws]
    if withdraws:
        return withdraws[0]
    if need == "base_unchanged" and recipe.train_rest:
        return "train_rest"
    could = [axis for axis in AXES if any(need in find(n, axis).gives for n in names(axis))]
    givers = [_typed(recipe, c, name) for axis in could for c in recipe.of(axis)]
    return givers[0] if givers else _typed(recipe, recipe.delta, name)


def _check_owners(choices: Sequence[C], things: Callable[[C], frozenset[str]], does: str) -> None:
    """No two of these do it to the same thing."""
    owner: dict[str, str] = {}
    for choice in choices:
        for thing in sorted(things(choice)):
            if (other := owner.setdefault(thing, choice.name)) != choice.name:
                raise ValueError(
                    f"`{other}` and `{choice.name}` both {does} {thing}; name one of them"
                )


def _typed(recipe: Recipe, choice: Choice, other: str = "") -> str:
    """The name that was typed, not what it fills in; the choice's own where that is `other`."""
    by = [c.name for c in recipe.choices if c.preset.get(choice.axis) == choice.text()]
    defaults = {axis.default for axis in AXES.values()}  # a user need not have typed these
    return next((n for n in by if n != other and n not in defaults), choice.name)
