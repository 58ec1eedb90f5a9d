"""Writes what the documentation takes from the code: docs/methods.md, docs/compatibility.md, and
the tables between markers in the other pages.

    python docs/generate.py            writes
    python docs/generate.py --check    writes nothing; exit status 1 where a page is out of date

A generated table is between `<!-- generated: NAME -->` and `<!-- /generated -->`, where NAME is a
key of `TABLES` below. All rows come from declarations in the code. The axes, the commands and the
shapes of data are found by walking their packages, so a new method or command needs no edit here.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lorica.cli import verbs
from lorica.cli.methods import describe
from lorica.data.shapes import shapes
from lorica.recipe import registry
from lorica.recipe.recipe import Recipe
from lorica.run.options import elsewhere

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/start.md", "docs/choose.md", "docs/data.md")
METHODS, COMPATIBILITY = "docs/methods.md", "docs/compatibility.md"
_MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", re.S)


def pages() -> dict[str, str]:
    """{path from the root: the text that the page should have}."""
    out = {name: filled((ROOT / name).read_text(encoding="utf-8"), name) for name in PAGES}
    return {**out, METHODS: methods_page(), COMPATIBILITY: compatibility_page()}


def filled(text: str, name: str) -> str:
    """The page's text with every generated part made anew."""

    def part(match: re.Match[str]) -> str:
        head, table, tail = match.groups()
        if table not in TABLES:
            raise ValueError(f"{name}: no table {table!r}; there are {', '.join(TABLES)}")
        return f"{head}\n{TABLES[table]()}\n\n{tail}"

    return _MARKED.sub(part, text)


# -- the tables ------------------------------------------------------------------------------------


def axes() -> str:
    """One row per axis: its question and its methods, the default in bold."""
    rows = []
    for axis, (field, default, several) in registry.AXES.items():
        found = [
            _link(name, f"docs/methods.md#{name}", bold=name == default)
            for name in registry.names(axis)
        ]
        if found:
            rows.append(
                (field + (" (several)" if several else ""), _question(axis), ", ".join(found))
            )
    return table(("axis", "what it decides", "methods"), rows)


def defaults() -> str:
    """Each method's defaults for `--r`, `--lora-alpha` and `--learning-rate`."""
    rows = []
    for row in describe():
        if row["axis"] == "kernel" or (row["default"] and row["method"] != _plain_method()):
            continue
        recipe = _alone(row["method"])
        if recipe is None:
            continue
        rate = recipe.learning_rate
        rows.append(
            (
                f"`{row['method']}`",
                _number(recipe.r),
                _number(recipe.lora_alpha) + _formula(row["method"]),
                "" if rate is None else _number(rate[0]),
                "" if rate is None else f"`{rate[1]}`",
            )
        )
    return table(("method", "r", "lora_alpha", "learning_rate", "rate declared by"), rows)


def data_shapes() -> str:
    """One row per shape: the columns that identify it, optional columns, tasks."""
    rows = []
    for shape in shapes():
        needed = [
            f"`{name}`" + (f" (or {_ticks(others, ' / ')})" if others else "")
            for name, others in shape.columns.items()
        ]
        tasks = [f"`{task}`" for task in shape.readers]
        rows.append((shape.name, ", ".join(needed), _ticks(shape.optional), ", ".join(tasks)))
    return table(("shape", "columns", "read if there", "tasks, the default first"), rows)


def command_line() -> str:
    """One row per command."""
    rows = []
    for verb in verbs():
        source = (ROOT / "src" / "lorica" / "cli" / f"{verb}.py").read_text(encoding="utf-8")
        rows.append((f"`lorica {verb}`", source.split("\n", 1)[0].strip('" ').rstrip(".")))
    return table(("command", "what it does"), rows)


def names_elsewhere() -> str:
    """One row per option that other programs call otherwise."""
    rows = [(f"`{option}`", _ticks(others)) for option, others in elsewhere.table()]
    return table(("here", "elsewhere"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "axes": axes,
    "defaults": defaults,
    "data-shapes": data_shapes,
    "names-elsewhere": names_elsewhere,
    "verbs": command_line,
}


# -- docs/methods.md -------------------------------------------------------------------------------

_HEAD = """<!-- written by docs/generate.py; edit the code, not this page -->

# Methods

A method is one or more names joined by `+`, in any order: `dora+olora+rslora`. Each name makes the
choice on one axis, and every axis you leave out keeps its default (bold below). Give arguments in
parentheses: `pissa(niter=16)`. Upper case, `-` and `_` don't matter: `LoRA-RITE` is `lorarite`.

This page has one section per axis and one entry per name. An entry gives the equations, the cost,
when the method is worth trying, its arguments, and what it declares about itself: what it *needs*
from the rest of the recipe, what it *gives*, and what it *withdraws*. Lorica decides from these
declarations which methods combine. `lorica methods` prints the same table in the terminal,
`lorica methods NAME` one entry, and `lorica.cite("dora+olora")` the BibTeX entries.

See also [which method to choose](choose.md), [which ones combine](compatibility.md),
[how to add one](extending.md) and the [glossary](glossary.md).
"""


def methods_page() -> str:
    rows = describe()
    parts = [_HEAD]
    for axis, (field, default, several) in registry.AXES.items():
        own = [row for row in rows if row["axis"] == field]
        if not own:
            continue
        parts.append(f"## Axis `{field}`: {_question(axis)}\n")
        parts.append(
            "You can name several of these; by default there is none.\n"
            if several
            else f"You can name one of these; the default is `{default}`.\n"
        )
        listed = [
            (
                _link(r["method"], f"#{r['method']}", bold=r["method"] == default),
                r["summary"],
                _paper(r),
            )
            for r in own
        ]
        parts.append(table(("method", "what it does", "paper"), listed) + "\n")
        parts += [_entry(row) for row in own]
    return "\n".join(parts).rstrip() + "\n"


def _entry(row: dict[str, Any]) -> str:
    cls = registry.find(row["method"])
    module = inspect.getmodule(cls)
    body, arguments = _sections(inspect.cleandoc(cls.__doc__ or ""))
    body = re.sub(r"\n(Cost|When): ", r"\n\n**\1:** ", body).replace("\n\n\n", "\n\n")
    lines = [f"### {row['method']}\n", body + "\n"]
    if equations := inspect.cleandoc((module.__doc__ or "") if module else ""):
        lines.append(f"```text\n{equations}\n```\n")
    for name, default in row["arguments"].items():
        lines.append(f"- `{name}` (default `{default!r}`): {arguments.get(name, '')}".rstrip(": "))
    if row["arguments"]:
        lines.append("")
    facts = []
    # Of an object: a rate may depend on the arguments.
    rate = None if "required" in row["arguments"].values() else _rate(row["method"])
    if rate is not None:
        facts.append(f"default learning rate {_number(rate)}")
    if row["preset"]:
        facts.append(
            "also fills "
            + ", ".join(f"{registry.AXES[k][0]}: `{v}`" for k, v in row["preset"].items())
        )
    for name in ("needs", "gives", "withdraws"):
        if row[name]:
            facts.append(f"{name} {_ticks(row[name])}")
    if facts:
        lines.append(f"Declares: {'; '.join(facts)}.\n")
    return "\n".join(lines)


def _rate(name: str) -> float | None:
    return registry.build(name, {}).default_learning_rate


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's description, and {argument: its meaning} from its `Args:`."""
    blocks = re.split(r"^(Args|Example|Reference|Raises):\n", text, flags=re.M)
    named = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    arguments: dict[str, str] = {}
    for name, meaning in re.findall(
        r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", named.get("Args", ""), flags=re.M | re.S
    ):
        arguments[name] = " ".join(meaning.split())
    return blocks[0].strip(), arguments


def compatibility_page() -> str:
    """How many pairs of methods combine, and why the others don't."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    methods = [
        (axis, name)
        for axis, (_, default, _) in registry.AXES.items()
        for name in registry.names(axis)
        if name != default and _alone(name) is not None
    ]
    allowed = one_axis = 0
    for (axis, one), (other_axis, other) in itertools.combinations(methods, 2):
        if axis == other_axis and not registry.AXES[axis][2]:
            one_axis += 1
            continue
        try:
            Recipe.parse(f"{one}+{other}")
            allowed += 1
        except ValueError as error:
            found = re.match(
                r"`(\w+)` cannot be combined with `(\w+)`: .*? needs `(\w+)`", str(error)
            )
            if found is None:
                reason = str(error).split("; ")[0]
                by_reason.setdefault((f"`{one}`", reason), []).append(other)
            else:
                who, beside, need = found.groups()
                reason = f"`{need}`: {registry.CAPABILITIES[need]}"
                by_reason.setdefault((f"`{beside}`", reason), []).append(who)
    refused = sum(map(len, by_reason.values()))
    rows = [(a, _ticks(b), reason) for (a, reason), b in by_reason.items()]
    return _COMPATIBLE.format(
        methods=len(methods), pairs=allowed + refused + one_axis, one_axis=one_axis,
        allowed=allowed, refused=refused,
        table=table(("method", "does not combine with", "why"), rows),
    )  # fmt: skip


_COMPATIBLE = """<!-- written by docs/generate.py; edit the code, not this page -->

# Which methods combine

There are {methods} methods that are not the default of their axis, which makes {pairs:,} pairs. In
{one_axis:,} of them both methods are choices on the same axis, which is an error. Of the others,
with default arguments, **{allowed:,} pairs combine and {refused:,} don't**.

This page is made from the code. Each method declares which capabilities it needs, gives and
withdraws (`lorica methods NAME` shows them), and a recipe is valid when every need is met. The
tests train, save, load, resume and merge every pair that combines.

## Pairs that don't combine

Where the reason starts with a capability, such as `pair`, the methods in the second column need
that capability, and the method in the first column doesn't provide it or withdraws it.

{table}
"""


# -- small helpers ---------------------------------------------------------------------------------


def _question(axis: str) -> str:
    """What the axis decides: the first sentence of its `base.py`, after the axis' name."""
    text = importlib.import_module(f"lorica.methods.{axis}.base")
    first = (text.__doc__ or "").split("\n\n", 1)[0]
    return " ".join(first.split(":", 1)[1].split()).rstrip(".")


def _plain_method() -> str:
    return str(registry.AXES["scales"][1])


def _formula(name: str) -> str:
    """How alpha follows r, from its values at two ranks."""
    plain = Recipe.parse(name)
    if "r" not in plain.takes or any(c.only_r for c in plain.choices):
        return ""
    low, high = (Recipe.parse(name, r=r).lora_alpha for r in (4, 64))
    if low is None or high is None:
        return ""
    if high / low == 16:
        return f" = {low / 4:g}r".replace(" 1r", " r")
    return " = √r" if high / low == 4 else ""


def _alone(name: str) -> Recipe | None:
    """The recipe of this one method; None where it needs arguments or fields."""
    try:
        return Recipe.parse(name)
    except (TypeError, ValueError):
        return None


def _paper(row: dict[str, Any]) -> str:
    if row["arxiv"]:
        return f"[{row['year']}, arXiv:{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']})"
    return str(row["year"] or "")


def _link(name: str, target: str, *, bold: bool) -> str:
    return f"[**{name}**]({target})" if bold else f"[{name}]({target})"


def _number(value: Any) -> str:
    """2e-4 for 0.0002."""
    if value is None:
        return "none"
    if value >= 1e-3:
        return f"{value:g}"
    return re.sub(r"(\.?0*)e-0*", "e-", f"{value:.2e}")


def _ticks(names: Iterable[str], between: str = ", ") -> str:
    return between.join(f"`{name}`" for name in names)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def main(arguments: list[str]) -> int:
    stale = []
    for name, text in pages().items():
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"out of date: {', '.join(stale)}; run `python docs/generate.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
