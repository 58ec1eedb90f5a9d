"""What a training step costs on a quantised base, beside PEFT in the same run.

    python benchmarks/quantised.py [--rounds 9] [--threads 2] [--formats nf4 int8] [--out DIR]
    python benchmarks/quantised.py --memory

A random Llama, 512 wide, 4 layers, 1,024 tokens, r = 16, all linear layers adapted, float32, as in
`benchmarks/step.py`, its inner width a multiple of 64. The unit is the *frozen step* on the same
quantised base: forward and backward with every weight frozen, gradients flowing through activations
only. Runs are interleaved in rotating order, and a round's ratio is taken against the same round's
frozen step. `processor time` is the same ratio of the time that the process computed, which other
programs on the machine disturb less (with one thread). `noise` is a second copy of the frozen step
in the same rounds: its ratio should be 1.

Bytes saved for backward are counted by torch's hooks on saved tensors, parameters and packed
weights aside, each storage once; `dense` is the same method on a dense base. `unpacked` counts how
often a step makes a packed weight's values apart from the format's own product, over the number of
packed weights: the frozen step does so once, for the gradient of the input.

`--memory` measures what attaching, saving and merging need at their peak, on a model with the
proportions of a 7B one: 2,048 wide, 12 layers, nf4.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from saved import saved_bytes
from step import Part, status
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import lorica
from lorica.model.quantised import quantised
from lorica.model.summary import human

SHAPE = Part(512, 4, 1024)
BLOCK = 64  # of bitsandbytes, which on a CPU multiplies with whole blocks alone
FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def loaded(folder: Path, fields: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Any:
    how = {} if fields is None else {"quantization_config": BitsAndBytesConfig(**fields)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)
    return model.requires_grad_(False).train()


def frozen(model: Any) -> Any:
    model.get_input_embeddings().register_forward_hook(lambda m, i, y: y.requires_grad_())
    return model


def ours(method: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        adapters = lorica.attach(model, method, r=16, verbose=False)
        for layer in adapters.layers.values():
            torch.nn.init.normal_(layer.update.delta.B, std=0.01)
        return model

    return make


def peers(**fields: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        import peft

        names = [n for n, _ in model.named_modules() if n.endswith("_proj")]
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=names, **fields)
        out = peft.get_peft_model(model, config).train()
        for name, p in out.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.01)
        return out

    return make


SYSTEMS: dict[str, Callable[[Any], Any]] = {
    "frozen": frozen, "noise": frozen, "lora": ours("lora"), "PEFT lora": peers(),
    "dora": ours("dora"), "PEFT dora": peers(use_dora=True),
}  # fmt: skip


def step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model(**batch)["loss"].backward()
    model.zero_grad(set_to_none=True)


def kept(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes saved for backward in one step; what the model holds anyway is left out."""
    held = [*model.parameters(), *model.buffers()]
    held += [t for store in quantised(model).values() for t in store.stored().values()]
    return saved_bytes(lambda: model(**batch)["loss"], held)


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """How often 4-bit values are made within, by anybody."""
    import bitsandbytes as bnb

    count, original = [0], bnb.functional.dequantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    bnb.functional.dequantize_4bit = counted
    try:
        yield count
    finally:
        bnb.functional.dequantize_4bit = original


def quartiles(mine: list[float], frozen: list[float]) -> str:
    ratios = [t / f for t, f in zip(mine, frozen, strict=True)]
    low, mid, high = statistics.quantiles(ratios, n=4)
    return f"{mid:.3f} ({low:.3f} to {high:.3f})"


def table(folder: Path, name: str, rounds: int) -> list[str]:
    batch = SHAPE.batch(0)
    made = {n: make(loaded(folder, FORMATS[name])) for n, make in SYSTEMS.items()}
    packed = len(quantised(made["frozen"]))
    fails: dict[str, str] = {}
    for n, model in made.items():
        try:
            for _ in range(3):  # PEFT's int8 fails at its second step
                step(model, batch)
        except (AttributeError, RuntimeError) as error:
            fails[n] = str(error).splitlines()[0]
    made = {n: model for n, model in made.items() if n not in fails}
    times: dict[str, list[float]] = {n: [] for n in made}
    busy: dict[str, list[float]] = {n: [] for n in made}
    order = list(made)
    for i in range(rounds):
        for n in order[i % len(order) :] + order[: i % len(order)]:
            began, worked = time.perf_counter(), time.process_time()
            step(made[n], batch)
            times[n].append(time.perf_counter() - began)
            busy[n].append(time.process_time() - worked)
    first = statistics.median(times["frozen"]) * 1000
    lines = [
        f"## {name}", "", f"The frozen step took {first:.0f} ms (median).", "",
        "| | step / frozen: median (quartiles) | processor time | saved MiB | dense | unpacked |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for n, model in made.items():
        work = quartiles(busy[n], busy["frozen"])
        with counting() as count:
            step(model, batch)
        dense = kept(SYSTEMS[n](loaded(folder, None)), batch) / 2**20
        unpacked = f"{count[0] / packed:.2f}" if "4bit" in str(FORMATS[name]) else ""
        lines.append(
            f"| {n} | {quartiles(times[n], times['frozen'])} | {work} |"
            f" {kept(model, batch) / 2**20:.0f} | {dense:.0f} | {unpacked} |"
        )
    lines += [f"\n{n} fails here: `{why}`" for n, why in fails.items()]
    return [*lines, ""]


def memory(out: Path) -> list[str]:
    """Resident memory: what is held, and what attaching, saving and merging add at their peak."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
    with tempfile.TemporaryDirectory(dir=out) as place:
        folder = Path(place)
        made = dense(2048, 12, 5504).to(torch.bfloat16)
        layer = max(p.numel() for n, p in made.named_parameters() if "proj" in n)
        made.save_pretrained(folder / "dense")
        whole = sum(p.nbytes for p in made.parameters())
        del made
        model = loaded(folder / "dense", FORMATS["nf4, double"], torch.bfloat16)
        held = sum(
            sum(t.nbytes for t in store.stored().values()) for store in quantised(model).values()
        )
        lines = [
            f"Dense in bfloat16 {human(whole)}, packed weights {human(held)}, the values of the"
            f" largest layer in float32 {human(4 * layer)}.", "",
            "| | added at the peak | in layers |", "|---|---|---|",
        ]  # fmt: skip

        def measured(name: str, what: Callable[[], Any]) -> None:
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            before = status("VmRSS")
            what()
            peak = status("VmHWM") - before
            lines.append(f"| {name} | {human(peak)} | {peak / (4 * layer):.1f} |")

        measured("attach `lora`", lambda: lorica.attach(model, "lora", r=16, verbose=False))
        measured("save", lambda: lorica.save(model, folder / "a"))
        lorica.detach(model)
        measured("attach `dora`", lambda: lorica.attach(model, "dora", r=16, verbose=False))
        measured("save", lambda: lorica.save(model, folder / "b"))
        measured("merge, into a dense model", lambda: lorica.merge(model))
    return [*lines, ""]


def dense(width: int, layers: int, inner: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner // BLOCK * BLOCK, num_hidden_layers=layers,
        num_attention_heads=max(8, width // 64), num_key_value_heads=max(8, width // 64),
        vocab_size=2048, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=["nf4", "int8"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    import bitsandbytes

    today = datetime.date.today().isoformat()
    lines = [
        "# A training step on a quantised base", "",
        f"{today}, {given.threads} thread(s), torch {torch.__version__}, bitsandbytes"
        f" {bitsandbytes.__version__}, {given.rounds} interleaved rounds, load"
        f" {os.getloadavg()[0]:.1f} at the start. {SHAPE}.", "",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        dense(512, 4, 1360).save_pretrained(place)
        for name in () if given.memory else given.formats:
            lines += table(Path(place), name, given.rounds)
    if given.memory:
        lines += ["## Memory", "", *memory(given.out)]
    lines.append(f"Load at the end: {os.getloadavg()[0]:.1f}.")
    text = "\n".join(lines) + "\n"
    kind = "-memory" if given.memory else ""
    (given.out / f"quantised{kind}-{today}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
