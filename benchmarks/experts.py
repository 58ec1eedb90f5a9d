"""What the updates of expert tensors cost: a step over the same step of the frozen experts.

    python benchmarks/experts.py [--rounds 30] [--threads 1] [--out DIR]

One block of 8 experts, 512 -> 1,376 -> 512 (gate and up together), 2 of them for each of 256
tokens, so 64 rows an expert, r = 16, float32. A step is forward, and backward to the input and to
what trains. The cases take turns in every round, each is divided by the frozen step of its own
round, and the medians are given with their quartiles. PEFT's LoRA on the same tensors
(`target_parameters`) is beside. The floor counts multiplies: r (in + out) for each routed row in
forward, twice that in backward.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from optimizers import processor, rounds
from saved import saved_bytes
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lorica

EXPERTS, ACTIVE, TOKENS, WIDE, INNER, R = 8, 2, 256, 512, 1376, 16
TARGET = 1.2


class Block(nn.Module):
    """The experts alone, routed evenly, always the same way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=WIDE, moe_intermediate_size=INNER, num_experts=EXPERTS,
            num_experts_per_tok=ACTIVE,
        )  # fmt: skip
        config._experts_implementation = way
        torch.manual_seed(0)
        self.experts = Qwen3MoeExperts(config)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.02)
            p.requires_grad_(False)
        first = torch.arange(TOKENS) % EXPERTS
        self.index = torch.stack([first, (first + 3) % EXPERTS], 1)
        self.weights = torch.full((TOKENS, ACTIVE), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.weights)


def frozen(way: str) -> nn.Module:
    return Block(way)


def ours(method: str) -> Callable[[str], nn.Module]:
    def make(way: str) -> nn.Module:
        model = Block(way)
        lorica.attach(
            model, method, r=R, target_modules=(), verbose=False,
            target_parameters=("gate_up_proj", "down_proj"),
        )  # fmt: skip
        return model

    return make


def pefts(way: str) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    return peft.get_peft_model(Block(way), config)


CASES: dict[str, Callable[[str], nn.Module]] = {
    "frozen": frozen, "lora": ours("lora"), "dora": ours("dora"), "olora": ours("olora"),
    "PEFT LoRA": pefts,
}  # fmt: skip


def step(model: nn.Module, x: Tensor, upstream: Tensor) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    model(x).backward(upstream)
    seconds = time.perf_counter() - start
    for p in (x, *model.parameters()):
        p.grad = None
    return seconds


def floor() -> float:
    """Multiplies of the LoRA step over those of the frozen one."""
    pairs = ((WIDE, 2 * INNER), (INNER, WIDE))
    rest = sum(2 * a * b for a, b in pairs)  # forward, and backward to the input
    own = sum(3 * R * (a + b) for a, b in pairs)  # that of the factors has their products too
    return 1 + own / rest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    torch.manual_seed(1)
    x = torch.randn(TOKENS, WIDE, requires_grad=True)
    upstream = torch.randn(TOKENS, WIDE)
    lines: list[str] = []
    for way in ("grouped_mm", "eager"):
        models = {name: make(way) for name, make in CASES.items()}
        steps = {name: partial(step, model, x, upstream) for name, model in models.items()}
        times = rounds(steps, options.rounds)
        for name, model in models.items():
            ratios = sorted(a / b for a, b in zip(times[name], times["frozen"], strict=True))
            low, _, high = statistics.quantiles(ratios, n=4)
            seconds = statistics.median(times[name])
            kept = saved_bytes(partial(model, x), model.parameters())
            lines.append(
                f"| {way} | {name} | {statistics.median(ratios):.3f} ({low:.2f} to {high:.2f}) |"
                f" {seconds * 1e3:.0f} ms | {kept / 2**20:.1f} MiB |"
            )
            print(lines[-1], flush=True)
    today = datetime.date.today().isoformat()
    table = [
        "# Updates of expert tensors", "",
        f"{today}, {processor()}, torch {torch.__version__}, {options.threads} thread(s),"
        f" {options.rounds} rounds. {EXPERTS} experts of {WIDE} -> {INNER}, {ACTIVE} active,"
        f" {TOKENS} tokens, r = {R}, float32; forward and backward.", "",
        f"`python benchmarks/experts.py`. The floor by multiplies is {floor():.3f}; the target is"
        f" {TARGET}.", "",
        "| experts_implementation | method | step over frozen: median (quartiles) | step |"
        " saved for backward |",
        "|---|---|---|---|---|",
        *lines,
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"experts-{today}.md"
    path.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
