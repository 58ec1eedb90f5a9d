"""What events cost: a whole training step of pre-training methods, averaged over a cycle.

    python benchmarks/schedules.py [--rounds 15] [--threads 1] [--out DIR]

A Llama 128 wide with 4 layers, vocabulary 2,048, 16 rows of 256 tokens a step, r = 32, float32,
everything trains (`llama-1m` of `lorica pretrain`). Forward and backward do not depend on where in
its cycle a run is, and the optimizer's step (schedules ride on it) does not depend on the batch. So
the former is the median over interleaved rounds, and the latter the mean over one whole cycle of
optimizer steps on small batches, each step the faster of two identical runs. The ratio is that of
the sums to the same sums of the baseline, `lora` or `full`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from optimizers import processor, rounds

import lorica
from lorica.run import model_configs

R, HORIZON = 32, 1260  # an epoch of the pre-training benchmark
SHAPE, BATCH, SMALL = "llama-1m", (16, 256), (1, 16)


@dataclass(frozen=True)
class Case:
    """A line: its method, the baseline's, how many steps a cycle has, and the target."""

    method: str
    baseline: str
    cycle: int
    target: float | None = None


CASES = (
    Case("lora", "lora", 40),
    Case("full", "full", 40),
    Case("switchlora", "lora", 80, 1.05),
    Case("switchlora(interval=10, ratio=1.0)", "lora", 80, 1.05),
    Case("switchlora+dora", "dora", 80, 1.05),
    Case("dora", "dora", 40),
    Case("relora(every=315)", "lora", 316, 1.05),
    Case("galore", "full", 200, 1.10),
    Case("galore(svd='random')", "full", 200, 1.10),
    Case("galore(spread=False)", "full", 200, 1.10),
)


class Trainee:
    """A model with its optimizer, the same each time it is made."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        self.model: Any = model_configs.build(
            model_configs.find(SHAPE).config, SHAPE, dtype=torch.float32
        )
        recipe = lorica.Recipe.parse(method, **({} if method == "full" else {"r": R}))
        if not recipe.whole:
            recipe = lorica.Recipe.parse(recipe, train_rest=True)
        self.adapters = lorica.attach(self.model, recipe, fresh=(), verbose=False)
        self.optimizer = lorica.optimizer(self.adapters, lr=1e-3, total_steps=HORIZON)

    def gradients(self, shape: tuple[int, int], seed: int = 0) -> float:
        """Forward and backward; seconds."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 2048, shape, generator=generator)
        began = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        return time.perf_counter() - began

    def large(self) -> float:
        seconds = self.gradients(BATCH)
        self.optimizer.zero_grad()
        return seconds

    def cycle(self, steps: int) -> list[float]:
        """Seconds of each optimizer step, schedules included."""
        out = []
        for step in range(steps):
            self.gradients(SMALL, seed=step)
            began = time.perf_counter()
            self.optimizer.step()
            out.append(time.perf_counter() - began)
            self.optimizer.zero_grad()
        return out


def steps_of(case: Case) -> list[float]:
    runs = [Trainee(case.method).cycle(case.cycle) for _ in range(2)]
    return [min(pair) for pair in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    passes = rounds({c.method: Trainee(c.method).large for c in CASES}, options.rounds)
    optimizer = {c.method: steps_of(c) for c in CASES}
    lines = [
        "# What events cost, averaged over a cycle",
        "",
        f"{datetime.date.today()}, {processor()}, {options.threads} thread(s), load"
        f" {os.getloadavg()[0]:.1f} at the end, torch {torch.__version__}, transformers"
        f" {transformers.__version__}. `{SHAPE}`, {BATCH[0]} x {BATCH[1]} tokens, r = {R}, a run"
        f" of {HORIZON} steps. `python benchmarks/schedules.py`",
        "",
        "| method | forward + backward ms | optimizer and events ms: mean (worst) | cycle | whole"
        " step, ratio to | | target |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = {}
    for case in CASES:
        ratio = statistics.median(
            a / b for a, b in zip(passes[case.method], passes[case.baseline], strict=True)
        )
        base = statistics.median(passes[case.baseline])
        whole[case.method] = ratio * base + statistics.mean(optimizer[case.method])
    for case in CASES:
        own = optimizer[case.method]
        reference = statistics.median(passes[case.baseline]) + statistics.mean(
            optimizer[case.baseline]
        )
        target = "" if case.target is None else f"{case.target:.2f}"
        lines.append(
            f"| `{case.method}` | {1e3 * statistics.median(passes[case.method]):.1f} |"
            f" {1e3 * statistics.mean(own):.1f} ({1e3 * max(own):.1f}) | {case.cycle} |"
            f" {case.baseline} | {whole[case.method] / reference:.3f} | {target} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"schedules-{datetime.date.today()}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
