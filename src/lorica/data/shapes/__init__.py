"""The shapes of data: a data set's columns decide what it is, and nothing is registered.

A file of this folder holds one `shape = Shape(...)` and the functions that read its rows. To add a
shape, add a file: `shapes()` walks the folder. What a shape declares is held to by `tests/data`:

- its `columns` are enough for every task it serves, and `readers` names the default task first;
- a reader is pure: a `Row` in, one of the forms of `lorica.data.samples` out, a ValueError with the
  row's place where a value has the wrong type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lorica.data.samples import Row
from lorica.data.words import WHERE, excerpt, listing, revive, visible
from lorica.text import clear_errors, nearest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One way to lay out a data set.

    Names are compared without case and without white space around them.

    Attributes:
        name: what `shape=` and reports call it.
        columns: the columns that must be there, each with the other names it goes by.
        optional: columns that are used where they are, each with its other names.
        readers: task -> function from a `Row` to a sample; the first task is the default.
        label: the column that holds classes or figures, if any.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    readers: Mapping[str, Callable[[Row], Any]] = field(repr=False)
    label: str | None = None

    @property
    def default_task(self) -> str:
        return next(iter(self.readers))

    def find(self, columns: Iterable[str]) -> dict[str, str] | None:
        """`{column of the shape: column of the data}`, or None where a needed one is absent."""
        have: dict[str, str] = {}
        for name in columns:
            have.setdefault(_plain(name), name)
            if name == _plain(name):  # `text` before `Text`
                have[name] = name
        found: dict[str, str] = {}
        for column, aliases in {**self.columns, **self.optional}.items():
            names = (have[name] for name in (column, *aliases) if name in have)
            name = next((name for name in names if name not in found.values()), None)
            if name is not None:
                found[column] = name
            elif column in self.columns:
                return None
        return found

    def unused(self, columns: Iterable[str]) -> tuple[str, ...]:
        """The user's columns that this shape leaves aside."""
        used = set((self.find(columns) or {}).values())
        return tuple(name for name in visible(columns) if name not in used)

    def part_of(self, name: str) -> str | None:
        """The column of this shape that such a name means, or None."""
        every = {**self.columns, **self.optional}
        return next((c for c, others in every.items() if _plain(name) in (c, *others)), None)

    def rows(self, table: Mapping[str, list[Any]]) -> list[Row]:
        """The rows of `{column: values}` under the shape's own column names."""
        found = self.find(table)
        assert found is not None, f"{self.name} doesn't fit {list(table)}"
        count = len(next(iter(table.values())))
        places = table.get(WHERE) or [f"row {i}" for i in range(count)]
        values = [[revive(value) for value in table[name]] for name in found.values()]
        return [
            Row(dict(zip(found, cells, strict=True)), place, found)
            for place, *cells in zip(places, *values, strict=True)
        ]


@cache
def shapes() -> tuple[Shape, ...]:
    """Every shape of this folder, by name."""
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    return tuple(sorted((module.shape for module in modules), key=lambda shape: shape.name))


@clear_errors()
def detect(
    columns: Iterable[str],
    *,
    task: str | None = None,
    shape: str | None = None,
    sample: Mapping[str, Sequence[Any]] | None = None,
) -> Shape:
    """The shape that these columns have.

    Of several that fit, the one that needs the most columns (`text` and `label` are a labelled
    text, not a document); of these the one that uses the most, then the one whose own names they
    are. A tie is an error, and so is a column left over that would change what the data means.

    Args:
        columns: the data's column names; those that start with two underscores are hidden.
        task: only shapes that serve this task. Default: any.
        shape: the name of a shape, to settle a tie or to insist; other columns are then ignored.
        sample: some values of each column, to propose names by and to see what a column left over
            holds.

    Raises:
        ValueError: if none fits, or several do, or a column is left over that another shape uses;
            it lists the shapes and the columns found.

    Example:
        >>> detect(["text", "label", "id"]).name
        'text-label'
        >>> detect(["text", "label"], task="causal-lm").name
        'text'
    """
    have = visible(columns)
    known = {each.name: each for each in shapes()}
    if shape is not None and shape not in known:
        raise ValueError(
            f"`shape={shape!r}` is none of the shapes of data: {listing(known)}."
            + nearest(shape, known)
        )
    tasks = sorted({name for each in shapes() for name in each.readers})
    if task is not None and task not in tasks:
        raise ValueError(f"`task={task!r}` is none of {listing(tasks)}.{nearest(task, tasks)}")
    asked = [known[shape]] if shape is not None else list(shapes())
    fitting = [each for each in asked if each.find(have) is not None]
    serving = [each for each in fitting if task is None or task in each.readers]
    if fitting and not serving:
        raise ValueError(
            f"The columns {listing(have)} are of the shape {listing(e.name for e in fitting)}, "
            f"which serves {listing(sorted({t for e in fitting for t in e.readers}))}, not "
            f"`{task}`. For `{task}` the data must have one of these shapes:\n"
            + describe(each for each in shapes() if task in each.readers)
        )
    best = best_of(serving, have)
    if len(best) > 1:
        raise ValueError(
            f"The columns {listing(have)} fit several shapes of data: "
            f"{listing(each.name for each in best)}. Say which with `shape={best[0].name!r}`, or "
            "drop the columns of the others."
        )
    if best:
        if shape is None:
            _check_left_over(best[0], have, task, sample or {})
        return best[0]
    if {"chosen", "rejected"} <= set(map(_plain, have)):
        raise ValueError(
            f"The columns {listing(have)} are a preference set, and no task of Lorica compares "
            "answers. To train on the good ones alone, type `columns={'completion': 'chosen'}` "
            "(`columns={'messages': 'chosen'}` where they hold whole conversations)."
        )
    accepted = [each for each in asked if task is None or task in each.readers]
    names = propose(accepted, have, sample or {})
    raise ValueError(
        f"The columns {listing(have)} fit no shape of data{f' for `{task}`' if task else ''}. "
        + _close(accepted, have)
        + (f"Rename them with `columns={names}`" if names else "Rename them")
        + " to one of these shapes"
        + ("" if names else ", with texts, not objects, in them")
        + ":\n"
        + describe(accepted)
    )


def best_of(serving: Sequence[Shape], have: Sequence[str]) -> list[Shape]:
    """Those of these shapes that explain the columns best; several in a tie."""

    def rank(each: Shape) -> tuple[int, int, int]:
        found = each.find(have) or {}
        own = sum(_plain(name) == column for column, name in found.items())
        return len(each.columns), len(found), own

    fitting = [each for each in serving if each.find(have) is not None]
    top = max(map(rank, fitting), default=None)
    return [each for each in fitting if rank(each) == top]


def _check_left_over(
    chosen: Shape, have: Sequence[str], task: str | None, sample: Mapping[str, Sequence[Any]]
) -> None:
    """Refuses a column left over that another shape gives a part, where it would change the data's
    meaning: beside plain text any, beside another shape what modifies an example."""
    found = chosen.find(have) or {}
    for name in chosen.unused(have):
        values = [value for value in sample.get(name, ()) if value not in (None, "", [], {})]
        if name in sample and not values:
            continue
        generated = task in (None, *_GENERATES) and any(t in chosen.readers for t in _GENERATES)
        if generated and _plain(name) in ("label", "labels") and set(map(_folded, values)) & _VOTES:
            raise ValueError(
                f"The columns {listing(have)} are a preference set: `{name}` says which answers "
                f"are good ({excerpt(values[0])}), and the shape `{chosen.name}` would train on "
                "all of them. Keep the good rows only and drop that column, or train on all with "
                f"`shape={chosen.name!r}`."
            )
        shapes_with = [each for each in shapes() if _gives_part(each, name, found, chosen)]
        if task is not None:  # what other tasks make of it was decided against
            shapes_with = [each for each in shapes_with if task in each.readers]
            shapes_with = [] if _plain(name) in _TELLING else shapes_with
        if not shapes_with or (_are_numbers(values) and _plain(name) not in _TELLING):
            continue
        other = max(shapes_with, key=lambda each: each.part_of(name) == _plain(name))
        parts = {other.part_of(each) for each in have}
        absent = [column for column in other.columns if column not in parts]
        remedy = f"To train without it, type `shape={chosen.name!r}`"
        if len(absent) == 1:
            renamed = {absent[0]: next(iter(found.values()))}
            remedy += f"; to train on both, `columns={renamed}`"
        raise ValueError(
            f"The columns {listing(have)} fit the shape `{chosen.name}`, which has no use for "
            f"`{name}`; in the shape `{other.name}` it is the `{other.part_of(name)}`. {remedy}."
        )


_IDS = frozenset({"id", "idx", "index", "uuid", "guid"})
_GENERATES = ("causal-lm", "seq2seq-lm")
_VOTES = frozenset({"true", "false"})
_TELLING = frozenset({"label", "labels"})  # meant as labels even where they are figures


def _gives_part(other: Shape, name: str, found: Mapping[str, str], chosen: Shape) -> bool:
    """Whether another shape has a use for the column that the chosen one has not filled already."""
    part = other.part_of(name)
    if other is chosen or part is None or chosen.part_of(name) in found:
        return False
    if part in found and part != other.label:  # the same part under a second name
        return False
    if chosen.name == "text":
        return True
    return part in other.optional or (part == other.label and _plain(name) in _TELLING)


def propose(
    accepted: Sequence[Shape], have: Sequence[str], sample: Mapping[str, Sequence[Any]]
) -> dict[str, str]:
    """`{column of a shape: column of the data}` that is likely meant, by names and by contents."""
    # By name: the shape of which most columns are there or nearly there.
    best: tuple[int, dict[str, str]] = (0, {})
    for each in accepted:
        made: dict[str, str] = {}
        for column, aliases in each.columns.items():
            near = {_plain(name): name for name in have if name not in made.values()}
            close = next((near[n] for n in (column, *aliases) if n in near), None)
            if close is None:
                hints = (_closest(n, near) for n in (column, *aliases))
                close = next((near[hint] for hint in hints if hint), None)
                if close is not None and close in sample and not _is_read(sample[close]):
                    close = None
            if close is not None:
                made[column] = close
        if len(made) == len(each.columns) and len(made) > best[0]:
            best = len(made), made
    if best[1]:
        return {column: name for column, name in best[1].items() if column != name} or best[1]
    serves = {task for each in accepted for task in each.readers}
    turns = [name for name in have if _is_turns(sample.get(name, ()))]
    if turns and "causal-lm" in serves:
        return {"messages": turns[0]}
    rest = [name for name in have if _plain(name) not in _IDS]
    texts = [name for name in rest if _is_text(sample.get(name, ()))]
    texts.sort(key=lambda name: -_mean(sample[name]))
    few = [n for n in rest if n not in texts[:1] and _is_label(sample.get(n, ()))]
    if texts and few and serves & {"sequence-classification"}:
        return {"text": texts[0], "label": few[0]}
    if len(texts) > 1 and serves & set(_GENERATES):
        first, second = sorted(texts[:2], key=list(have).index)
        return {"prompt": first, "completion": second}
    if not texts and have and all(name in sample for name in have):
        return {}
    return {"text": texts[0] if texts else (have[0] if have else "name")}


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The one of these that is spelt nearly like it: a slip, not another word."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)), None)


def _close(accepted: Sequence[Shape], have: Sequence[str]) -> str:
    names = {name for each in accepted for column in each.columns.items() for name in _flat(column)}
    found = next((hint for name in have if (hint := _closest(name, names))), None)
    return "" if found is None or found in have else f"Did you mean `{found}`? "


def _is_read(values: Sequence[Any]) -> bool:
    """Whether a shape may read these as texts, figures or turns."""
    kept = [revive(value) for value in values if value is not None]
    return _is_turns(values) or not any(isinstance(value, dict) for value in kept)


def _is_turns(values: Sequence[Any]) -> bool:
    lists = [revive(value) for value in values if value is not None]
    return bool(lists) and all(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in lists
    )


def _is_text(values: Sequence[Any]) -> bool:
    texts = [value for value in values if value is not None]
    return bool(texts) and all(isinstance(t, str) for t in texts) and _mean(texts) > 0


def _is_label(values: Sequence[Any]) -> bool:
    cells = [value for value in values if value is not None]
    short = all(isinstance(v, int | float) or (isinstance(v, str) and len(v) < 30) for v in cells)
    return len(cells) > 2 and short and len(set(map(str, cells))) <= max(2, len(cells) // 2)


def _are_numbers(values: Sequence[Any]) -> bool:
    """Ids and figures, also as texts."""
    return bool(values) and all(
        (isinstance(v, int | float) and not isinstance(v, bool))
        or (isinstance(v, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?", v.strip()) is not None)
        for v in values
    )


def _mean(values: Sequence[Any]) -> float:
    lengths = [len(value) for value in values if isinstance(value, str)]
    return sum(lengths) / max(len(lengths), 1)


def _folded(value: Any) -> str:
    return str(value).strip().casefold()


def _plain(name: str) -> str:
    return name.strip().casefold()


def describe(which: Iterable[Shape]) -> str:
    """The shapes' columns, a line each."""
    lines = []
    for each in which:
        columns = ", ".join(
            name + (f" (or {', '.join(aliases)})" if aliases else "")
            for name, aliases in each.columns.items()
        )
        extra = f"; optional: {', '.join(each.optional)}" if each.optional else ""
        lines.append(f"  {each.name}: {columns}{extra}")
    return "\n".join(lines)


def _flat(column: tuple[str, tuple[str, ...]]) -> tuple[str, ...]:
    return column[0], *column[1]
