"""Writes what the documentation takes from the code: docs/methods.md, docs/compatibility.md, and
the tables between markers in the other pages.

    python docs/generate.py            writes
    python docs/generate.py --check    writes nothing; exit status 1 where a page is out of date

A table stands between `<!-- generated: NAME -->` and `<!-- /generated -->`; NAME is a function of
this file that is listed in `TABLES`. All rows come from declarations, by walking the rooms, the
verbs and the shapes of data: a new file of the package needs no edit here.
"""

from __future__ import annotations

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
    """One row an axis: its question and its words; the default is bold."""
    rows = []
    for room, (axis, default, several) in registry.AXES.items():
        found = [
            f"[{f'**{w}**' if w == default else w}](docs/methods.md#{w})"
            for w in registry.names(room)
        ]
        if found:
            rows.append(
                (axis + (" (several)" if several else ""), _question(room), ", ".join(found))
            )
    return table(("axis", "question", "words"), rows)


def defaults() -> str:
    """What each word brings where `--r`, `--lora-alpha` and `--learning-rate` are left out."""
    rows = []
    for row in describe():
        if row["axis"] == "kernel" or (row["default"] and row["word"] != _plain_method()):
            continue
        recipe = _alone(row["word"])
        if recipe is None:
            continue
        rate = recipe.learning_rate
        rows.append(
            (
                f"`{row['word']}`",
                _number(recipe.r),
                _number(recipe.lora_alpha) + _formula(row["word"]),
                "" if rate is None else _number(rate[0]),
                "" if rate is None else f"`{rate[1]}`",
            )
        )
    return table(("word", "r", "lora_alpha", "learning_rate", "rate declared by"), rows)


def data_shapes() -> str:
    """One row a shape: the columns that tell it, what else it reads, what it is trained for."""
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
    """One row a verb."""
    rows = []
    for verb in verbs():
        source = (ROOT / "src" / "lorica" / "cli" / f"{verb}.py").read_text(encoding="utf-8")
        rows.append((f"`lorica {verb}`", source.split("\n", 1)[0].strip('" ').rstrip(".")))
    return table(("command", "what it does"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "axes": axes,
    "defaults": defaults,
    "data-shapes": data_shapes,
    "verbs": command_line,
}


# -- docs/methods.md -------------------------------------------------------------------------------

_HEAD = """<!-- written by docs/generate.py; edit the code, not this page -->

# Methods

A method is words joined by `+`, in any order: `dora+olora+rslora`. Each word chooses one point on
one axis; an axis nobody speaks of has its default (bold). A word takes arguments in the form
`pissa(niter=16)`. `-`, `_` and upper case are ignored: `LoRA-RITE` is `lorarite`. The same
descriptions are printed by `lorica methods` and `lorica methods WORD`; `lorica.cite("dora+olora")`
gives the BibTeX entries.

How to choose: [choose.md](choose.md). What stands together: [compatibility.md](compatibility.md).
How to add one: [extending.md](extending.md).
"""


def methods_page() -> str:
    rows = describe()
    parts = [_HEAD]
    for room, (axis, default, several) in registry.AXES.items():
        own = [row for row in rows if row["axis"] == axis]
        if not own:
            continue
        parts.append(f"## Axis `{axis}`: {_question(room)}\n")
        parts.append(
            "Several words may stand together.\n" if several else "One word; the default is bold.\n"
        )
        listed = [
            (
                f"[{'**' + r['word'] + '**' if r['word'] == default else r['word']}](#{r['word']})",
                r["summary"],
                _paper(r),
                r["status"],
            )
            for r in own
        ]
        parts.append(table(("word", "what it does", "paper", "status"), listed) + "\n")
        parts += [_entry(row) for row in own]
    return "\n".join(parts).rstrip() + "\n"


def _entry(row: dict[str, Any]) -> str:
    cls = registry.find(row["word"])
    module = inspect.getmodule(cls)
    body, arguments = _sections(inspect.cleandoc(cls.__doc__ or ""))
    body = re.sub(r"\n(Cost|When): ", r"\n\n**\1:** ", body).replace("\n\n\n", "\n\n")
    lines = [f"### {row['word']}\n", body + "\n"]
    if equations := inspect.cleandoc((module.__doc__ or "") if module else ""):
        lines.append(f"```text\n{equations}\n```\n")
    for name, default in row["arguments"].items():
        lines.append(f"- `{name}` (default `{default!r}`): {arguments.get(name, '')}".rstrip(": "))
    if row["arguments"]:
        lines.append("")
    facts = []
    # Of an object: a rate may depend on the arguments.
    rate = None if "required" in row["arguments"].values() else _rate(row["word"])
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


def _rate(word: str) -> float | None:
    return registry.build(word, {}).default_learning_rate


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """The words before `Args:` and after its block, and {argument: what it means}."""
    blocks = re.split(r"^(Args|Example|Reference|Raises):\n", text, flags=re.M)
    named = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    arguments: dict[str, str] = {}
    for name, meaning in re.findall(
        r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", named.get("Args", ""), flags=re.M | re.S
    ):
        arguments[name] = " ".join(meaning.split())
    return blocks[0].strip(), arguments


def compatibility_page() -> str:
    """Which pairs of words stand together, counted, and why the others do not."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    words = [
        (room, word)
        for room, (_, default, _) in registry.AXES.items()
        for word in registry.names(room)
        if word != default and _alone(word) is not None
    ]
    lawful = one_axis = 0
    for (room, one), (other_room, other) in itertools.combinations(words, 2):
        if room == other_room and not registry.AXES[room][2]:
            one_axis += 1
            continue
        try:
            Recipe.parse(f"{one}+{other}")
            lawful += 1
        except ValueError as error:
            found = re.match(r"`(\w+)` cannot stand beside `(\w+)`: .*? needs `(\w+)`", str(error))
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
        words=len(words), pairs=lawful + refused + one_axis, one_axis=one_axis, lawful=lawful,
        refused=refused,
        table=table(("word", "refuses", "what the latter needs and the word does not leave"), rows),
    )  # fmt: skip


_COMPATIBLE = """<!-- written by docs/generate.py; edit the code, not this page -->

# What stands together

Of {pairs:,} pairs of {words} words (the defaults of the axes aside), {one_axis:,} name one axis
twice. Of the rest, with default arguments, **{lawful:,} stand together and {refused:,} are
refused**, by what the words declare of themselves; `lorica methods --json` shows the declarations.
Every lawful pair is trained, saved, loaded, resumed and merged by the tests, in recipes as full as
they get.

## Refused

{table}
"""


# -- small helpers ---------------------------------------------------------------------------------


def _question(room: str) -> str:
    """What the room's docstring says after its name."""
    text = sys.modules.get(f"lorica.{room}") or __import__(f"lorica.{room}", fromlist=["_"])
    first = (text.__doc__ or "").split("\n\n", 1)[0]
    return " ".join(first.split(":", 1)[1].split()).rstrip(".")


def _plain_method() -> str:
    return str(registry.AXES["scales"][1])


def _formula(word: str) -> str:
    """How alpha follows r, from its values at two ranks."""
    plain = Recipe.parse(word)
    if "r" not in plain.takes or any(c.only_r for c in plain.choices):
        return ""
    low, high = (Recipe.parse(word, r=r).lora_alpha for r in (4, 64))
    if low is None or high is None:
        return ""
    if high / low == 16:
        return f" = {low / 4:g}r".replace(" 1r", " r")
    return " = √r" if high / low == 4 else ""


def _alone(word: str) -> Recipe | None:
    """The method of this one word; None where it is nothing without arguments or fields."""
    try:
        return Recipe.parse(word)
    except (TypeError, ValueError):
        return None


def _paper(row: dict[str, Any]) -> str:
    if row["arxiv"]:
        return f"[{row['year']}, arXiv:{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']})"
    return str(row["year"] or "")


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
