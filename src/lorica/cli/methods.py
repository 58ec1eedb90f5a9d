"""List the methods: axis, paper, arguments and needs."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.run.options import HINT, Kind, UsageError
from lorica.text import nearest

WORDS = Kind("NAME ...", tuple, nargs="*")


@dataclass(frozen=True, kw_only=True)
class Options(VerbOptions):
    """List all methods, or describe some of them.

    A recipe has one method per axis, joined by `+`: `dora+olora+rslora`. An axis that you leave out
    keeps its default.

    Args:
        words: describe these methods in full. Default: a table of all methods.
    """

    words: tyro.conf.Positional[Annotated[tuple[str, ...], WORDS, HINT]] = ()


def run(options: Options) -> Outcome:
    from lorica.recipe.registry import normalise

    rows = describe()
    wanted = [normalise(word) for word in options.words]
    known = {row["method"] for row in rows}
    for word in wanted:
        if word not in known:
            raise UsageError(
                f"`{word}` is not a method.{nearest(word, known)} `lorica methods` lists them"
            )
    chosen = [row for row in rows if not wanted or row["method"] in wanted]
    data = {"methods": chosen}
    if wanted:
        return Outcome(data, tuple(_page(row) for row in chosen))
    return Outcome(data, (_table(chosen), "`lorica methods NAME` describes one in full."))


def describe() -> list[dict[str, Any]]:
    """Every choice of every axis, JSON-ready."""
    from lorica.methods.choice import AXES, source
    from lorica.recipe.registry import find, names

    rows = []
    for axis, (field, default, several) in AXES.items():
        for name in names(axis):
            cls = find(name)
            text = source(cls)
            rows.append(
                {
                    "method": name,
                    "axis": field,
                    "default": name == default,
                    "several": several,
                    "summary": _sentence(text.text),
                    "paper": _first(r"title\s*=\s*\{(.*?)\},?\s*\n?\s*author", text.bibtex),
                    "arxiv": text.arxiv[0] if text.arxiv else None,
                    "year": _year(text.bibtex),
                    "arguments": _arguments(cls),
                    "learning_rate": cls().default_learning_rate,
                    "needs": sorted(cls.needs),
                    "gives": sorted(cls.gives),
                    "withdraws": sorted(cls.withdraws),
                    "preset": dict(cls.preset),
                    "text": text.text,
                }
            )
    return rows


def _sentence(text: str) -> str:
    first = " ".join(text.split("\n\n", 1)[0].split())
    return re.split(r"(?<=\w)\.\s|\.$", first)[0]


def _first(pattern: str, entries: tuple[str, ...]) -> str | None:
    found = (re.search(pattern, entry, re.S) for entry in entries)
    match = next((m for m in found if m), None)
    return None if match is None else " ".join(match[1].replace("{", "").replace("}", "").split())


def _year(entries: tuple[str, ...]) -> int | None:
    year = _first(r"year\s*=\s*\{?(\d{4})", entries)
    return None if year is None else int(year)


def _arguments(cls: type) -> dict[str, Any]:
    """{name: default}; an argument without a default is `required`."""
    out = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            out[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            out[f.name] = f.default_factory()
        else:
            out[f.name] = "required"
    return out


def _call(row: dict[str, Any]) -> str:
    inside = ", ".join(f"{name}={value!r}" for name, value in row["arguments"].items())
    return f"({inside})" if inside else ""


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("axis", "method", "what it does", "year", "arXiv"):
        table.add_column(column, overflow="fold", ratio=1 if column == "what it does" else None)
    axis = None
    for row in rows:
        if row["axis"] != axis:
            axis, shown = row["axis"], row["axis"] + (" (several)" if row["several"] else "")
        else:
            shown = ""
        table.add_row(
            shown,
            row["method"] + ("*" if row["default"] else ""),
            row["summary"],
            str(row["year"] or ""),
            row["arxiv"] or "",
        )
    table.caption = "* the axis' default"
    table.caption_justify = "left"
    return table


def _page(row: dict[str, Any]) -> str:
    lines = [f"{row['method']}{_call(row)}", f"  axis     {row['axis']}"]
    if row["paper"]:
        link = f", arXiv:{row['arxiv']}" if row["arxiv"] else ""
        lines.append(f"  paper    {row['paper']} ({row['year']}){link}")
    for name in ("needs", "gives", "withdraws"):
        if row[name]:
            lines.append(f"  {name:<9}{', '.join(row[name])}")
    if row["preset"]:
        lines.append("  fills    " + ", ".join(f"{k}: {v}" for k, v in row["preset"].items()))
    if row["learning_rate"] is not None:
        lines.append(f"  rate     {row['learning_rate']}")
    lines += ["", *("  " + line if line else "" for line in row["text"].splitlines()), ""]
    return "\n".join(lines)
