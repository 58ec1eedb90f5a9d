"""Kill runs at random moments, resume them, and count what differs from the run nobody killed.

    python benchmarks/kills.py --kills 20 --out build/kills

For every method that the rooms hold (and some that meet), `lorica train` and `lorica pretrain` run
as real processes and are sent SIGKILL: half of the kills at any moment, half aimed at a step, an
evaluation, the writing of a checkpoint or of the results. Each run is resumed with `--resume`,
killed again, and compared at its end with the straight run: weights, optimizer, scheduler and
random states to the bit, every line of metrics.jsonl and every figure of result.json but those of
the wall clock. The table goes to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / p) for p in ("", "conformance", "reliability")]

from killed_runs import Subjects, methods, tortured  # noqa: E402
from killing import PHASES, Count, Nursery  # noqa: E402


def table(found: dict[str, Count], seconds: float, kills: int) -> str:
    """The results as Markdown."""
    packages = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers"))
    total = Count()
    for count in found.values():
        total.add(count)
    lines = [
        f"# Kills, {datetime.date.today()}", "",
        f"`python benchmarks/kills.py --kills {kills}`; {platform.system()}, Python"
        f" {platform.python_version()}, {packages}, CPU; {seconds / 60:.0f} minutes.", "",
        "A kill is SIGKILL to a process of `lorica train` or `lorica pretrain`; survived: the run,"
        " resumed, came to its end; bytes lost: of what was complete before the kill; differences:"
        " parts of the finished run (weights, states, lines, figures) that are not the straight"
        " run's to the bit.", "",
        "| during | " + " | ".join(PHASES) + " |", "|---|" + "---:|" * len(PHASES),
        "| kills | " + " | ".join(f"{total.phases.get(p, 0):,}" for p in PHASES) + " |", "",
        "| method | kills | survived | bytes lost | differences |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for method, c in [*found.items(), ("**all**", total)]:
        shown = method if method.startswith("**") else f"`{method}`"
        lines.append(f"| {shown} | {c.kills} | {c.survived} | {c.lost} | {len(c.differences)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kills")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--results", type=Path, help="where the table goes")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    subjects = Subjects(options.out / "files").make()
    chosen = {m: i for i, m in enumerate(methods()) if not options.methods or m in options.methods}
    began, found, text = time.monotonic(), {}, ""
    with Nursery(options.out / "nursery") as nursery:
        for verb in ("train", "pretrain"):
            words = subjects.words(verb, "lora", 0)
            nursery.warm([*words, "--output-dir", options.out / f"warm-{verb}"])
        for method, place in chosen.items():
            count, refused = tortured(
                nursery, subjects, method, place, options.kills, options.out / "runs"
            )
            found[method] = count
            told = {"kills": count.kills, "survived": count.survived, "bytes lost": count.lost,
                    "differences": len(count.differences), "refused by": refused,
                    "seconds": round(time.monotonic() - began)}  # fmt: skip
            print(json.dumps({"method": method, **told}), flush=True)
            for difference in dict.fromkeys(count.differences):
                print(f"    {difference}", flush=True)
            text = table(found, time.monotonic() - began, options.kills)
            results = options.results or options.out / "kills.md"
            results.write_text(text)  # what there is, should somebody kill this
    print(text.split("| method")[0].rstrip())
    print(text.splitlines()[-1])
    return int(any(c.differences or c.lost or c.survived != c.kills for c in found.values()))


if __name__ == "__main__":
    sys.exit(main())
