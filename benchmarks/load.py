"""What attach, save, load and merge take on a Llama of about a thousand million parameters.

    python benchmarks/load.py [--layers N] [--memory 8] [--threads 1] [--r 16] [--out DIR]

The model is 2,048 wide with 32 heads, 8 of keys and values, 8,192 in the MLP, a vocabulary of
32,000 and a tied head, in bfloat16 with random weights; 16 layers of it have 1.04 thousand million
parameters. Without `--layers`, as many are taken as `--memory` (GiB) and half of what is free hold
twice: a merge makes new weights beside the old ones.

Each method runs in a child that was forked from the process which made the model, so all of them
see the same weights and none sees what another left. Its memory is the high-water mark of resident
pages since the step began, less what was resident then. The C library is told to map larger blocks
singly, so that freed tensors leave at once. From the peak of `attach` what the adapters hold is
taken off; the rest stands beside the *working set* of the largest layer, which follows from its
shape:

    olora            W and its Q and R                              mn + k(m + n)      k = min(m, n)
    pissa            W, the copy the SVD destroys, U, Vᵀ, LAPACK's workspace
                                                                    2mn + k(m + n) + 4k² + 7k
    pissa(niter=N)   W, three sketches of r + 8 vectors a side      mn + 3(r + 8)(m + n)
    dora             W                                              mn
    lora             nothing

in numbers of 4 bytes, for the weight of the layer is read in float32.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from optimizers import processor
from transformers import LlamaConfig, LlamaForCausalLM

import lorica

LAYERS, MIB, GIB = 16, 2**20, 2**30
SPARE = 1.0  # GiB beside the weights, for the interpreter and the largest step
STEPS = ("attach", "hash", "save", "load", "merge")


@dataclass(frozen=True)
class Case:
    """A line of the tables."""

    method: str
    needs: Callable[[int, int, int], int]  # (out, in, r) -> elements of the working set
    blocks: int | None = None  # transformer blocks that are adapted; None: all

    def working_set(self, adapters: Any) -> int:
        """Bytes, of the layer that needs most."""
        sites = [layer.site for _, layer in adapters]
        return max(4 * self.needs(s.out_features, s.in_features, s.r) for s in sites)


def of_qr(m: int, n: int, r: int) -> int:
    return m * n + min(m, n) * (m + n)


def of_svd(m: int, n: int, r: int) -> int:
    k = min(m, n)
    return 2 * m * n + k * (m + n) + 4 * k * k + 7 * k


def of_sketch(m: int, n: int, r: int) -> int:
    return m * n + 3 * (r + 8) * (m + n)


CASES = (
    Case("lora", lambda m, n, r: 0),
    Case("dora", lambda m, n, r: m * n),
    Case("olora", of_qr),
    Case("pissa(niter=16)", of_sketch),
    Case("pissa", of_svd, blocks=1),  # an exact SVD takes minutes a block
)

# -- the model -------------------------------------------------------------------------------------


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
        tie_word_embeddings=True,
    )  # fmt: skip


def size(layers: int) -> int:
    """Parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config(layers)).parameters())


def model(layers: int) -> Any:
    """Random weights in bfloat16, never held in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            net = LlamaForCausalLM(config(layers))
    finally:
        torch.set_default_dtype(before)
    net = net.to_empty(device="cpu")
    net.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.02, generator=generator)
    return net.requires_grad_(False).eval()


def free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def most_layers(gib: float) -> int:
    room = min(gib * GIB, free_memory() / 2) - SPARE * GIB
    fitting = [n for n in range(1, LAYERS + 1) if 2 * 2 * size(n) <= room]
    if not fitting:
        raise SystemExit(f"not one layer fits in {room / GIB:.1f} GiB; give `--layers` to insist")
    return fitting[-1]


# -- measuring, in the child -----------------------------------------------------------------------


def free_at_once() -> Any:
    """Let freed tensors leave the resident set; returns the C library."""
    libc = ctypes.CDLL("libc.so.6")
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if not libc.mallopt(option, 1 << 16):
            raise SystemExit("this C library does not say when it gives memory back")
    return libc


def pages(name: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(libc: Any, step: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the step returns; seconds, CPU seconds, and bytes above those resident before it."""
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, wall, cpu = pages("VmRSS"), time.perf_counter(), time.process_time()
    result = step()
    figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, {**figures, "peak": pages("VmHWM") - before}


def warm_up() -> None:
    """Bring in the code of the libraries and the buffers that they keep, which are no tensors."""
    square = torch.randn(1024, 1024)
    torch.linalg.qr(square.T @ square)
    small = torch.nn.Sequential(torch.nn.Linear(96, 64).bfloat16())
    for case in CASES:
        lorica.attach(small, case.method, r=4, verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            lorica.save(small, Path(folder) / "a")
            lorica.load(lorica.detach(small), Path(folder) / "a")
        lorica.detach(small)


def run(case: Case, net: Any, r: int) -> dict[str, Any]:
    """All steps of one method on a copy-on-write image of the model."""
    warm_up()
    libc, out = free_at_once(), {}
    fields: dict[str, Any] = {"r": r, "verbose": False, "fresh": ()}
    if case.blocks is not None:
        fields["layers_to_transform"] = [*range(case.blocks)]
    adapters, out["attach"] = measured(libc, lambda: lorica.attach(net, case.method, **fields))
    own = [p for _, layer in adapters for p in layer.parameters() if p is not layer.store.parameter]
    out["held"] = sum(p.numel() * p.element_size() for p in own)
    out["working set"], out["layers"] = case.working_set(adapters), len(adapters)
    del own
    _, out["hash"] = measured(libc, adapters.hash_base)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        _, out["save"] = measured(libc, lambda: lorica.save(adapters, path))
        out["file"] = sum(f.stat().st_size for f in path.iterdir())
        lorica.detach(net)
        _, out["load"] = measured(libc, lambda: lorica.load(net, path))
    _, out["merge"] = measured(libc, lambda: lorica.merge(net))
    return out


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work` in a forked child, whose memory goes with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the child failed; what it said stands above")
    return json.loads(text)


# -- the report ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, help="default: as many as fit, at most 16")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that may be used")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    layers = options.layers or most_layers(options.memory)
    net = model(layers)

    def work(case: Case) -> dict[str, Any]:
        torch.set_num_threads(options.threads)
        return run(case, net, options.r)

    figures = {}
    for case in CASES:
        figures[case.method] = in_child(lambda case=case: work(case))
        print(case.method, json.dumps(figures[case.method]), flush=True)
    text = report(options, layers, figures)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"load-{datetime.date.today()}.md").write_text(text, encoding="utf-8")


def report(options: Any, layers: int, figures: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"# Attach, save, load and merge, {datetime.date.today()}",
        "",
        (
            f"Random Llama, 2048 wide, {layers} of {LAYERS} layers, {size(layers) / 1e9:.2f}e9"
            f" parameters in bfloat16, r = {options.r}, all linear layers of its blocks."
            f" {processor()}, {options.threads} thread(s) on {os.cpu_count()} cores, load"
            f" {os.getloadavg()[0]:.1f} at the end, torch {torch.__version__}, transformers"
            f" {transformers.__version__}. `python benchmarks/load.py --layers {layers} --threads"
            f" {options.threads} --r {options.r}`"
        ),
        "",
        (
            "Seconds on the clock, and of the processor (user and system) in brackets. `hash`: of"
            " the base, which is in `load` once more, and would be in the first `save`."
        ),
        "",
        "| method | adapted layers | " + " | ".join(STEPS) + " | folder, MiB |",
        "|---|---|" + "---|" * (len(STEPS) + 1),
    ]
    for case in CASES:
        own = figures[case.method]
        cells = [f"{own[s]['wall']:.1f} ({own[s]['cpu']:.1f})" for s in STEPS]
        lines.append(
            f"| `{case.method}` | {own['layers']} | {' | '.join(cells)} | {own['file'] / MIB:.1f} |"
        )
    lines += ["", *estimates(layers, figures), ""]
    lines += [
        "Memory in MiB, above what was resident when the step began.",
        "",
        (
            "| method | adapters | peak of attach, without them | working set of the largest layer"
            " | peak / working set | peak of hash | save | load | merge |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        own = figures[case.method]
        peak, bound = own["attach"]["peak"] - own["held"], own["working set"]
        ratio = f"{peak / bound:.2f}" if bound else ""
        rest = " | ".join(f"{own[s]['peak'] / MIB:.0f}" for s in STEPS[1:])
        lines.append(
            f"| `{case.method}` | {own['held'] / MIB:.1f} | {peak / MIB:.1f} | {bound / MIB:.1f} |"
            f" {ratio} | {rest} |"
        )
    return "\n".join(lines) + "\n"


def estimates(layers: int, figures: dict[str, dict[str, Any]]) -> list[str]:
    """What all blocks would take, where only some were adapted."""
    out = []
    for case in CASES:
        if case.blocks is None or case.blocks >= layers:
            continue
        own = figures[case.method]
        each = own["attach"]["cpu"] / own["layers"]
        whole = each * own["layers"] / case.blocks * layers
        out.append(
            f"`{case.method}` was attached to {case.blocks} of {layers} blocks: {each:.1f} CPU"
            f" seconds a layer, so {whole:.0f} for all of them (an estimate, not a measurement)."
        )
    return out


if __name__ == "__main__":
    main()
