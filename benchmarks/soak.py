"""Long runs stay flat: memory, objects and files over 2,000 steps of every schedule and rule.

    python benchmarks/soak.py [--steps 2000] [--warm 200] [--words relora galore ...] [--jobs 1]
        [--out DIR]

A Llama 16 wide with one layer, vocabulary 61, 2 rows of 8 tokens a step, r = 4, float32, one
thread; each word of the rooms `schedules` and `optim` with its default recipe, in a process of its
own, in a plain loop. The first line is the control, the plain model under torch's AdamW without
Lorica; the last is `lorica.run.Trainer`. From step WARM on, ten times and after a collection:
resident bytes (/proc/self/statm), objects that Python's collector tracks, allocated blocks (every
small object, also those that the collector leaves out), open files, entries of the temporary
folder.

A leak shows in every stretch of a run, a page that the allocator takes once in one of them. So the
growth of memory is the median over the stretches of bytes a step, and its noise their median
absolute deviation, in units of a standard deviation (x 1.4826), over the root of their number. A
run grows where the median exceeds three times the noise and `FLOOR`, where an object, file or entry
is left for each `RARE` steps, or where the median stretch leaves as many blocks more than the
control's: blocks settle slowly, without Lorica too.

Finished links that a schedule carries grow by design (`accumulate="factors"`): r x (in + out)
numbers a layer and restart. This is derived from the layers' shapes, must equal what they hold, and
is subtracted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica import Recipe
from lorica.model.layer import AdaptedLinear
from lorica.recipe import registry

R, VOCABULARY, ROWS, LENGTH = 4, 61, 2, 8
STRETCHES = 10
FLOOR = 256  # bytes a step: what a run of 2,000 steps cannot tell from the allocator's moods
RARE = 10  # steps for which one of these may be left
COUNTS = ("objects", "files", "temporary")
CONTROL, TRAINER = "control", "Trainer"  # lines that are no words


@dataclass
class Soaked:
    """What one run left behind. Lists hold the figures at the ends of the stretches."""

    word: str
    method: str
    steps: int
    warm: int
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    temporary: list[int] = field(default_factory=list)
    carried: list[int] = field(default_factory=list)  # bytes, derived

    @property
    def stretch(self) -> float:
        return (self.steps - self.warm) / (len(self.resident) - 1)

    def slopes(self) -> list[float]:
        """Bytes a step of each stretch, less what is carried by design."""
        net = [a - b for a, b in zip(self.resident, self.frozen_factors, strict=True)]
        return [(b - a) / self.stretch for a, b in zip(net, net[1:], strict=False)]

    @property
    def slope(self) -> float:
        return statistics.median(self.slopes())

    @property
    def noise(self) -> float:
        slopes = self.slopes()
        deviation = statistics.median(abs(s - self.slope) for s in slopes)
        return 1.4826 * deviation / len(slopes) ** 0.5

    def left(self, name: str) -> int:
        """Objects, files or entries at the end beyond those after the warm-up."""
        counts = getattr(self, name)
        return counts[-1] - counts[0]

    @property
    def blocks_a_step(self) -> float:
        """Of the median stretch."""
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        return statistics.median(b - a for a, b in pairs) / self.stretch

    def growth(self, control: Soaked, blocks: float = 1 / RARE) -> list[str]:
        """What grew, in words; empty: nothing.

        Args:
            control: the run without Lorica.
            blocks: how many more blocks a step than the control's are no growth yet.
        """
        out, steps = [], self.steps - self.warm
        if self.slope > max(3 * self.noise, FLOOR):
            out.append(f"memory by {self.slope:.0f} ± {self.noise:.0f} bytes a step")
        if (more := self.blocks_a_step - control.blocks_a_step) > blocks:
            out.append(f"blocks by {more:.2f} a step")
        for name in COUNTS:
            if self.left(name) > steps / RARE:
                out.append(f"{name} by {self.left(name)} in {steps} steps")
        return out


def words() -> list[str]:
    return [*registry.names("schedules"), *registry.names("optim")]


def recipe(word: str) -> Recipe:
    """The word alone, with its defaults, at a rank that fits the model."""
    plain = Recipe.parse(word)
    fixed = any(choice.only_r is not None for choice in plain.choices)
    return Recipe.parse(word, **({"r": R} if "r" in plain.takes and not fixed else {}))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


class Meter:
    """Takes the figures at the ends of the stretches."""

    def __init__(self, soaked: Soaked, model: Any, folder: Path) -> None:
        self.soaked, self.model, self.folder = soaked, model, folder
        count = min(STRETCHES, soaked.steps - soaked.warm)
        whole = soaked.steps - soaked.warm
        self.at = {soaked.warm + whole * i // count for i in range(count + 1)}
        self.before = carried(model)[0]

    def look(self, step: int) -> None:
        """After `step` steps."""
        if step not in self.at:
            return
        gc.collect()
        gc.freeze()  # what is old is neither collected nor counted again
        found, derived = carried(self.model)
        assert found == derived, "a carried stack is not r x (in + out) a restart"
        soaked = self.soaked
        soaked.frozen_factors.append(found - self.before)
        soaked.objects.append(gc.get_freeze_count())
        soaked.blocks.append(sys.getallocatedblocks())
        soaked.files.append(len(os.listdir("/proc/self/fd")))
        soaked.temporary.append(sum(1 for _ in self.folder.rglob("*")))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        soaked.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))


def carried(model: Any) -> tuple[int, int]:
    """Bytes of the stacks that layers carry: found, and derived from ranks and shapes."""
    found = derived = 0
    for layer in model.modules():
        if not isinstance(layer, AdaptedLinear) or (stack := layer.update.frozen_factors) is None:
            continue
        wide = stack.A.element_size()
        found += (stack.A.numel() + stack.B.numel()) * wide
        derived += stack.A.shape[0] * (layer.in_features + layer.out_features) * wide
    return found, derived


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Temporary files of this process go to a folder of their own within this context."""
    with tempfile.TemporaryDirectory() as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def loop(model: Any, soaked: Soaked, look: Callable[[int], None]) -> None:
    if soaked.name == CONTROL:
        adapters = None
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        adapters = lorica.Adapters.of(model)
        optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=soaked.steps)
    for step in range(soaked.steps):
        inputs = batch(step)
        outputs = model(**inputs)
        loss = outputs.loss if adapters is None else adapters.loss(outputs, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del outputs, loss
        look(step + 1)


def trainer(model: Any, soaked: Soaked, look: Callable[[int], None]) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from lorica.run import Trainer

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(state.global_step)

    rows = [{k: v[0].tolist() for k, v in batch(i).items()} for i in range(ROWS * 50)]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=soaked.steps, per_device_train_batch_size=ROWS,
        learning_rate=1e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    made = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        callbacks=[Looking()],
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    made.train()


def soak(word: str, steps: int, warm: int, *, extra: Callable[[int], None] | None = None) -> Soaked:
    """One run, measured.

    Args:
        word: of the rooms `schedules` and `optim`, or `TRAINER`, or `CONTROL`.
        steps: optimizer steps.
        warm: how many of them come before the first look.
        extra: called with the number of steps so far, after each.
    """
    model, method = llama(), "none"
    if word != CONTROL:
        asked = recipe("adamw" if word == TRAINER else word)
        method = lorica.attach(model, asked, verbose=False).recipe.text()
    model.train()
    soaked = Soaked(word, method, steps, warm)
    began = time.perf_counter()
    gc.collect()
    with own_folder() as folder:
        meter = Meter(soaked, model, folder)

        def look(step: int) -> None:
            if extra is not None:
                extra(step)
            meter.look(step)

        try:
            (trainer if word == TRAINER else loop)(model, soaked, look)
        finally:
            gc.unfreeze()
    soaked.seconds = time.perf_counter() - began
    return soaked


def apart(word: str, steps: int, warm: int) -> Soaked:
    """`soak` in a fresh process."""
    command = [sys.executable, __file__, "--one", word, "--steps", str(steps), "--warm", str(warm)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise RuntimeError(f"{word}: {ran.stderr[-2000:]}")
    return Soaked(**json.loads(ran.stdout.splitlines()[-1]))


def table(runs: list[Soaked], control: Soaked) -> Iterator[str]:
    yield (
        "| word | recipe | seconds | bytes a step | noise | carried by design, KiB | blocks a step"
        " | objects | files | temporary | grows |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for run in runs:
        counts = (run.left(name) for name in COUNTS)
        yield (
            f"| {run.name} | `{run.method}` | {run.seconds:.1f} | {run.slope:.1f} |"
            f" {run.noise:.1f} | {(run.frozen_factors[-1] - run.frozen_factors[0]) / 1024:.1f} |"
            f" {run.blocks_a_step:.2f} | {' | '.join(f'{n:+d}' for n in counts)} |"
            f" {'; '.join(run.growth(control)) or 'no'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm", type=int, default=200)
    parser.add_argument("--words", nargs="+", default=[*words(), TRAINER])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one is not None:
        print(json.dumps(asdict(soak(options.one, options.steps, options.warm))))
        return

    chosen = [CONTROL, *options.words]
    with ThreadPoolExecutor(options.jobs) as pool:
        made = pool.map(lambda word: apart(word, options.steps, options.warm), chosen)
        control, *rest = runs = list(made)
    growing = [run.name for run in rest if run.growth(control)]
    worst = max(rest, key=lambda run: run.slope)
    lines = [
        "# Long runs",
        "",
        f"{datetime.date.today()}, load {os.getloadavg()[0]:.1f} at the end, torch"
        f" {torch.__version__}, transformers {transformers.__version__}. {options.steps} steps a"
        f" run, measured from step {options.warm} on. `python benchmarks/soak.py`",
        "",
        *table(runs, control),
        "",
        f"{len(rest)} runs, {sum(run.steps for run in rest):,} steps: {len(growing)} grow"
        f"{': ' + ', '.join(growing) if growing else ''}. Fastest growth of memory"
        f" {worst.slope:.1f} ± {worst.noise:.1f} bytes a step ({worst.name}).",
    ]
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"soak-{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)
    raise SystemExit(1 if growing else 0)


if __name__ == "__main__":
    main()
