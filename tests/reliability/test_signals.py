"""SIGTERM and Ctrl-C: a checkpoint, an exit, and a run that goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from killing import Snapshot
from transformers import TrainerCallback, TrainingArguments

import lorica
from lorica.run import Trainer, checkpoints
from lorica.run.finetune import train as fine_tune
from lorica.run.options import TrainOptions
from lorica.run.signals import SaveOnSignal
from lorica.run.stopping import SIGNALS, Stopped, terminable
from models import LENGTH, VOCAB, llama

GOES_ON = re.compile(r"To go on from (checkpoint-\d+): (lorica .+)")


def signalled(nursery, words, numbers, phase, nth):
    """A run that gets signals during a phase, all before it does anything about the first."""
    child = nursery.start(words)
    while child.count(phase) < nth:
        assert not child.ended(), child.said
        time.sleep(0.0005)
    child.signal(signal.SIGSTOP)
    for number in numbers:
        child.signal(number)
    child.signal(signal.SIGCONT)
    child.wait()
    return child


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase, nth", [("step", 5), ("evaluation", 2), ("checkpoint", 2)])
def test_it_saves_and_says_how_to_go_on(number, phase, nth, nursery, straight, tmp_path):
    out = tmp_path / "a b"
    words = [*straight[2].words[:-2], "--output-dir", out]
    child = signalled(nursery, words, [number], phase, nth)
    assert child.status == 128 + number, child.said
    last = checkpoints.found(out)[-1]
    assert checkpoints.flaw(last) is None and not (out / "result.json").exists()
    assert f"stopped by {number.name} after step {last.name[11:]}; {last} is written" in child.said
    named, command = GOES_ON.search(child.said).groups()
    assert named == last.name
    again = nursery.run(shlex.split(command)[1:])
    assert again.status == 0, again.said
    assert straight[1].differences(Snapshot.of(out)) == []


def test_a_second_one_leaves_at_once(nursery, straight, tmp_path):
    out = tmp_path / "out"
    words = [*straight[2].words[:-2], "--output-dir", out]
    child = signalled(nursery, words, SIGNALS, "step", 8)
    assert child.status == 128 + signal.SIGTERM, (
        child.said
    )  # the one of the higher number is second
    assert "stopped by SIGTERM. To go on from" in child.said
    assert all(checkpoints.flaw(path) is None for path in checkpoints.found(out))
    assert [p for p in out.iterdir() if p.name.startswith(".")] == []
    assert nursery.run(["train", "--resume", "--output-dir", out]).status == 0
    assert straight[1].differences(Snapshot.of(out)) == []


@pytest.mark.parametrize("phase, nth", [("step", 5), ("checkpoint", 2)])
def test_of_weights_alone_it_leaves_a_whole_checkpoint(phase, nth, nursery, straight, tmp_path):
    out = tmp_path / "out"
    words = [*straight[2].words[:-2], "--save-only-model", "--output-dir", out]
    child = signalled(nursery, words, [signal.SIGTERM], phase, nth)
    assert child.status == 128 + signal.SIGTERM, child.said
    named, command = GOES_ON.search(child.said).groups()
    assert checkpoints.flaw(out / named) is None
    again = nursery.run(shlex.split(command)[1:])
    assert again.status == 0, again.said
    result = json.loads((out / "result.json").read_text())
    assert result["adapter_sha256"] == json.loads(
        (straight[0] / "result.json").read_text()
    )["adapter_sha256"]  # fmt: skip


def test_it_promises_nothing_where_only_weights_are_left(nursery, straight, tmp_path):
    out = tmp_path / "out"
    words = [*straight[2].words[:-2], "--save-only-model", "--output-dir", out]
    child = signalled(nursery, words, SIGNALS, "step", 8)
    assert "hold weights only" in child.said and "To go on" not in child.said, child.said


def test_before_the_first_step_it_leaves_at_once(nursery, straight, tmp_path):
    child = signalled(
        nursery, [*straight[2].words[:-2], "--output-dir", tmp_path / "out"],
        [signal.SIGTERM], "start", 1,
    )  # fmt: skip
    assert child.status in (128 + signal.SIGTERM, -signal.SIGTERM)  # before any handler stands
    assert not checkpoints.found(tmp_path / "out")


def test_workers_of_the_loader_live_on(nursery, straight, tmp_path):
    """Ctrl-C in a terminal reaches every process of the run."""
    out = tmp_path / "out"
    child = nursery.start(
        [*straight[2].words[:-2], "--dataloader-num-workers", 1, "--output-dir", out]
    )
    while child.count("step") < 5:
        assert not child.ended(), child.said
        time.sleep(0.001)
    below = Path(f"/proc/{child.number}/task/{child.number}/children")
    workers = [int(n) for n in below.read_text().split()] if below.is_file() else []
    for number in (*workers, child.number):
        os.kill(number, signal.SIGINT)
    assert child.wait() == 130, child.said
    assert child.said.count("once more leaves at once") == 1 and "is written" in child.said
    again = nursery.run(["train", "--resume", "--dataloader-num-workers", 0, "--output-dir", out])
    assert again.status == 0, again.said
    found = straight[1].differences(Snapshot.of(out))
    assert [x for x in found if not x.startswith("config.yaml")] == []  # it has that option


def test_json_tells_it_too(nursery, straight, tmp_path):
    words = [*straight[2].words[:-2], "--json", "--output-dir", tmp_path / "out"]
    child = signalled(nursery, words, [signal.SIGINT], "step", 3)
    told = [json.loads(x) for x in child.said.splitlines() if x.startswith("{")]
    assert [t["status"] for t in told] == [130] and "To go on from" in told[0]["error"]


# -- the Trainer -----------------------------------------------------------------------------------


class At(TrainerCallback):
    """Does something in the middle of a step."""

    def __init__(self, step: int, do) -> None:
        self.step, self.do = step, do

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.do()


def trainer(folder: Path, *callbacks, **over) -> Trainer:
    model = llama()
    lorica.attach(model, "relora(every=3)", r=2, lora_dropout=0.1, verbose=False)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (32, LENGTH), generator=generator)
    options = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "report_to": "none", "save_steps": 3, "logging_steps": 4, "seed": 5,
        "disable_tqdm": True, "use_cpu": True, **over,
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**options), callbacks=list(callbacks),
        train_dataset=[{"input_ids": x, "labels": x} for x in ids],
    )  # fmt: skip


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


def test_nobody_else_gets_handlers(tmp_path):
    before, seen = handlers(), []
    trainer(tmp_path, At(2, lambda: seen.append(handlers()))).train()
    assert seen == [before] and handlers() == before


def test_the_callback_saves_leaves_and_tidies_up(tmp_path):
    straight = trainer(tmp_path / "straight")
    straight.train()
    before, stop = handlers(), SaveOnSignal()
    run = trainer(tmp_path / "run", stop, At(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped) as stopped:
        run.train()
    assert handlers() == before
    assert (stopped.value.code, stopped.value.step) == (143, 5)
    assert stopped.value.checkpoint == tmp_path / "run" / "checkpoint-5"
    again = trainer(tmp_path / "run", SaveOnSignal())
    again.train(resume_from_checkpoint=True)
    assert handlers() == before
    assert again.adapters.fingerprint() == straight.adapters.fingerprint()
    timeless = [
        [{k: v for k, v in line.items() if "per_second" not in k and "time" not in k}
         for line in t.state.log_history] for t in (straight, again)
    ]  # fmt: skip
    assert timeless[0][:-1] == timeless[1][:-1]  # the last line is the call's own mean


def test_handlers_go_when_training_fails(tmp_path):
    def fail():
        raise RuntimeError("no")

    before = handlers()
    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, SaveOnSignal(), At(2, fail)).train()
    assert handlers() == before


def test_in_another_thread_there_are_none(tmp_path):
    before, seen, raised = handlers(), [], []

    def work():
        try:
            trainer(tmp_path, SaveOnSignal(), At(2, lambda: seen.append(handlers()))).train()
        except BaseException as error:  # noqa: B036
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not raised and seen == [before] and handlers() == before


def test_handlers_of_the_command_line_go(tmp_path):
    before = handlers()
    with pytest.raises(Stopped) as stopped, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert stopped.value.code == 143 and handlers() == before


def test_a_damaged_checkpoint_is_skipped_or_refused(tmp_path, caplog):
    run = trainer(tmp_path)
    run.train()
    (tmp_path / "checkpoint-8" / "rng_state.pth").unlink()
    again = trainer(tmp_path)
    with caplog.at_level("WARNING", logger="lorica"):
        again.train(resume_from_checkpoint=True)
    assert "checkpoint-8 is damaged: rng_state.pth is missing" in caplog.text
    assert again.adapters.fingerprint() == run.adapters.fingerprint()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="optimizer.pt has 0 bytes instead of"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


SCRIPT = """
import os, signal, sys
from datetime import timedelta
import torch.distributed as dist
sys.path[:0] = {paths!r}
import test_signals as t
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
me = dist.get_rank()
hit = t.At(4, lambda: me and os.kill(os.getpid(), signal.SIGTERM))
t.trainer(t.Path({out!r}), t.SaveOnSignal(), hit, save_steps=100, max_steps=12).train()
"""


def test_of_two_processes_one_signal_is_enough(tmp_path):
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests / "conformance"), str(tests / "reliability")]
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(paths=paths, out=str(tmp_path / "out")))
    words = [sys.executable, str(script)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "OMP_NUM_THREADS": "1"}  # fmt: skip
    made = [
        subprocess.Popen(
            words, env={**os.environ, **several, "RANK": r, "LOCAL_RANK": r},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for r in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in made]
    assert [process.returncode for process in made] == [143, 143], "\n".join(said)
    (last,) = checkpoints.found(tmp_path / "out")
    assert last.name == "checkpoint-5" and checkpoints.flaw(last) is None


# -- a signal at an exact step ---------------------------------------------------------------------


class Kick(TrainerCallback):
    """Sends a signal as this step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def said(folder: Path) -> tuple:
    """What a run says of itself: evaluations, the best step, the weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    return evaluations, result["best_step"], result["adapter_sha256"]


@pytest.fixture
def passes(tmp_path):
    """A run of two passes of three steps, evaluated after each."""
    rows = [
        json.dumps({"prompt": f"{i} and {i + 1}", "completion": str(2 * i + 1)}) for i in range(32)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:24]))
    (tmp_path / "dev.jsonl").write_text("\n".join(rows[24:]))

    def run(out: str, *callbacks, **more):
        options = TrainOptions(
            data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "dev.jsonl"), r=2,
            num_train_epochs=2.0, learning_rate=1e-2, output_dir=str(tmp_path / out), **more,
        )  # fmt: skip
        fine_tune(options, callbacks=[SaveOnSignal(), *callbacks])
        return tmp_path / out

    return run


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_pass_that_ends_with_a_signal_is_evaluated(passes, step):
    straight = said(passes("straight"))
    with pytest.raises(Stopped) as stop:
        passes("cut", Kick(step))
    assert stop.value.step == step
    assert said(passes("cut", resume="last")) == straight


def test_it_saves_where_only_the_best_is_kept(passes):
    more = {
        "further": {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1,
                    "metric_for_best_model": "eval_loss", "greater_is_better": True},
    }  # fmt: skip
    with pytest.raises(Stopped) as stop:
        passes("cut", Kick(4), **more)
    assert stop.value.step == 4 and checkpoints.flaw(stop.value.checkpoint) is None


class Swallowing:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_within_a_finaliser_is_not_lost():
    with pytest.raises(Stopped), terminable():
        Swallowing()
    with pytest.raises(Stopped), terminable():
        Swallowing()
        SaveOnSignal().on_train_begin(None, None, None)
        raise AssertionError("training began")
    with terminable():
        pass  # an old signal stops nothing new
