"""Every published method on the embedded model: what it learns in as many steps as LoRA.

    python benchmarks/methods.py [--work DIR] [--processes 1] [--only WORD ...] [--out DIR]

Each run is one `lorica train` on the embedded model and its five new tasks, on one thread; the
commands are below the table. A method's rate is searched with the first seed, by factors of two
until the best one has a worse neighbour on both sides; the other seeds run at that rate. A gain is
the held-out loss of the untouched model minus that of the trained one.

The lines are found by walking the declarations: each word with a paper that is no part of another
word of the same paper. PC-LoRA takes the frozen weights away, so it is compared with what its
description names: the same training of a truncated singular value decomposition, of equal size.

Finished runs are kept in the work folder and are not run again, so the benchmark can be stopped and
started at any time; `--report` writes the tables from what is there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEEDS = (1, 2, 3)
STEPS, ROWS = 120, 16
START = 4e-3  # of a search, unless the line says otherwise
MOST = 14  # rates a search may try
HERE = Path(__file__).resolve().parent
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        method: the method's text.
        r: rank, where the word's own default is not for a model 128 wide.
        rate: where the search begins.
        beside: the line whose gain is the measure.
        note: said below the table.
    """

    method: str
    r: int | None = None
    rate: float = START
    beside: str = "lora"
    note: str = ""

    def name(self) -> str:
        """For files."""
        kept = (c if c.isalnum() or c in "+.=" else "_" for c in self.method)
        return "".join(kept) + ("" if self.r is None else f"_r{self.r}")


# What the declarations cannot say: ranks for this width, and lines that are combinations of words.
# The truncated start is PC-LoRA whose fade is over after one step, in which the rate is still 0.
TRUNCATED = f"pclora(fade={1 / STEPS:.4f})+pissa"
WIDE = "r = 16 as LoRA has; its own default is this model's width"
SPECIAL = (
    Entry("full", rate=2e-3),
    Entry("galore", r=16, rate=8e-3, note=WIDE),
    Entry("switchlora", r=16, rate=1.6e-2, note=WIDE),
    Entry("tt", rate=1.6e-2),
    Entry("loraplus", rate=1e-3),
    Entry("xgblora", rate=3.2e-2),
    Entry("mora+relora", note="MoRA with its paper's merges and restarts"),
    Entry("pclora", r=32, rate=1.6e-2, beside=TRUNCATED, note="r = 32: see the final size above"),
    Entry("pclora+pissa", r=32, beside=TRUNCATED, note="the residual of W's best r ranks fades"),
    Entry(
        TRUNCATED, r=32, beside=TRUNCATED,
        note="the baseline of both: W's best r ranks, λ = 0 from the second step on (in the first,"
        " of the warm-up, the rate is 0), the same objective",
    ),
)  # fmt: skip
PLAIN = "lora"


def entries() -> list[Entry]:
    """LoRA first, then every other system by axis, then the lines that only this file names."""
    from lorica.cli.methods import describe

    rows = {row["word"]: row for row in describe()}
    parts = {
        (row["arxiv"], plain(text))
        for row in rows.values()
        for text in row["preset"].values()
        if plain(text) != row["word"]
    }
    found = [
        word
        for word, row in rows.items()
        if row["arxiv"] and not row["default"] and (row["arxiv"], word) not in parts
    ]
    named = {entry.method: entry for entry in SPECIAL}
    lines = [named.pop(word, None) or Entry(word) for word in [PLAIN, *found]]
    return lines + list(named.values())


def plain(text: str) -> str:
    """`svd(ratio=1.5)` and `scale.tt` without what stands around the word."""
    return text.split("(")[0].split(".")[-1]


# -- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    entry: Entry
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.entry.name()}-{self.rate:g}-seed{self.seed}"

    def words(self, folder: Path | str) -> list[str]:
        """What stands after `lorica`."""
        rank = [] if self.entry.r is None else ["--r", str(self.entry.r)]
        return [
            "train", "--method", self.entry.method, *rank, "--learning-rate", f"{self.rate:g}",
            "--max-steps", str(STEPS), "--per-device-train-batch-size", str(ROWS),
            "--seed", str(self.seed), "--save-strategy", "no", "--eval-steps", str(STEPS),
            "--output-dir", str(folder),
        ]  # fmt: skip


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        known = entries()
        only = set(options.only or [])
        if unknown := only - {entry.method for entry in known}:
            raise SystemExit(f"no line {', '.join(sorted(unknown))}; there are"
                             f" {', '.join(entry.method for entry in known)}")  # fmt: skip
        self.entries = [entry for entry in known if not only or entry.method in only]

    def do(self, run: Run) -> dict[str, Any]:
        """What is kept of a run; read where it is finished, else made."""
        kept = self.work / f"{run.name}.json"
        if not kept.is_file():
            words = [*run.words(self.work / run.name), "--overwrite-output-dir"]
            status, seconds = apart(words, self.work / f"{run.name}.log")
            told: dict[str, Any] = {"seconds": seconds, "loss": None}
            if status == 0:
                result = json.loads((self.work / run.name / "result.json").read_text("utf-8"))
                told |= {"loss": result["evaluation"]["eval_loss"], "trained": result["trainable"]}
            else:
                self.diverged(run)
            kept.write_text(json.dumps(told), encoding="utf-8")
            print(f"{run.name}: {loss_of(told):.4f}, {seconds:.1f} s", flush=True)
        return json.loads(kept.read_text(encoding="utf-8"))

    def diverged(self, run: Run) -> None:
        """A run that diverged counts as infinitely bad; any other failure ends the line."""
        text = (self.work / f"{run.name}.log").read_text(encoding="utf-8")
        if not any(word in text for word in ("diverge", "not finite", "no number")):
            raise RuntimeError(f"lorica {shlex.join(run.words('OUT'))}\nfailed:\n{text[-1500:]}")

    def asked(self, run: Run) -> dict[str, Any]:
        """What the files of a finished run answer on the same rows."""
        folder = self.work / run.name
        kept = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
        return self.measured(f"{run.name}.eval", [f"--{kept[0].name}", str(kept[0])])

    def measured(self, name: str, words: list[str]) -> dict[str, Any]:
        """What `lorica eval` says of the held-out rows."""
        kept = self.work / f"{name}.json"
        if not kept.is_file():
            words = ["eval", *words, "--exact-match", "--max-new-tokens", "20", "--json",
                     "--per-device-eval-batch-size", "50"]  # fmt: skip
            log = self.work / f"{name}.log"
            status, _ = apart(words, log, kept)
            if status:
                kept.unlink()
                raise RuntimeError(
                    f"lorica {shlex.join(words)}\nfailed:\n{log.read_text()[-1500:]}"
                )
        return json.loads(kept.read_text(encoding="utf-8"))

    # -- what to run

    def line(self, entry: Entry) -> None:
        """All runs of a line."""
        tried = search(entry.rate, lambda rate: loss_of(self.do(Run(entry, rate, SEEDS[0]))))
        for seed in SEEDS:
            run = Run(entry, best(tried), seed)
            self.do(run)
            self.asked(run)

    def tried(self, entry: Entry) -> dict[float, float]:
        """{rate: loss} of the search's finished runs."""
        found = {}
        for power in range(-30, 31):
            run = Run(entry, entry.rate * 2.0**power, SEEDS[0])
            if told := self.shorten(run):
                found[run.rate] = loss_of(told)
        return found

    def shorten(self, run: Run, suffix: str = "") -> dict[str, Any] | None:
        kept = self.work / f"{run.name}{suffix}.json"
        return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None

    def go(self) -> None:
        load_everything()
        self.measured("untouched", [])
        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(self.options.processes, fork) as pool:
            lines = {pool.submit(self.line, entry): entry for entry in self.entries}
            for done in concurrent.futures.as_completed(lines):
                if error := done.exception():
                    print(f"{lines[done].method}: {error}", file=sys.stderr, flush=True)


def search(start: float, loss: Callable[[float], float]) -> dict[float, float]:
    """{rate: loss}; half and twice the best rate are among them, unless `MOST` rates are."""
    tried: dict[float, float] = {}
    middle = start
    while len(tried) < MOST:
        for rate in (middle, middle / 2, middle * 2):
            if rate not in tried:
                tried[rate] = loss(rate)
        if best(tried) == middle:
            break
        middle = best(tried)
    return dict(sorted(tried.items()))


def best(tried: dict[float, float]) -> float:
    return min(tried, key=lambda rate: tried[rate])


def loss_of(told: dict[str, Any]) -> float:
    return math.inf if told["loss"] is None else told["loss"]


def apart(words: list[str], log: Path, out: Path | None = None) -> tuple[int, float]:
    """`lorica WORDS` in a child that has everything imported: its exit status and CPU seconds."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(words, log, out, writer)
    )
    child.start()
    writer.close()
    try:
        seconds = reader.recv()
    except EOFError:
        seconds = math.nan
    child.join()
    return child.exitcode or 0, seconds


def _child(words: list[str], log: Path, out: Path | None, writer: Any) -> None:
    for number, path in ((1, out or log), (2, log)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC * (number == 1)))
        os.dup2(file, number)
    from lorica.cli import main

    began = time.process_time()
    status = main(words)
    writer.send(time.process_time() - began)
    sys.exit(status)


def load_everything() -> None:
    """Imports take ten times as long as a short run's start, so they come before the forks."""
    import datasets  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    import lorica.formats
    import lorica.run.finetune
    import lorica.run.trainer  # noqa: F401

    torch.set_num_threads(1)


# -- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The finished seeds of an entry, at its best rate."""

    entry: Entry
    rate: float
    runs: list[dict[str, Any]]
    exact: list[float]
    reread: float  # largest difference between a run's loss and that of its files, read again

    @classmethod
    def of(cls, bench: Bench, entry: Entry) -> Line | None:
        tried = bench.tried(entry)
        wanted = [Run(entry, best(tried), seed) for seed in SEEDS] if tried else []
        runs = [bench.shorten(run) for run in wanted]
        asked = [bench.shorten(run, ".eval") for run in wanted]
        if not wanted or None in runs or None in asked:
            return None
        metrics = [told["metrics"] for told in asked if told]
        apart = [abs(m["loss"] - loss_of(r)) for m, r in zip(metrics, runs, strict=True) if r]
        return cls(
            entry, best(tried), [run for run in runs if run],
            [m["exact_match"] for m in metrics], max(apart),
        )  # fmt: skip

    @property
    def losses(self) -> list[float]:
        return [loss_of(run) for run in self.runs]

    @property
    def seconds(self) -> float:
        return statistics.median(run["seconds"] for run in self.runs)


def report(bench: Bench, out: Path) -> None:
    lines = {e.method: line for e in bench.entries if (line := Line.of(bench, e))}
    before = bench.measured("untouched", [])["metrics"]
    base = lines.get(PLAIN)
    if base is None:
        raise SystemExit(f"`{PLAIN}` is not finished, and the others are compared with it")

    def shares(line: Line) -> tuple[float, float] | None:
        """Of the gains of the line that it stands beside: by loss, and by exact match."""
        other = lines.get(line.entry.beside)
        if other is None:
            return None
        gains = [before["loss"] - statistics.mean(one.losses) for one in (line, other)]
        answers = [statistics.mean(one.exact) - before["exact_match"] for one in (line, other)]
        return gains[0] / gains[1], answers[0] / answers[1]

    today = datetime.date.today().isoformat()
    text = [
        "# Every method on the embedded model, as many steps as LoRA",
        "",
        f"{today}, {platform.processor() or platform.machine()}, one thread a run, torch"
        f" {version('torch')}, transformers {version('transformers')}."
        f" {STEPS} steps of {ROWS} examples of the five new tasks, cosine to 0 after 3 % warm-up;"
        " every linear layer but the head. All else, rank included, is the method's own default"
        " unless said below.",
        "",
        f"The untouched model has a held-out loss of {before['loss']:.3f} nats a token and"
        f" {100 * before['exact_match']:.1f} % exact match (200 rows). It has never seen the five"
        " tasks and is wrong with confidence, so half of LoRA's gain in loss is soon reached; the"
        " share of its exact match says more.",
        "",
        f"`python benchmarks/methods.py`; mean (least to most) of the seeds"
        f" {', '.join(map(str, SEEDS))}, which draw start, order and factors. CPU time is that of"
        " a whole run, on a machine with other work, beside LoRA's.",
        "",
        "| method | rate | trained | held-out loss | share of LoRA's gain | exact match % |"
        " share | CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    faded = [line for line in lines.values() if line.entry.beside != PLAIN]
    low, other = [], []
    for method, line in lines.items():
        found = shares(line)
        row = (
            f"| `{method}` | {line.rate:g} | {line.runs[0]['trained']:,} | {spread(line.losses, 3)}"
            f" | {{}} | {spread([100 * e for e in line.exact], 1)} | {{}} |"
            f" {line.seconds / base.seconds:.2f} |"
        )
        told = ("", "") if found is None else (f"{found[0]:.3f}", f"{found[1]:.2f}")
        if line.entry.beside == PLAIN:
            text.append(row.format(*told))
        else:
            other.append(row.format(*told))
        if found and min(found) < 0.5:
            low.append(f"`{method}` ({found[0]:.3f} by loss, {found[1]:.2f} by exact match)")
    text += ["", f"Below half of it by either measure: {', '.join(low) or 'none'}."]
    if faded:
        text += [
            "",
            "PC-LoRA takes W away while it learns. Shares of what the same training gains at the"
            " same final size from W's truncated singular value decomposition. The layers end with"
            f" {size(bench, faded[0])} of the weights that they had:",
            "",
            "| method | rate | trained | held-out loss | share of the gain | exact match % |"
            " share | CPU time |",
            "|---|---|---|---|---|---|---|---|",
            *other,
        ]
    reread = max(line.reread for line in lines.values())
    text += ["", "`lorica eval` on what the runs have written finds the same losses; they differ by"
             f" {reread:.1e} at most.", ""]  # fmt: skip
    if missing := [f"`{e.method}`" for e in bench.entries if e.method not in lines]:
        text += [f"Not finished: {', '.join(missing)}.", ""]
    text += [f"- `{m}`: {line.entry.note}" for m, line in lines.items() if line.entry.note]
    text += ["", f"Rates tried (seed {SEEDS[0]}), with the held-out loss:", ""]
    for entry in bench.entries:
        if tried := bench.tried(entry):
            told = ", ".join(f"{rate:g}: {shown(loss)}" for rate, loss in tried.items())
            middle = best(tried)
            ended = {middle / 2, middle * 2} <= set(tried)
            text.append(f"- `{entry.method}`: {told}{'' if ended else '; not ended'}")
    text += ["", "Commands, of the first seed:", "", "```bash"]
    for line in lines.values():
        run = Run(line.entry, line.rate, SEEDS[0])
        text.append(f"lorica {shlex.join(run.words('RUN'))}")
    text += ["lorica eval --adapter RUN/adapter --exact-match  # or --model RUN/model", "```"]
    out.mkdir(parents=True, exist_ok=True)
    table = out / f"methods-{today}.md"
    table.write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def size(bench: Bench, line: Line) -> str:
    """Trained weights, and those of the layers that they replace."""
    run = Run(line.entry, line.rate, SEEDS[0])
    result = json.loads((bench.work / run.name / "result.json").read_text(encoding="utf-8"))
    kinds = {kind: told["count"] for kind, told in result["summary"]["layers"].items()}
    dense = sum(math.prod(map(int, kind.split(" x "))) * n for kind, n in kinds.items())
    return f"{result['trainable']:,} of {dense:,}"


def spread(values: Iterable[float], digits: int) -> str:
    values = list(values)
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def shown(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def main() -> None:
    os.environ.update(THREADS)  # before torch is imported
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=HERE.parent / "build/methods")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="*", metavar="METHOD", help="lines of the table")
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    options = parser.parse_args()
    bench = Bench(options)
    if not options.report:
        bench.go()
    report(bench, options.out)


if __name__ == "__main__":
    main()
