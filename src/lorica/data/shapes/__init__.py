"""The shapes of data: a data set's columns decide what it is, and nothing is registered.

A file of this folder holds one `shape = Shape(...)` and the functions that read its rows. To add a
shape, add a file: `shapes()` walks the folder. What a shape declares is held to by `tests/data`:

- its `columns` are enough for every task it serves, and `readers` names the default task first;
- a reader is pure: a `Row` in, one of the forms of `lorica.data.samples` out, a ValueError with the
  row's place where a value has the wrong type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lorica.data.samples import Row
from lorica.data.words import WHERE, listing, revive, visible
from lorica.text import nearest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One way to lay out a data set.

    Attributes:
        name: what `shape=` and reports call it.
        columns: the columns that must be there, each with the other names it goes by.
        optional: columns that are used where they are.
        readers: task -> function from a `Row` to a sample; the first task is the default.
        label: the column that holds classes or figures, if any.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    readers: Mapping[str, Callable[[Row], Any]] = field(repr=False)
    label: str | None = None

    @property
    def default_task(self) -> str:
        return next(iter(self.readers))

    def find(self, columns: Iterable[str]) -> dict[str, str] | None:
        """`{column of the shape: column of the data}`, or None where a needed one is absent."""
        have = set(columns)
        found: dict[str, str] = {}
        for column, aliases in self.columns.items():
            name = next((name for name in (column, *aliases) if name in have), None)
            if name is None:
                return None
            found[column] = name
        found.update({column: column for column in self.optional if column in have})
        return found

    def unused(self, columns: Iterable[str]) -> tuple[str, ...]:
        """The user's columns that this shape leaves aside."""
        used = set((self.find(columns) or {}).values())
        return tuple(name for name in visible(columns) if name not in used)

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


def detect(columns: Iterable[str], *, task: str | None = None, shape: str | None = None) -> Shape:
    """The shape that these columns have.

    Of several that fit, the one that uses the most columns (`text` and `label` are a labelled text,
    not a document); a tie is an error.

    Args:
        columns: the data's column names; those that start with two underscores are hidden.
        task: only shapes that serve this task. Default: any.
        shape: the name of a shape, to settle a tie or to insist.

    Raises:
        ValueError: if none fits, or several do; it lists the shapes and the columns found.

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
    most = max((len(each.columns) for each in serving), default=0)
    best = [each for each in serving if len(each.columns) == most]
    if len(best) == 1:
        return best[0]
    if best:
        raise ValueError(
            f"The columns {listing(have)} fit several shapes of data: "
            f"{listing(each.name for each in best)}. Say which with `shape={best[0].name!r}`, or "
            "drop the columns of the others."
        )
    accepted = [each for each in asked if task is None or task in each.readers]
    names = {name for each in accepted for column in each.columns.items() for name in _flat(column)}
    close = next((hint for name in have if (hint := nearest(name, names))), "")
    raise ValueError(
        f"The columns {listing(have)} fit no shape of data{f' for `{task}`' if task else ''}. "
        f"Rename them with `columns={{'text': {have[0] if have else 'name'!r}}}` to one of these "
        f"shapes:{close}\n" + describe(accepted)
    )


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
