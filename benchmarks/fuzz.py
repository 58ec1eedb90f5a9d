"""Hostile adapters, run files, data, checkpoints and models: each is accepted, or refused in one
clear message.

    python benchmarks/fuzz.py [--inputs 1400] [--seed 0] [--only NUMBER] [--subject NAME] [--jobs 1]
    [--out FILE]

Half of the inputs are blind changes of a good file (flips, cuts, insertions); the other half know
the format and change exactly one thing. Subjects of their own plant values of certain kinds
(`--subject pattern`, `template`, `columns`, `escape`, `call`): patterns that take years wherever a
pattern may stand, templates without an end, tables with many columns, text that a terminal would
obey, and arguments of calls in Python. Every input is read in a forked child with a limit on time
and memory; the child has no terminal and is answered "y" whatever it asks. `--only NUMBER` makes
one input again, byte for byte, and shows what came of it.

A refusal counts only where it is a ValueError raised by Lorica itself that names something, gives a
way out, is at most 4,000 characters long and holds no control characters; at the command line it is
one message and exit status 1 or 2. Anything else is a crash.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where code of a model would be copied
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "reliability"), str(TESTS)]

import torch  # noqa: E402
import transformers  # noqa: E402
from hostile_runs import GOOD, GROWTH, normal  # noqa: E402
from hostile_subjects import Result, Subjects  # noqa: E402

_subjects: Subjects


def subjects_run(seed: int, number: int, only: str | None) -> Result:
    return _subjects.run(seed, number, only)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone")
    parser.add_argument("--subject", help="subjects whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the inputs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    began = time.monotonic()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as root:
        rare = options.subject is None or options.subject in "checkpoint"
        subjects = Subjects(Path(root), checkpoints=rare)
        numbers = range(options.inputs) if options.only is None else [options.only]
        made = functools.partial(subjects_run, options.seed, only=options.subject)
        global _subjects
        _subjects = subjects  # forked workers have it already
        with multiprocessing.get_context("fork").Pool(options.jobs) as workers:
            for result in workers.imap(made, numbers):
                number = result.number
                results.append(result)
                for found in result.outcomes:
                    if options.only is not None or found.kind not in GOOD:
                        print(
                            f"--only {number}: {result.subject}, {result.file}, {result.change}:"
                            f" {found.step}: {found.kind}: {found.text} [{found.where}]"
                            f" {found.seconds:.1f} s, {found.memory >> 20} MiB",
                            flush=True,
                        )
    table = report(results, time.monotonic() - began, options)
    print(table)
    if options.out is not None:
        options.out.write_text(table + "\n", encoding="utf-8")
    return int(any(found.kind not in GOOD for r in results for found in r.outcomes))


def report(results: list[Result], seconds: float, options: argparse.Namespace) -> str:
    """The counts, as Markdown."""
    every = [found for r in results for found in r.outcomes]
    kinds = collections.Counter(found.kind for found in every)
    worst = collections.Counter(
        "refused" if any(f.kind == "refused" for f in r.outcomes) else "success" for r in results
    )
    messages = {normal(found.text) for found in every if found.kind == "refused"}
    groups: dict[str, list[Result]] = collections.defaultdict(list)
    for r in results:
        groups[r.subject.split()[0]].append(r)
    lines = [
        f"# Hostile inputs, {datetime.date.today()}",
        "",
        f"Seed {options.seed}, torch {torch.__version__}, transformers {transformers.__version__},"
        f" Python {platform.python_version()}, {seconds:.0f} s. Made by `python"
        f" benchmarks/fuzz.py --inputs {options.inputs} --seed {options.seed} --jobs"
        f" {options.jobs}`.",
        "",
        "| input | inputs | aware of the format | read without an error | refused | distinct"
        " messages | anything else |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in sorted(groups.items()):
        refused = [r for r in group if any(f.kind == "refused" for f in r.outcomes)]
        said = {normal(f.text) for r in group for f in r.outcomes if f.kind == "refused"}
        other = sum(f.kind not in GOOD for r in group for f in r.outcomes)
        lines.append(
            f"| {name} | {len(group)} | {sum(r.aware for r in group)} | {len(group) - len(refused)}"
            f" | {len(refused)} | {len(said)} | {other} |"
        )
    peak = max(found.memory for found in every)
    sizes = sorted(len(found.text) for found in every if found.kind == "refused") or [0]
    slowest = max(found.seconds for found in every)
    lines += [
        "",
        f"- inputs: {len(results)}, of which {sum(r.aware for r in results)} know the format",
        f"- reads (several of an input): {len(every)}; without an error {kinds['success']}, refused"
        f" {kinds['refused']}",
        f"- inputs read without an error: {worst['success']}; refused by at least one reader:"
        f" {worst['refused']}",
        f"- distinct messages, numbers and names aside: {len(messages)}; characters of a message:"
        f" median {sizes[len(sizes) // 2]}, most {sizes[-1]:,}",
        f"- crashes (another error than ours, or one without its parts): {kinds['foreign']};"
        f" killed: {kinds['killed']}; hangs (by processor time): {kinds['hang']};"
        f" code run: {kinds['executed']}",
        f"- beyond {GROWTH >> 20} MiB: {kinds['memory']}; most memory that an input added:"
        f" {peak / 2**20:.0f} MiB; slowest read: {slowest:.1f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
