"""What a training step costs with each method, beside PEFT in the same run.

    python benchmarks/step.py [PART ...] [--rounds 15] [--threads 2] [--only NAME ...] [--out DIR]

Parts (default: all but `gpu`), each a random Llama with all linear layers adapted:

    systems   512 wide, 4 layers, 1,024 tokens, r = 16, float32: every published method
    wide      1,024 wide, 8 layers, 2,048 tokens, r = 16: LoRA and DoRA, with and without dropout
    ranks     the first shape at r = 8 and r = 64: LoRA and DoRA
    half      the same under bfloat16 autocast
    gpu       2,048 wide, 16 layers (1.0 B parameters), 4 rows of 2,048 tokens, bfloat16, on a GPU

One step is forward and backward over one batch, without the optimizer. The unit is the *frozen
step*: the same model, every weight frozen, gradients flowing through activations only. No low-rank
method can be faster than that plus its own small products: `products` is the number of multiplies
in the matrix products of a step, attention's among them, as counted in one, over the frozen step's.
`floor` is what the step should take: the frozen step's time, and for all that the method counts
beyond it the rate at which this machine does such work, in the same run, right after a large
product, which leaves as little in the caches as a step's products do. Four things are counted:
multiplies of products whose smallest side is at least 64, of thinner ones (less is made of each
number loaded, and a second thread helps less), bytes that everything else reads and writes, and
random numbers drawn.
Runs are interleaved in rotating order, so that a change of the machine's speed meets all of them; a
round's ratio is taken against the same round's frozen step, or PEFT's.

Bytes saved for backward are counted by torch's hooks on saved tensors, parameters aside, each
storage once. Peak memory is what a step adds at most to what the process holds between steps. The
optimizer's step, schedules and their events included, is the mean over a run of 60 steps, as a
share of the frozen step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from optimizers import processor
from saved import saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.methods.optional import StartsFromData, StartsFromUnquantised
from lorica.recipe import registry

RUN = 60  # steps over which the optimizer's step is averaged
THIN = 64  # a product with a side below this is a thin one
LINE = 64  # bytes of a cache line
COLD = 2**28  # bytes that no cache holds
AXES = ("combine", "scales", "inits", "deltas", "ranks", "groups", "optim", "objectives",
         "schedules")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One table: a shape, and what is compared at it.

    Attributes:
        rows: of so many tokens, in a batch; a GPU needs several to be busy.
        ranks: a row of each method for every one.
        systems: every published method, not only LoRA and DoRA.
    """

    width: int
    layers: int
    tokens: int
    ranks: tuple[int, ...] = (16,)
    systems: bool = False
    dropout: bool = True
    autocast: bool = False
    device: str = "cpu"
    rows: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.width, intermediate_size=self.width * 8 // 3 // 8 * 8,
            num_hidden_layers=self.layers, num_attention_heads=max(8, self.width // 64),
            num_key_value_heads=max(8, self.width // 64), vocab_size=2048,
            max_position_embeddings=4096,
        )  # fmt: skip
        with torch.device(self.device):
            model: Any = LlamaForCausalLM(config)
        return model.to(self.dtype)

    def batch(self, seed: int) -> dict[str, torch.Tensor]:
        """Random tokens, their own labels."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 2048, (self.rows, self.tokens), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}

    def __str__(self) -> str:
        kind = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        kind += ", bfloat16 autocast" if self.autocast else ""
        ranks = " and ".join(map(str, self.ranks))
        rows = f"{self.rows} rows of " if self.rows > 1 else ""
        return (
            f"{self.width} wide, {self.layers} layers, {rows}{self.tokens:,} tokens, r = {ranks},"
            f" {kind}" + (f", {torch.cuda.get_device_name()}" if self.device == "cuda" else "")
        )


PARTS = {
    "systems": Part(512, 4, 1024, systems=True),
    "wide": Part(1024, 8, 2048),
    "ranks": Part(512, 4, 1024, ranks=(8, 64), dropout=False),
    "half": Part(512, 4, 1024, ranks=(8, 64), dropout=False, autocast=True),
    "gpu": Part(2048, 16, 2048, device="cuda", rows=4),
}


@dataclass
class Runner:
    """A model that takes steps."""

    net: Any
    part: Part
    frozen: bool = False
    adapters: Any = None
    optimizer: Any = None
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net.train()
        self.ids = self.part.batch(1)["input_ids"]

    def step(self) -> None:
        self.gradients()
        for p in self.net.parameters():
            p.grad = None

    def gradients(self) -> None:
        batch: dict[str, Any] = {"labels": self.ids, "use_cache": False}
        if self.frozen:  # gradients flow through activations only: the embeddings' are the leaf
            x = self.net.get_input_embeddings()(self.ids).detach().requires_grad_(True)
            batch["inputs_embeds"] = x
        else:
            batch["input_ids"] = self.ids
        with self._autocast():
            outputs = self.net(**batch)
            loss = outputs.loss
            if self.adapters is not None and self.adapters.recipe.objectives:
                loss = self.adapters.loss(outputs, batch)
        loss.backward()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.part.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.part.device, dtype=torch.bfloat16)

    def timed(self) -> float:
        return within(self.step, self.part)

    # -- what it takes

    def saved_bytes(self) -> int:
        return saved_bytes(self.step, self.net.parameters())

    def counts(self) -> Counts:
        with Counter() as counter:
            self.step()
        return counter.counts

    def peak_bytes(self) -> int:
        if self.part.device == "cuda":
            self.step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        return in_child(self._peak)

    def _peak(self) -> int:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
        self.step()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before = status("VmRSS")
        self.step()
        return status("VmHWM") - before

    def optimizer_step(self) -> float | None:
        """Mean seconds of the optimizer's step over a run, events included."""
        if self.optimizer is None:
            return None
        taken = []
        for _ in range(RUN):
            self.gradients() if not taken else None
            kept = [(p, p.grad) for p in self.net.parameters() if p.grad is not None]
            copies = [g.clone() for _, g in kept if g is not None]
            wait(self.part)
            began = time.perf_counter()
            self.optimizer.step()
            wait(self.part)
            taken.append(time.perf_counter() - began)
            for (p, _), g in zip(kept, copies, strict=True):
                p.grad = g  # the same again: the time does not depend on the values
        return statistics.mean(taken)


@dataclass
class Counts:
    """What a step does.

    Attributes:
        thick: multiplies of products whose smallest side is at least `THIN`.
        thin: of the others.
        moved: bytes read and written by all that is no product.
        drawn: random numbers.
    """

    thick: float = 0
    thin: float = 0
    moved: float = 0
    drawn: float = 0

    @property
    def multiplies(self) -> float:
        return self.thick + self.thin

    def seconds(self, beyond: Counts, rates: Counts) -> float:
        """What this takes longer than `beyond`, each kind of work at its rate a second."""
        return sum(
            (getattr(self, f.name) - getattr(beyond, f.name)) / getattr(rates, f.name)
            for f in dataclasses.fields(self)
        )


class Counter(TorchDispatchMode):
    """Counts what is done within it, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.product(out, args[0])
        elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
            self.product(out, args[1])
        elif name.startswith("_scaled_dot_product"):
            q, k = args[1 if "backward" in name else 0], args[2 if "backward" in name else 1]
            # Forward: two products of (tokens, tokens, width); backward: five.
            self.counts.thick += q.numel() * k.shape[-2] * (5 if "backward" in name else 2)
        elif name in ("rand", "uniform_", "bernoulli_"):
            self.counts.drawn += out.numel()
        elif name == "index_fill_":  # the positions, and a cache line of each
            self.counts.moved += args[2].numel() * (args[2].element_size() + 2 * LINE)
        elif not func.is_view and "empty" not in name and name not in ("detach", "_unsafe_view"):
            read = args[1:] if name in ("copy_", "zero_", "fill_") else args  # what is only written
            for t in tree_leaves((read, kwargs, out)):
                if isinstance(t, torch.Tensor):  # an expanded one holds less than it shows
                    self.counts.moved += min(t.nbytes, t.untyped_storage().nbytes())
        return out

    def product(self, out: torch.Tensor, left: torch.Tensor) -> None:
        inner = left.shape[-1]
        kind = "thin" if min(*out.shape[-2:], inner) < THIN else "thick"
        setattr(self.counts, kind, getattr(self.counts, kind) + out.numel() * inner)


def rates(part: Part) -> Counts:
    """What this machine does in a second, with the part's shapes, one kind of work at a time. As in
    a step, a product runs before each call, and its activations are in no cache any more."""
    like = {"device": part.device, "dtype": torch.bfloat16 if part.autocast else part.dtype}
    n, m, r = part.rows * part.tokens, part.width, part.ranks[0]
    pool = [torch.randn(n, m, **like) for _ in range(COLD // (n * m * 4))]
    w, a, h = (torch.randn(*shape, **like) for shape in ((m, m), (r, m), (n, r)))
    halves = h.unflatten(0, (2, -1)).mT  # a result of r rows occupies two threads in halves only
    thin = [
        lambda x, _: x @ a.T,
        lambda x, _: torch.bmm(halves, x.unflatten(0, (2, -1))).sum(0),
        lambda x, _: x.addmm_(h, a),
    ]
    number = n * m // 20
    return Counts(
        thick=n * m * m / alone([lambda x, _: x @ w.T], pool, w, part),
        thin=3 * n * m * r / alone(thin, pool, w, part),
        moved=3 * pool[0].nbytes / alone([lambda x, y: x * y], pool, w, part),
        drawn=number / alone([lambda *_: torch.rand(number, device=part.device)], pool, w, part),
    )


def alone(
    calls: list[Callable[..., Any]], pool: list[torch.Tensor], w: torch.Tensor, part: Part
) -> float:
    """Seconds of all of them, each at its median over the pool, after a product with w; on a GPU,
    where one is over before it could be timed, at the mean of a second round, without."""
    total = 0.0
    for call in calls:
        if part.device == "cuda":

            def every(call: Callable[..., Any] = call) -> None:
                for x, y in zip(pool, [pool[-1], *pool], strict=False):
                    call(x, y)

            within(every, part)
            total += within(every, part) / len(pool)
        else:
            taken = []
            for x, y, other in zip(
                pool, [pool[-1], *pool], pool[len(pool) // 2 :] + pool, strict=False
            ):
                _ = other @ w.T
                taken.append(within(lambda x=x, y=y, call=call: call(x, y), part))
            total += statistics.median(taken)
    return total


def within(call: Callable[[], Any], part: Part) -> float:
    """Seconds of one call."""
    wait(part)
    began = time.perf_counter()
    call()
    wait(part)
    return time.perf_counter() - began


def wait(part: Part) -> None:
    if part.device == "cuda":
        torch.cuda.synchronize()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def in_child(call: Callable[[], int]) -> int:
    """What the call gives in a process of its own, which shares this one's memory unwritten."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(write, pickle.dumps(call()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(told)


# -- who is compared -------------------------------------------------------------------------------


def makers(part: Part) -> Iterator[tuple[str, Callable[[], Runner]]]:
    """(name, what makes it) of every row."""
    yield "frozen", lambda: Runner(part.model().requires_grad_(False), part, frozen=True)
    if part.systems:
        yield "full", lambda: ours(part, "full", None)
    for r in part.ranks:
        more = f", r = {r}" if len(part.ranks) > 1 else ""
        for name, method, fields in (
            ("lora", "lora", {}),
            ("lora, dropout", "lora", {"lora_dropout": 0.05}),
            ("dora", "dora", {"use_dora": True}),
            ("dora, dropout", "dora", {"use_dora": True, "lora_dropout": 0.05}),
        ):
            if "dropout" in name and not part.dropout:
                continue
            mine = {k: v for k, v in fields.items() if k != "use_dora"}
            yield name + more, lambda m=method, f=mine, r=r: ours(part, m, r, **f)
            yield f"PEFT {name}{more}", lambda f=fields, r=r: peft(part, r, **f)
    for method in systems() if part.systems else ():
        yield method, lambda m=method: ours(part, m, 16)


def systems() -> list[str]:
    """Every word that carries a paper, but those that have rows of their own."""
    every = [word for room in AXES for word in registry.names(room)]
    return [w for w in every if registry.source(registry.find(w)).bibtex and w not in _OWN]


_OWN = ("lora", "dora", "lowrank", "lorafa+dora")


def ours(part: Part, method: str, r: int | None, **fields: Any) -> Runner:
    net = part.model()
    recipe = lorica.Recipe.parse(method)
    fixed = any(c.only_r is not None for c in recipe.choices)
    if r is not None and "r" in recipe.takes and not fixed:
        fields["r"] = r
    if isinstance(recipe.init, StartsFromData):
        fields["data"] = [part.batch(seed) for seed in range(recipe.init.batches)]
    if isinstance(recipe.init, StartsFromUnquantised):  # of weights that were not quantised
        fields["unquantised"] = {
            n: m.weight for n, m in net.named_modules() if hasattr(m, "weight")
        }
    adapters = lorica.attach(net, method, verbose=False, **fields)
    optimizer = lorica.optimizer(adapters, lr=1e-4, total_steps=RUN)
    stir(adapters)
    return Runner(net, part, adapters=adapters, optimizer=optimizer)


def peft(part: Part, r: int, **fields: Any) -> Runner:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", **fields)
    return Runner(get_peft_model(part.model(), config), part)


@torch.no_grad()
def stir(adapters: Any) -> None:
    """B away from zero: zeros can be faster."""
    for _, pair in adapters.pairs():
        pair.B.add_(torch.randn_like(pair.B) * 1e-3)


# -- the table -------------------------------------------------------------------------------------


def measure(part: Part, options: argparse.Namespace) -> list[str]:
    chosen = [
        (name, make) for name, make in makers(part)
        if not options.only or name in {"frozen", *options.only}
    ]  # fmt: skip
    torch.set_num_threads(1)  # a forked child has no pool of threads
    runs = {name: make() for name, make in chosen}
    peaks = {name: run.peak_bytes() for name, run in runs.items()}
    torch.set_num_threads(options.threads)
    facts = {n: (run.saved_bytes(), run.counts(), peaks[n]) for n, run in runs.items()}
    names = list(runs)
    for i in range(-2, options.rounds):
        k = i % len(names)
        for name in names[k:] + names[:k]:
            taken = runs[name].timed()
            if i >= 0:
                runs[name].seconds.append(taken)
    frozen, counted, rate = (
        statistics.median(runs["frozen"].seconds),
        facts["frozen"][1],
        rates(part),
    )
    steps = {name: run.optimizer_step() for name, run in runs.items()}
    lines = [
        "| | step / frozen: median (quartiles) | fastest | floor | products | step / PEFT's |"
        " saved MiB | peak MiB | optimizer and schedule |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        saved, counts, peak = facts[name]
        floor = 1 + counts.seconds(counted, rate) / frozen
        ratios = over(run, runs["frozen"])
        low, _, high = statistics.quantiles(ratios, n=4)
        best = min(run.seconds) / min(runs["frozen"].seconds)
        peer = runs.get(f"PEFT {name}")
        beside = f"{statistics.median(over(run, peer)):.3f}" if peer else ""
        own = steps[name]
        lines.append(
            f"| {name} | {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) | {best:.3f} |"
            f" {floor:.3f} | {counts.multiplies / counted.multiplies:.3f} | {beside} |"
            f" {saved / 2**20:.0f} | {peak / 2**20:.0f} |"
            f" {'' if own is None else f'{own / frozen:.3f}'} |"
        )
    multiplies = counted.multiplies
    return [
        f"## {part}",
        "",
        f"The frozen step took {frozen * 1e3:.0f} ms (median) for {multiplies / 1e9:.1f}e9"
        f" multiplies, {2 * multiplies / frozen / 1e9:.0f} GFLOP/s. Alone:"
        f" {2 * rate.thick / 1e9:.0f} GFLOP/s, thin {2 * rate.thin / 1e9:.0f},"
        f" {rate.moved / 1e9:.0f} GB/s, {rate.drawn / 1e6:.0f} million random numbers a second.",
        "",
        *lines,
        "",
    ]


def over(run: Runner, other: Runner) -> list[float]:
    return [a / b for a, b in zip(run.seconds, other.seconds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="rows, beside the frozen step")
    parser.add_argument("--out", type=Path, help="folder; write the tables there")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    parts = options.parts or [name for name in PARTS if name != "gpu"]
    text = [
        "# One training step",
        "",
        f"{datetime.date.today()}, {processor()}, {options.threads} thread(s), torch"
        f" {torch.__version__}, transformers {transformers.__version__}, {options.rounds}"
        f" interleaved rounds. `python benchmarks/step.py {' '.join(parts)}`",
        "",
    ]
    for name in parts:
        text += measure(PARTS[name], options)
    text.append(f"Load at the end: {os.getloadavg()[0]:.1f}.")
    print("\n".join(text))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        page = options.out / f"step-{datetime.date.today()}.md"
        page.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
