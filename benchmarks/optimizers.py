"""What each update rule costs: of a whole training step, and alone on a large model's adapters.

    python benchmarks/optimizers.py [--rounds 15] [--threads 2] [--quick] [--out DIR]

First table: forward, backward and optimizer step of a Llama 512 wide with 4 layers, 1,024 tokens,
r = 16, float32, all linear layers; each rule on a model of its own, one step each in turn, the
order rotated from round to round; the ratio is that to `adamw` within the same round (median).
Second table: the optimizer's step alone for 24 layers 2,048 wide, as a share of the frozen step:
its FLOPs (4 a weight and token) at the rate at which this machine multiplies such matrices.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica import Recipe
from lorica.recipe import registry

TOKENS, R = 1024, 16
TARGETS = {"riemannian": 1.05, "lorarite": 1.10}  # ratio to the same step with adamw
BASELINE = "adamw"


def llama(width: int, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=width, intermediate_size=round(width * 8 / 3 / 32) * 32,
            num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=width // 64, max_position_embeddings=TOKENS,
        )
    )  # fmt: skip


def whole_step(rule: str) -> Callable[[], float]:
    """A function that trains one step and returns its seconds."""
    torch.manual_seed(0)
    model = llama(512, 4)
    adapters = lorica.attach(model, rule, r=R, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-4)
    ids = torch.randint(0, 2048, (1, TOKENS))

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def shapes(width: int) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of one block."""
    inner = round(width * 8 / 3 / 32) * 32
    return [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]


class Pairs(nn.Module):
    """The linear layers of a large model, each weight one number that stands for all."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            for m, n in shapes(width):
                layer = nn.Linear(n, m, bias=False, device="meta")
                layer.weight = nn.Parameter(torch.zeros(()).expand(m, n))
                self.layers.append(layer)


def step_alone(rule: str, width: int, layers: int) -> Callable[[], float]:
    adapters = lorica.attach(Pairs(width, layers), rule, r=R, verbose=False)
    generator = torch.Generator().manual_seed(0)
    for _, pair in adapters.pairs():
        for p in (pair.A, pair.B):
            nn.init.normal_(p, std=0.02, generator=generator)
    made = adapters.recipe.rule.make(adapters.param_groups(1e-4), {})  # type: ignore[union-attr]
    for t in adapters.trained():
        t.parameter.grad = 1e-3 * torch.randn(t.parameter.shape, generator=generator)

    def step() -> float:
        began = time.perf_counter()
        made.step()
        return time.perf_counter() - began

    return step


def multiply_rate(width: int) -> float:
    """FLOPs a second of (tokens, width) by (width, width), the best of ten."""
    x, w = torch.randn(TOKENS, width), torch.randn(width, width)
    best = min(timed(lambda: x @ w) for _ in range(10))
    return 2 * TOKENS * width * width / best


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rounds(steps: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, the order rotated; two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.disable()
    for i in range(-2, count):
        k = i % len(names)
        for name in names[k:] + names[:k]:
            taken = steps[name]()
            if i >= 0:
                seconds[name].append(taken)
    gc.enable()
    return seconds


def first_table(seconds: dict[str, list[float]]) -> Iterator[str]:
    yield "| rule | median ms | fastest ms | spread | ratio to adamw | target |"
    yield "|---|---|---|---|---|---|"
    base = seconds[BASELINE]
    for rule, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        spread = (max(taken) - min(taken)) / statistics.median(taken)
        target = f"{TARGETS[rule]:.2f}" if rule in TARGETS else ""
        yield (
            f"| {rule} | {1e3 * statistics.median(taken):.1f} | {1e3 * min(taken):.1f} |"
            f" {spread:.0%} | {ratio:.3f} (fastest {min(taken) / min(base):.3f}) | {target} |"
        )


def second_table(seconds: dict[str, list[float]], frozen: float) -> Iterator[str]:
    yield "| rule | median ms | fastest ms | share of the frozen step |"
    yield "|---|---|---|---|"
    for rule, taken in seconds.items():
        middle = statistics.median(taken)
        yield f"| {rule} | {1e3 * middle:.1f} | {1e3 * min(taken):.1f} | {middle / frozen:.2%} |"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="3 rounds, and 6 of the 24 layers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count, layers = (3, 6) if options.quick else (options.rounds, 24)
    others = [w for w in registry.names("rules") if w != BASELINE]
    rules = [BASELINE, *(w for w in others if Recipe.parse(w).delta.wraps)]

    whole = rounds({rule: whole_step(rule) for rule in rules}, count)
    alone = {r: rounds({r: step_alone(r, 2048, layers)}, count)[r] for r in rules}
    weights = layers * sum(m * n for m, n in shapes(2048))
    rate = multiply_rate(2048)
    frozen = 4 * weights * TOKENS / rate

    load = os.getloadavg()[0]
    lines = [
        "# Cost of the update rules",
        "",
        (
            f"{datetime.date.today()}, {processor()}, {options.threads} threads (load {load:.1f} at"
            f" the end), torch {torch.__version__}, transformers {transformers.__version__},"
            f" float32, r = {R}, {TOKENS} tokens, {count} rounds after 2 of"
            f" warm-up.{' A quick run: not for quoting.' if options.quick else ''}"
        ),
        "",
        "Whole step, Llama 512 wide, 4 layers, all linear layers:",
        "",
        *first_table(whole),
        "",
        (
            f"The optimizer alone, {layers} layers 2,048 wide ({weights / 1e9:.2f}e9 weights);"
            f" frozen step {frozen:.1f} s ({4 * weights * TOKENS / 1e12:.1f} TFLOP at"
            f" {rate / 1e9:.0f} GFLOP/s):"
        ),
        "",
        *second_table(alone, frozen),
        "",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"optimizers-{datetime.date.today()}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
