"""Small experiments: does what each paper promises appear?

    python benchmarks/experiments [--only NAME ...] [--again] [--report] [--out DIR] [--cache DIR]

Every file of this folder whose name does not begin with `_` is one experiment. Arms are compared at
the rate of a small grid that is best for each, over several seeds. Results are filed run by run
under `build/experiments/`, so an interrupted call goes on where it stopped; `--again` measures anew
and `--report` writes the page from what is filed, without measuring.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from _bench import Experiment, Seen, mean

import lorica

HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("[a-z]*.py"))


class File:
    """The results of one experiment on disk: {"arm text|rate|seed": {"seconds", "values"}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def write(self) -> None:
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.runs, indent=1))
        os.replace(aside, self.path)


def key(text: str, rate: float, seed: int) -> str:
    return f"{text}|{rate:g}|{seed}"


def run(one: Experiment, filed: File) -> None:
    """Measure what is not filed yet."""
    for arm in one.ARMS.values():
        for rate in arm.rates:
            for seed in range(one.SEEDS):
                name = key(arm.text(), rate, seed)
                if name in filed.runs:
                    continue
                began = time.process_time()
                values = one.measure(arm, rate, seed)
                if values.keys() != one.COLUMNS.keys():
                    raise ValueError(f"measured {[*values]}, the columns are {[*one.COLUMNS]}")
                seconds = time.process_time() - began
                filed.runs[name] = {"seconds": seconds, "values": values}
                filed.write()


def seen(one: Experiment, filed: File) -> Seen | None:
    """What is filed, or None where a run is missing."""
    values: dict[str, dict[float, dict[str, list[float]]]] = {}
    for label, arm in one.ARMS.items():
        for rate in arm.rates:
            found = [filed.runs.get(key(arm.text(), rate, s)) for s in range(one.SEEDS)]
            if None in found:
                return None
            columns = {c: [r["values"][c] for r in found if r] for c in one.COLUMNS}
            values.setdefault(label, {})[rate] = columns
    return Seen(one, values)


def spent(one: Experiment, filed: File) -> float:
    """Seconds of the runs that this experiment is made of."""
    runs = {
        key(arm.text(), rate, seed)
        for arm in one.ARMS.values()
        for rate in arm.rates
        for seed in range(one.SEEDS)
    }
    return sum(run["seconds"] for name, run in filed.runs.items() if name in runs)


def number(value: float) -> str:
    whole = abs(value) < 1e5 and value == round(value)
    return f"{value:.0f}" if whole else f"{value:.3g}"


def figure(values: list[float]) -> str:
    """Mean (least to largest)."""
    middle, low, high = (number(f(values)) for f in (mean, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def cell(s: Seen, arm: str, column: str) -> str:
    text = figure(s.each(arm, column))
    if s.one.CHOICE or not s.one.COLUMNS[column].best or len(s.values[arm]) == 1:
        return text
    return f"{text} at {s.rate(arm, column):g}"


def section(name: str, s: Seen, filed: File) -> Iterator[str]:
    one = s.one
    yield f"## {name}: {(one.__doc__ or '').splitlines()[0].rstrip('.')}"
    yield ""
    yield f"**The paper:** {one.PAPER}"
    yield ""
    yield f"**Here:** {one.SETTING} {one.SEEDS} seeds."
    yield ""
    chosen = one.CHOICE != ""
    yield (
        f"| arm | method | rates tried |{' best |' if chosen else ''}"
        f" {' | '.join(c.title for c in one.COLUMNS.values())} |"
    )
    yield "|" + "---|" * (3 + chosen + len(one.COLUMNS))
    for label, arm in one.ARMS.items():
        rates = ", ".join(f"{r:g}" for r in arm.rates)
        best = f" {s.rate(label, one.CHOICE):g} |" if chosen else ""
        cells = " | ".join(cell(s, label, c) for c in one.COLUMNS)
        yield f"| {label} | `{arm.method}` | {rates} |{best} {cells} |"
    yield ""
    for effect in one.effects(s):
        missed = f" {effect.why}" if effect.why and not all(effect.holds) else ""
        yield f"- **{effect.verdict()}**: {effect.what}.{missed}"
    yield ""
    yield f"`python benchmarks/experiments --only {name}` ({spent(one, filed):.0f} s of one core)"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="forget what is filed")
    parser.add_argument("--report", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--cache", type=Path, default=Path("build/experiments"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)

    table, sections, missing, seconds = [], [], [], 0.0
    for name in options.only:
        one = cast(Experiment, importlib.import_module(name))
        path = options.cache / f"{name}.json"
        if options.again and not options.report:
            path.unlink(missing_ok=True)
        filed = File(path)
        if not options.report:
            run(one, filed)
        found = seen(one, filed)
        if found is None:
            missing.append(name)
            continue
        lines = list(section(name, found, filed))
        seconds += spent(one, filed)
        table += [f"| {name} | {e.what} | {e.verdict()} |" for e in one.effects(found)]
        sections += lines
        print("\n".join(lines), flush=True)
    if missing:
        print(f"not measured yet: {', '.join(missing)}")
    if not options.report:
        return
    page = [
        "# Do the papers' effects appear?",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, Lorica {lorica.__version__}, CPU, one"
        f" thread, {seconds / 60:.0f} minutes in all. `python benchmarks/experiments --report`"
        " writes this page from what `python benchmarks/experiments` measured.",
        "",
        "Every experiment is small: one layer, a few layers, or a Llama 64 wide. Each arm is shown"
        " at the best rate of its own grid, as mean (least to largest) over seeds. An effect has"
        " appeared where it holds with every seed. What is missing at this scale may be there at"
        " the paper's, and the other way round.",
        "",
        "| experiment | effect | |",
        "|---|---|---|",
        *table,
        "",
        *sections,
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"experiments-{datetime.date.today()}.md"
    path.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
