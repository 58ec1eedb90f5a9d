"""Train the embedded model on new tasks and show what it has learned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.run.demo.options import DemoOptions


@dataclass(frozen=True, kw_only=True)
class Options(DemoOptions, VerbOptions):
    __doc__ = DemoOptions.__doc__


def run(options: Options) -> Outcome:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked for, let alone downloaded
    # Read when torch is imported. Threads that wait by spinning are twenty times slower than one
    # thread as soon as the machine has something else to do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lorica.run.demo.run import PAGE, demo

    result = demo(options)
    told = result["demo"]
    page = (Path(options.output_dir).expanduser() / PAGE).resolve()
    shown = (
        "",
        _tasks(told),
        "",
        _answers(told["samples"]),
        "",
        _reread(told["reread"]),
        "",
        *_summary(result),
        "",
        f"Look at {page.as_uri()}",
    )
    return Outcome(result, shown)


def _table(title: str, columns: Sequence[str], right: Sequence[str] = ()) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", header_style="dim")
    return table


_COLOURS = {"new": "green", "old": "blue"}


def _tasks(told: Mapping[str, Any]) -> Any:
    from lorica.run.report.page import percent

    columns = ("task", "", "before", "after", " ")
    table = _table("Exact match on inputs never trained on", columns, ("before", "after"))
    for kind, colour in _COLOURS.items():
        table.add_row(f"[bold {colour}]{kind}[/]")
        rows = [row for row in told["tasks"] if row["kind"] == kind]
        mean = {"task": "[bold]mean[/]", "description": "", **told[kind]}
        for row in (*rows, mean):
            table.add_row(
                f"  {row['task']}",
                f"[dim]{row['description']}[/]",
                percent(row["before"]),
                f"[bold {colour}]{percent(row['after'])}[/]",
                f"[{colour}]{_bar(row['after'])}[/]",
            )
    return table


def _bar(share: float, width: int = 20) -> str:
    return "━" * round(share * width)


def _answers(samples: Sequence[Mapping[str, str]]) -> Any:
    from rich.text import Text

    from lorica.run.demo.page import shown

    table = _table("In its own words", ("prompt", "before", "after", "right"))
    for row in samples:
        if row["kind"] == "new":
            marked = [
                Text(shown(row[when]), style="green" if row[when] == row["wanted"] else "red")
                for when in ("before", "after")
            ]
            table.add_row(Text(row["prompt"]), *marked, Text(row["wanted"]))
    return table


def _reread(rows: Sequence[Mapping[str, Any]]) -> Any:
    from lorica.run.report.page import difference

    columns = ("fresh process", "largest difference of a logit", "same answers")
    table = _table("The adapter, read again", columns)
    for row in rows:
        if "skipped" in row:
            table.add_row(row["name"], f"[dim]{row['skipped']}[/]")
        else:
            same = f"{row['same_answers']:,} of {row['answers']:,}"
            table.add_row(row["name"], difference(row), same)
    return table


def _summary(result: Mapping[str, Any]) -> list[str]:
    from lorica.run.report.page import base_size
    from lorica.text import human

    told = result["demo"]
    share = result["trainable"] / base_size(result)
    first, last = told["loss"][0]["loss"], told["loss"][-1]["loss"]
    return [
        f"{result['method']}: {result['trainable']:,} parameters trained ({share:.1%} of the"
        f" model's {base_size(result):,}), adapter {human(told['adapter']['bytes'])}",
        f"{result['steps']:,} steps in {result['seconds']:.0f} s ({told['seconds']:.0f} s in all),"
        f" loss {first:.3f} to {last:.3f}, peak memory {human(result['peak_memory'])}",
    ]
