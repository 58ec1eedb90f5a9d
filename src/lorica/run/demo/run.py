"""Teach, measure before and after, and let fresh processes read the adapter.

The training is that of `lorica train`: config.yaml in the folder repeats it. What is measured is
the exact match of greedy answers on the test side of the task world, which training never sees.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lorica.run import report
from lorica.run.demo import again, page
from lorica.run.demo.options import DemoOptions
from lorica.run.folder import REPORT, SAMPLES, RunFolder, strict
from lorica.run.options import TrainOptions, UsageError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("lorica")

PAGE = REPORT
BATCH = 48  # examples a step
# Half of what is trained on are old tasks: with a third they fell by two points more, and the new
# ones gained one.
DATA = "lorica:new+old"
KINDS = ("new", "old")
LOGGED = 28  # points of the loss curve
NEW_TOKENS = 20  # the longest right answer has 16, its end included
TEXTS = 64  # whose logits are compared
THREADS = 2  # more don't help a model of this size
TOLERANCE = 1e-3  # in logits; rounding is far below, a wrong scale far above


def demo(options: DemoOptions) -> dict[str, Any]:
    """Run the demonstration; returns what result.json holds.

    That is the run's own result, as of `lorica train`, and under `demo`: `tasks` (exact match of
    every task, in [0, 1]), `new` and `old` (means over their tasks), `samples`, `loss`, `reread`,
    `adapter` (files and bytes), `seconds`.

    Raises:
        UsageError: a folder that holds something else, or options that can't be run.
        ValueError: the adapter, read again, computes something else than the trained model.
    """
    from lorica.run.finetune import recipe_of

    began = time.perf_counter()
    options.check()
    folder = RunFolder(options.output_dir)
    ours = _claim(folder)
    lesson = _lesson(options, overwrite=ours)
    lesson.check()
    recipe_of(lesson)
    with _threads(), _announced(folder):
        result = _run(options, lesson, folder)
        result["demo"]["seconds"] = round(time.perf_counter() - began, 3)
        folder.write("result.json", json.dumps(strict(result), indent=2, ensure_ascii=False) + "\n")
        folder.write(SAMPLES, json.dumps(_shown(result), indent=2, ensure_ascii=False) + "\n")
        report.write(folder.path)
    _check_reread(result["demo"]["reread"], folder)
    return strict(result)


def _claim(folder: RunFolder) -> bool:
    """Whether an earlier demonstration is there, to be replaced."""
    ours = _is_demo(folder)
    try:
        folder.check(resume=None, overwrite=ours)
    except UsageError:
        raise UsageError(
            f"`--output-dir {folder.path}` holds something that `lorica demo` has not written, and"
            " it only replaces its own; name another folder"
        ) from None
    return ours


def _is_demo(folder: RunFolder) -> bool:
    """Whether a demonstration has written here: its page while it runs, or its result."""
    with suppress(OSError, ValueError):
        if (folder / PAGE).read_text(encoding="utf-8").startswith(page.HEAD):
            return True
        told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return isinstance(told, dict) and "demo" in told
    return False


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """samples.json: what the page shows of the answers."""
    import lorica

    return {
        "lorica": lorica.__version__,
        "of": "new tasks: the first two prompts of each, whatever came",
        "how": f"Greedy answers of at most {NEW_TOKENS} tokens.",
        "exact": True,
        "rows": [row for row in result["demo"]["samples"] if row["kind"] == "new"],
    }


class _Announcing(TrainerCallback):
    """Puts the page back that the run has removed with what an earlier one left."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.folder.write(PAGE, page.waiting())


@contextmanager
def _announced(folder: RunFolder) -> Iterator[None]:
    """The page is there from the start, turns into the result, and tells of a failure."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(PAGE, page.waiting())
    try:
        yield
    except BaseException:
        folder.write(PAGE, page.stopped())
        raise


@contextmanager
def _threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Exam:
    """The questions: examples of the task world, and their token ids."""

    examples: list[dict[str, str]]
    prompts: list[list[int]]
    texts: list[list[int]]  # prompts with the right answers, some of them
    end: int
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any, each: int) -> _Exam:
        from lorica.embedded import tasks
        from lorica.embedded.source import dataset
        from lorica.inference.generate import Prompter

        ask = Prompter(tokenizer, "causal-lm")
        examples: list[dict[str, str]] = []
        prompts: list[list[int]] = []
        for kind in KINDS:
            rows = dataset(f"lorica:{kind}", "test", each * len(tasks(kind)))
            examples += rows.to_list()
            prompts += [list(prompt.ids) for prompt in ask.rows(rows)]
        step = -(-len(prompts) // TEXTS)
        texts = [
            prompt + tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
            for example, prompt in list(zip(examples, prompts, strict=True))[::step]
        ]
        return cls(examples, prompts, texts, tokenizer.eos_token_id, tokenizer)

    def sit(self, model: Any) -> list[str]:
        """A model's answers, as text."""
        ids = again.answers(model, self.prompts, new_tokens=NEW_TOKENS, end=self.end)
        return self.decode(ids)

    def decode(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def marks(self, answers: list[str]) -> dict[str, list[bool]]:
        """{task: which answers are right}"""
        marks: dict[str, list[bool]] = {}
        for example, answer in zip(self.examples, answers, strict=True):
            marks.setdefault(example["task"], []).append(answer == example["completion"])
        return marks


def _lesson(options: DemoOptions, *, overwrite: bool) -> TrainOptions:
    """The training."""
    return TrainOptions(
        data=DATA,
        method=options.method,
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        max_samples=max(1, options.max_steps * BATCH),  # no example comes twice
        per_device_train_batch_size=BATCH,
        seed=options.seed,
        output_dir=options.output_dir,
        overwrite_output_dir=overwrite,
        further={
            "use_cpu": True,  # the same numbers with and without a GPU, and no slower at this size
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_steps": max(1, options.max_steps // LOGGED),
        },
    )


def _run(options: DemoOptions, lesson: TrainOptions, folder: RunFolder) -> dict[str, Any]:
    from lorica.embedded import base_path
    from lorica.run.finetune import train
    from lorica.run.load_model import load_model, load_tokenizer

    base = str(base_path())
    exam = _Exam.of(load_tokenizer(base), options.examples)
    logger.info(f"the model, before: {len(exam.prompts):,} prompts that it was never trained on")
    loaded = load_model(base, "causal-lm", labels=None, dtype="float32", widen=True)
    model = loaded.model.eval()
    before = exam.sit(model)
    del model, loaded

    live: dict[str, Any] = {}

    def measure(model: Any, tokenizer: Any) -> None:
        logger.info("the model, after: the same prompts")
        model.eval()
        live["answers"] = exam.sit(model)
        live["logits"] = again.logits(model, exam.texts, end=exam.end)

    result = train(lesson, then=measure, callbacks=[_Announcing(folder)])
    after = live["answers"]
    kept = Path(result["output"])
    weights = sorted([*kept.glob("*.safetensors")])
    result["demo"] = {
        **_scores(exam, before, after),
        "samples": _samples(exam, before, after),
        "loss": [
            {"step": line["step"], "loss": line["loss"]}
            for line in folder.lines()
            if "loss" in line
        ],
        "batch": BATCH,
        "threads": min(THREADS, os.cpu_count() or 1),
        "adapter": {
            "path": str(kept),
            "files": [file.name for file in weights],
            "bytes": sum(file.stat().st_size for file in weights),
        },
        "reread": _reread(exam, base, kept, after, live["logits"]),
    }
    return result


def _scores(exam: _Exam, before: list[str], after: list[str]) -> dict[str, Any]:
    """Exact match in [0, 1] of every task, and the means over the tasks of each kind."""
    from lorica.embedded import tasks

    first, last = exam.marks(before), exam.marks(after)
    rows = [
        {
            "task": task.name,
            "kind": kind,
            "description": task.description,
            "examples": len(first[task.name]),
            "before": _mean(first[task.name]),
            "after": _mean(last[task.name]),
        }
        for kind in KINDS
        for task in tasks(kind)
    ]
    means = {
        kind: {
            when: _mean([row[when] for row in rows if row["kind"] == kind])
            for when in ("before", "after")
        }
        for kind in KINDS
    }
    return {"tasks": rows, **means}


def _mean(values: list[Any]) -> float:
    return round(sum(values) / len(values), 6)


def _samples(exam: _Exam, before: list[str], after: list[str]) -> list[dict[str, str]]:
    """The first two questions of every new task, and the first of every old one, whatever came."""
    from lorica.embedded import tasks

    kinds = {task.name: kind for kind in KINDS for task in tasks(kind)}
    left = {name: {"new": 2, "old": 1}[kind] for name, kind in kinds.items()}
    found = []
    for example, first, last in zip(exam.examples, before, after, strict=True):
        name = example["task"]
        if left[name]:
            left[name] -= 1
            found.append(
                {
                    "task": name,
                    "kind": kinds[name],
                    "prompt": example["prompt"].rstrip("\n"),
                    "wanted": example["completion"],
                    "before": first,
                    "after": last,
                }
            )
    return sorted(found, key=lambda row: (row["kind"], row["task"]))


# -- the adapter, read again -----------------------------------------------------------------------


def _reread(
    exam: _Exam, base: str, kept: Path, answers: list[str], logits: Tensor
) -> list[dict[str, Any]]:
    """What fresh processes, all at once, make of the files."""
    readers, missing = _readers(kept)
    names = " and ".join(again.READERS[reader][0] for reader in readers)
    logger.info(f"fresh processes read {kept}: {names}")
    with tempfile.TemporaryDirectory() as place:
        started = {}
        for reader in readers:
            room = Path(place) / reader
            room.mkdir()
            started[reader] = room, _start(exam, reader, base, kept, room)
        done = [
            {"reader": reader, "name": again.READERS[reader][0]}
            | _compared(exam, reader, room, process, answers, logits)
            for reader, (room, process) in started.items()
        ]
    return done + missing


def _readers(kept: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Who can read the folder here, and who can't, with the reason."""
    from lorica import formats

    if (kept / "config.json").is_file():
        return ["transformers"], []
    told = formats.inspect(kept)
    reason = told["why_not_peft"]
    if reason is None and find_spec("peft") is None:
        reason = "PEFT is not installed here; `pip install peft`, and run this again"
    if reason is None:
        return ["lorica", "peft"], []
    return ["lorica"], [{"reader": "peft", "name": again.READERS["peft"][0], "skipped": reason}]


# Started by its path alone, the file's folder would come first on the path of imports.
_ALONE = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def _start(exam: _Exam, reader: str, base: str, kept: Path, room: Path) -> subprocess.Popen[str]:
    import torch

    asked = again.Asked(
        reader=reader,
        base=base,
        adapter=str(kept.resolve()),
        threads=torch.get_num_threads(),
        prompts=exam.prompts,
        texts=exam.texts,
        new_tokens=NEW_TOKENS,
        end=exam.end,
    )
    file = room / "asked.json"
    file.write_text(json.dumps(asdict(asked)), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-c", _ALONE, again.__file__, str(file), str(room)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=room,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def _compared(
    exam: _Exam,
    reader: str,
    room: Path,
    process: subprocess.Popen[str],
    answers: list[str],
    logits: Tensor,
) -> dict[str, Any]:
    from safetensors.torch import load_file

    _, said = process.communicate()
    if process.returncode:
        last = " | ".join(said.strip().splitlines()[-3:])
        raise ValueError(
            f"a fresh process ({again.READERS[reader][0]}) could not read the adapter: {last}"
        )
    told = json.loads((room / again.ANSWERS).read_text(encoding="utf-8"))
    other = load_file(room / again.LOGITS)["logits"]
    same = sum(a == b for a, b in zip(exam.decode(told["answers"]), answers, strict=True))
    return {
        "max_logit_difference": float((other - logits).abs().max()),
        "largest_logit": float(logits.abs().max()),
        "texts": len(exam.texts),
        "same_answers": same,
        "answers": len(answers),
        "lorica_imported": told["lorica_imported"],
        "seconds": round(told["seconds"], 3),
    }


def _check_reread(reread: list[dict[str, Any]], folder: RunFolder) -> None:
    for row in reread:
        if not row.get("max_logit_difference", 0.0) <= TOLERANCE:
            raise ValueError(
                f"{row['name']} reads another model from {folder / 'adapter'} than was trained:"
                f" logits differ by {row['max_logit_difference']:.2e}, and at most {TOLERANCE:g} is"
                f" rounding; {row['same_answers']:,} of {row['answers']:,} answers are the same."
                " This is a fault of Lorica: please report it, with result.json"
            )
