"""Low-rank pre-training beside full training: which loss, for how many trained parameters?

    python benchmarks/pretraining.py [--data DIR] [--work DIR] [--processes 2] [--out DIR]

Every run is one `lorica pretrain` on one thread under bfloat16 autocast: English novels, one epoch,
a Llama 128 wide with 4 layers and a vocabulary of 2,048 (`llama-1m`), 16 rows of 256 tokens a step,
rank 32 = a quarter of the width. Each method's rate is searched on a quarter of the tokens, by
factors of two until the best one has a worse neighbour on both sides; then three seeds run in full
at that rate. Last, one confirming run each of full, LoRA and SwitchLoRA (both intervals) on
`llama-4m`, of half the length.

The papers give one rate to everything. Embeddings and head then learn at the rate of the method,
which for the low-rank ones is ten times that of full training, so a part of the table holds them at
one rate for all and searches that of the targets alone.

Finished runs are kept in the work folder and are not run again, so the benchmark can be stopped and
started at any time; `--report` writes the tables and the figure from what is there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEEDS = (1, 2, 3)
ROWS, LENGTH, VOCABULARY = 16, 256, 2048
SWEEP = 4  # the rate is searched on one part in so many of the tokens
EXTENSIONS = 3  # how often a search may go on beyond its first three rates, on each side
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        name: of the line.
        method: the method's text; {fraction} of the steps in it are filled in for each length.
        rank: r, or None where the method has none.
        rate: where the search for the rate begins; None: another line's best rate is taken.
        modules: rate of embeddings, norms and head; None: the same.
        seeds: of the full runs; none: the line is a search alone.
    """

    name: str
    method: str
    rank: int | None
    rate: float | None
    rate_of: str | None = None
    alpha: float | None = None
    modules: float | None = None
    seeds: tuple[int, ...] = SEEDS
    note: str = ""


R = 32
ENTRIES = (
    Entry("full", "full", None, 4e-3),
    Entry(
        "full, muon", "full+muon", None, 4e-3,
        note="hidden matrices by Muon, the others by AdamW at the same rate",
    ),
    Entry("lora", "lora", R, 4e-3, note="B = 0 at the start, s = 2"),
    Entry("switchlora", "switchlora", R, 2e-2, note="interval 40, as in the paper"),
    Entry("galore", "galore", R, 2e-2, note="scale 0.25, a new basis every 200 steps"),
    Entry("relora", "relora", R, 1e-3, note="three restarts, no warm start"),
    Entry(
        "switchlora, as often as in the paper", "switchlora(interval=10, ratio=1.0)", R, 2e-2,
        note="about 76 swaps of each position in a full run: the shortest interval that 5 frozen"
        " steps leave, and a frequency that falls to a third over the whole run, not its tenth",
    ),
    Entry(
        "lora, SwitchLoRA's start", "init.switchlora+vectoradamw", R, 2e-2, alpha=1,
        seeds=SEEDS[:1],
        note="the same without swaps: what these are worth",
    ),
    Entry(
        "relora, warm start", "relora(warm_start={quarter})", R, None, rate_of="relora",
        seeds=SEEDS[:1],
        note="a quarter of the steps in full rank, as in the paper",
    ),
    *(
        Entry(f"full, modules at {rate:g}", "full", None, 2e-3, modules=rate, seeds=seeds,
              note=f"embeddings, norms and head at {rate:g}")
        for rate, seeds in ((1e-2, ()), (2e-2, SEEDS))
    ),
    Entry("lora, modules at 0.02", "lora", R, 2e-3, modules=2e-2, seeds=SEEDS[:1]),
    Entry(
        "switchlora, as often, modules at 0.02", "switchlora(interval=10, ratio=1.0)", R, 2e-2,
        modules=2e-2, seeds=SEEDS[:1],
    ),
)  # fmt: skip
LARGER = (
    "full, modules at 0.02",
    "lora",
    "switchlora",
    "switchlora, as often as in the paper",
)  # confirmed on llama-4m


@dataclass(frozen=True)
class Run:
    entry: Entry
    rate: float
    seed: int
    steps: int
    shape: str = "llama-1m"
    rank: int | None = None

    @property
    def method(self) -> str:
        return self.entry.method.format(quarter=self.steps // 4)

    def folder(self, work: Path) -> Path:
        name = f"{self.shape} {self.entry.name} {self.rate:g} seed{self.seed} {self.steps}"
        return work / name.replace(", ", "-").replace(" ", "_").replace("'", "")


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.train = options.data / "pretrain_train.txt.xz"
        self.valid = options.data / "pretrain_valid.txt.xz"
        self.lock = threading.Lock()

    # -- one run

    def command(self, run: Run) -> list[str]:
        rank = [] if run.entry.rank is None else ["--r", str(run.rank or run.entry.rank)]
        rank += [] if run.entry.alpha is None else ["--lora-alpha", f"{run.entry.alpha:g}"]
        own = run.entry.modules
        rank += [] if own is None else ["--modules-learning-rate", f"{own:g}"]
        return [
            sys.executable, "-m", "lorica", "pretrain", "--model-config", run.shape,
            "--data", str(self.train), "--eval-data", str(self.valid),
            "--tokenizer", str(self.tokenizer()), "--method", run.method, *rank,
            "--learning-rate", f"{run.rate:g}", "--max-length", str(LENGTH), "--bf16",
            "--per-device-train-batch-size", str(ROWS), "--max-steps", str(run.steps),
            "--seed", str(run.seed), "--save-strategy", "no", "--eval-strategy", "steps",
            "--eval-steps", str(self.cadence(run)), "--per-device-eval-batch-size", "16",
            "--output-dir", str(run.folder(self.work)), "--overwrite-output-dir", "--json",
        ]  # fmt: skip

    def cadence(self, run: Run) -> int:
        """Steps between evaluations: four in a full run, one in a search."""
        return run.steps if run.steps < self.steps() else math.ceil(run.steps / 4)

    def do(self, run: Run) -> dict[str, Any]:
        """The run's result.json; read where it is finished, else made."""
        told = run.folder(self.work) / "result.json"
        if not told.is_file():
            with open(f"{run.folder(self.work)}.err", "w", encoding="utf-8") as log:
                done = subprocess.run(
                    self.command(run), env=environment(), stdout=subprocess.DEVNULL, stderr=log,
                    check=False,
                )  # fmt: skip
            if done.returncode:
                return self.failed(run, Path(log.name))
        result = json.loads(told.read_text(encoding="utf-8"))
        with self.lock:
            print(f"{run.folder(self.work).name}: {loss_of(result):.4f}", flush=True)
        return result

    def failed(self, run: Run, log: Path) -> dict[str, Any]:
        """A run that diverged counts as infinitely bad; any other failure ends the benchmark."""
        text = log.read_text(encoding="utf-8")
        if not any(word in text for word in ("diverge", "not finite", "nan")):
            raise SystemExit(f"{' '.join(self.command(run))}\nfailed:\n{text[-2000:]}")
        print(f"{run.folder(self.work).name}: diverged", flush=True)
        return {"evaluation": {"eval_loss": math.inf}}

    def tokenizer(self) -> Path:
        """One for all runs, trained on the training text; and the number of steps of an epoch."""
        folder = self.work / "tokenizer"
        with self.lock:
            if not (folder / "tokens.json").is_file():
                from lorica.data.stream import Text
                from lorica.run.train_tokenizer import train_tokenizer

                text = Text.read([str(self.train)])
                tokenizer = train_tokenizer(text.texts(), VOCABULARY)
                tokenizer.save_pretrained(folder)
                count = len(text.ids(tokenizer).ids)
                (folder / "tokens.json").write_text(json.dumps(count))
        return folder

    def steps(self) -> int:
        """Of one epoch."""
        count = json.loads((self.tokenizer() / "tokens.json").read_text())
        return count // (ROWS * LENGTH)

    # -- what to run

    def search(self, entry: Entry) -> Iterator[list[Run]]:
        """Batches of runs until the best rate has a worse one on both sides; the last is empty."""
        assert entry.rate is not None
        tried: dict[float, float] = {}
        wanted = [entry.rate / 2, entry.rate, entry.rate * 2]
        for _ in range(1 + 2 * EXTENSIONS):
            runs = [Run(entry, rate, SEEDS[0], self.steps() // SWEEP) for rate in wanted]
            yield runs
            for run in runs:
                tried[run.rate] = loss_of(self.do(run))
            best = min(tried, key=lambda rate: tried[rate])
            wanted = [rate for rate in (best / 2, best * 2) if rate not in tried]
            if not wanted:
                return

    def tried(self, entry: Entry) -> dict[float, float]:
        """{rate: loss} of the search's runs that are finished."""
        out = {}
        rate = entry.rate or 0
        for power in range(-EXTENSIONS - 2, EXTENSIONS + 3):
            run = Run(entry, rate * 2.0**power, SEEDS[0], self.steps() // SWEEP)
            told = run.folder(self.work) / "result.json"
            if told.is_file():
                out[run.rate] = loss_of(json.loads(told.read_text(encoding="utf-8")))
        return dict(sorted(out.items()))

    def best(self, entry: Entry) -> float:
        source = next((e for e in ENTRIES if e.name == entry.rate_of), entry)
        tried = self.tried(source)
        return min(tried, key=lambda rate: tried[rate])

    def finals(self, entry: Entry) -> list[Run]:
        return [Run(entry, self.best(entry), seed, self.steps()) for seed in entry.seeds]

    def larger(self) -> list[Run]:
        """The best rates carry over between sizes, say the papers of full training and SwitchLoRA;
        the rank stays a quarter of the width."""
        return [
            Run(e, self.best(e), SEEDS[0], self.steps() // 2, "llama-4m", e.rank and 2 * e.rank)
            for e in ENTRIES
            if e.name in LARGER
        ]

    def go(self) -> None:
        self.tokenizer()
        wanted = self.options.only or [e.name for e in ENTRIES]
        entries = [e for e in ENTRIES if e.name in wanted]
        with concurrent.futures.ThreadPoolExecutor(self.options.processes) as pool:
            searches = [pool.submit(self.sweep, e) for e in entries if e.rate is not None]
            for done in concurrent.futures.as_completed(searches):
                done.result()
            if self.options.sweep:
                return
            # One seed of each line and what confirms it come first: of use whenever it is stopped.
            whole = [r for e in entries for r in self.finals(e) if len(e.seeds) == len(SEEDS)]
            once = [r for e in entries for r in self.finals(e) if len(e.seeds) < len(SEEDS)]
            first, *others = ([r for r in whole if r.seed == seed] for seed in SEEDS)
            confirming = self.larger() if set(LARGER) <= set(wanted) else []
            rest = [run for seed in others for run in seed]
            for _ in pool.map(self.do, [*first, *confirming, *rest, *once]):
                pass

    def sweep(self, entry: Entry) -> None:
        for runs in self.search(entry):
            for run in runs:
                self.do(run)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def loss_of(result: dict[str, Any]) -> float:
    return result["evaluation"]["eval_loss"]


# -- the report ------------------------------------------------------------------------------------


def report(bench: Bench, out: Path) -> None:
    """Tables (markdown) and the figure (svg) of all finished runs."""
    today = datetime.date.today().isoformat()
    finals, larger = {}, {}
    for entry in ENTRIES:
        if bench.tried(next((e for e in ENTRIES if e.name == entry.rate_of), entry)):
            finals[entry] = [r for run in bench.finals(entry) if (r := read(bench, run))]
    for run in bench.larger() if all(finals.get(e) for e in ENTRIES if e.name in LARGER) else []:
        if result := read(bench, run):
            larger[run.entry] = (run, result)
    steps = bench.steps()
    lines = [
        "# Low-rank pre-training beside full training",
        "",
        f"{today}, {platform.processor() or platform.machine()}, one thread a run, torch"
        f" {version('torch')}. `llama-1m` (128 wide, 4 layers, 1.33 M parameters), {steps} steps of"
        f" {ROWS * LENGTH:,} tokens (one epoch, {steps * ROWS * LENGTH / 1e6:.2f} M), rank {R},"
        " cosine to 0, bfloat16 autocast. Held-out loss in nats a token, of two other books.",
        "",
        f"`python benchmarks/pretraining.py`; seeds {', '.join(map(str, SEEDS))}, which draw start,"
        " order and factors.",
        "",
        "| method | rate | loss: mean (spread of the seeds) | perplexity | above full | trained |"
        " optimizer | gradients a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = [loss_of(r) for r in finals.get(ENTRIES[0], [])]
    for entry, results in finals.items():
        if results:
            lines.append(line(entry, bench.best(entry), results, base))
    lines += ["", "What is what:", ""]
    lines += [
        f"- {e.name}: `{e.method}`{'; ' + e.note if e.note else ''}" for e in finals if finals[e]
    ]
    lines += ["", f"Rates tried on a quarter of the tokens ({steps // SWEEP} steps, seed"
              f" {SEEDS[0]}), with the loss:", ""]  # fmt: skip
    for entry in ENTRIES:
        if tried := bench.tried(entry) if entry.rate else {}:
            told = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
            lines.append(f"- {entry.name}: {told}{precision(bench, entry, tried)}")
    if larger:
        lines += [
            "",
            f"`llama-4m` (256 wide, 4.2 M parameters), rank 64, the same rates, {steps // 2} steps,"
            " one seed:",
            "",
            "| method | rate | loss | perplexity | trained |",
            "|---|---|---|---|---|",
        ]
        for entry, (run, result) in larger.items():
            loss = loss_of(result)
            lines.append(
                f"| {entry.name} | {run.rate:g} | {loss:.4f} | {math.exp(loss):.2f} |"
                f" {result['trainable'] / 1e6:.2f} M |"
            )
    out.mkdir(parents=True, exist_ok=True)
    table = out / f"pretraining-{today}.md"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    figure(bench, finals, out / f"pretraining-{today}.svg")


def line(entry: Entry, rate: float, results: list[dict[str, Any]], base: list[float]) -> str:
    losses = [loss_of(r) for r in results]
    mean = statistics.mean(losses)
    above = f"{mean - statistics.mean(base):+.4f}" if base else ""
    one = results[0]
    return (
        f"| {entry.name} | {rate:g} | {mean:.4f} ({min(losses):.4f} to {max(losses):.4f},"
        f" {len(losses)} seeds) | {math.exp(mean):.2f} | {above} |"
        f" {one['trainable'] / 1e6:.2f} of {one['parameters'] / 1e6:.2f} M |"
        f" {one['optimizer_bytes'] / 2**20:.1f} MiB | {one['gradient_bytes'] / 2**20:.1f} MiB |"
    )


def precision(bench: Bench, entry: Entry, rates: Iterable[float]) -> str:
    """Says which of these searches were made without autocast."""
    runs = [Run(entry, rate, SEEDS[0], bench.steps() // SWEEP) for rate in rates]
    configs = [(run.folder(bench.work) / "config.yaml").read_text("utf-8") for run in runs]
    plain = [f"{r.rate:g}" for r, c in zip(runs, configs, strict=True) if "bf16: true" not in c]
    return f" (in float32: {', '.join(plain)})" if plain else ""


def read(bench: Bench, run: Run) -> dict[str, Any] | None:
    told = run.folder(bench.work) / "result.json"
    return json.loads(told.read_text(encoding="utf-8")) if told.is_file() else None


def figure(bench: Bench, finals: dict[Entry, list[dict[str, Any]]], path: Path) -> None:
    """Held-out loss against tokens seen, the mean of the seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for entry, results in finals.items():
        curves = [curve(run.folder(bench.work)) for run in bench.finals(entry)]
        curves = [c for c in curves if c]
        if not results or not curves:
            continue
        where = [step for step in curves[0] if all(step in c for c in curves)]
        mean = [statistics.mean(c[step] for c in curves) for step in where]
        axes.plot(
            [s * ROWS * LENGTH / 1e6 for s in where], mean, marker="o", ms=3, label=entry.name
        )
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def curve(folder: Path) -> dict[int, float]:
    """{step: held-out loss} of one run."""
    log = folder / "metrics.jsonl"
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines()) if log.is_file() else []
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared/data/text")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build/pretraining")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="lines of the table; default all")
    parser.add_argument("--sweep", action="store_true", help="search the rates and stop")
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    options = parser.parse_args()
    bench = Bench(options)
    if not options.report:
        bench.go()
    report(bench, options.out)


if __name__ == "__main__":
    main()
