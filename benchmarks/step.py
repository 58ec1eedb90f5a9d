"""What a training step costs with each method, beside PEFT in the same run.

    python benchmarks/step.py [--width 512 --layers 4 --tokens 1024 --r 16] [--rounds 15] [--out
    FILE]

One step is forward and backward of a random Llama over `tokens` tokens, without the optimizer
(which `benchmarks/optimizers.py` times). The unit is the *frozen step*: the same model, every
weight frozen, gradients flowing through activations only. No low-rank method can be faster than
that plus its own small products. Runs are interleaved in rotating order, so that a change of the
machine's speed meets all of them; a round's ratio is taken against the same round's frozen step.
Bytes saved for backward are counted by torch's saved-tensor hooks, parameters aside, each storage
once.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica import rooms

Step = Callable[[], None]


def model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=2048, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step_of(net: Any, ids: torch.Tensor, *, frozen: bool = False) -> Step:
    net.train()

    def step() -> None:
        if frozen:
            # Gradients flow through activations only: the input embeddings are the leaf.
            x = net.get_input_embeddings()(ids).detach().requires_grad_(True)
            net(inputs_embeds=x, labels=ids, use_cache=False).loss.backward()
            return
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for p in net.parameters():
            p.grad = None

    return step


def candidates(options: argparse.Namespace, ids: torch.Tensor) -> dict[str, tuple[Any, Step]]:
    def net() -> LlamaForCausalLM:
        return model(options.width, options.layers)

    out: dict[str, tuple[Any, Step]] = {}
    frozen = net().requires_grad_(False)
    out["frozen"] = frozen, step_of(frozen, ids, frozen=True)

    def ours(name: str, method: str, **fields: Any) -> None:
        adapted = net()
        if "r" in lorica.Recipe.parse(method).takes:
            fields["r"] = options.r
        adapters = lorica.attach(adapted, method, verbose=False, **fields)
        stir(adapters)
        out[name] = adapted, step_of(adapted, ids)

    def peft(name: str, **fields: Any) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=options.r, lora_alpha=2 * options.r, target_modules="all-linear", **fields
        )
        adapted = get_peft_model(net(), config)
        out[name] = adapted, step_of(adapted, ids)

    ours("full", "full")
    ours("lora", "lora")
    peft("PEFT lora")
    ours("lora, dropout", "lora", lora_dropout=0.05)
    peft("PEFT lora, dropout", lora_dropout=0.05)
    ours("dora", "dora")
    peft("PEFT dora", use_dora=True)
    ours("dora, dropout", "dora", lora_dropout=0.05)
    peft("PEFT dora, dropout", use_dora=True, lora_dropout=0.05)
    for method in ("dora+olora", *others()):
        ours(method, method)
    return out


def others() -> list[str]:
    """Every further word that changes what a step computes."""
    seen = {"full", "lora", "dora", "lowrank", "add", "kaiming", "uniform", "pattern"}
    return [
        w
        for room in ("deltas", "combine", "inits", "groups")
        for w in rooms.words(room)
        if w not in seen
    ]


@torch.no_grad()
def stir(adapters: Any) -> None:
    """B away from zero: zeros can be faster."""
    for _, pair in adapters.pairs():
        pair.B.add_(torch.randn_like(pair.B) * 1e-3)


def saved_bytes(net: Any, step: Step) -> int:
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the table there as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, 2048, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    runs = candidates(options, ids)
    saved = {name: saved_bytes(*pair) for name, pair in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for step in range(-2, options.rounds):
        for i in range(len(names)):
            name = names[(i + step) % len(names)]
            began = time.perf_counter()
            runs[name][1]()
            if step >= 0:
                seconds[name].append(time.perf_counter() - began)
    table = report(options, seconds, saved)
    print(table)
    if options.out is not None:
        options.out.write_text(table + "\n")


def report(options: Any, seconds: dict[str, list[float]], saved: dict[str, int]) -> str:
    def ratio(name: str, to: str) -> list[float]:
        return sorted(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    shape = f"{options.width} wide, {options.layers} layers, {options.tokens} tokens, r={options.r}"
    lines = [
        f"# One step, {datetime.date.today()}",
        "",
        (
            f"Random Llama, {shape}, all linear layers, fp32, CPU ({options.threads} threads),"
            f" torch {torch.__version__}, Python {platform.python_version()}, {options.rounds}"
            " interleaved rounds. Made by `python benchmarks/step.py`."
        ),
        "",
        (
            "| | step / frozen, median | quartiles | fastest / fastest | step / PEFT's | saved for"
            " backward |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for name in seconds:
        r = ratio(name, "frozen")
        q = statistics.quantiles(r, n=4)
        best = min(seconds[name]) / min(seconds["frozen"])
        peer = f"PEFT {name}"
        beside = f"{statistics.median(ratio(name, peer)):.2f}" if peer in seconds else ""
        lines.append(
            f"| {name} | {statistics.median(r):.2f} | {q[0]:.2f} to {q[2]:.2f} | {best:.2f} |"
            f" {beside} | {saved[name] / 2**20:.0f} MiB |"
        )
    lines += [
        "",
        f"The frozen step took {statistics.median(seconds['frozen']) * 1e3:.0f} ms (median).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
