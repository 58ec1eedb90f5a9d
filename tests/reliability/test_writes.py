"""What is complete stays complete: damaged checkpoints, full disks, forbidden folders, two runs."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from killing import Aim, Snapshot, kill
from transformers import TrainerCallback, TrainerState, TrainingArguments

import lorica
from lorica.formats import atomic_folder as folders
from lorica.run import Trainer, checkpoints
from lorica.run.folder import RunFolder
from lorica.run.options import UsageError
from models import llama

NOBODY = 65534
MIB = 2**20


@pytest.fixture
def cut(straight, ground, tmp_path_factory) -> Path:
    """The straight run's folder as a kill between step 8's checkpoint and the end leaves it."""
    folder = ground / tmp_path_factory.mktemp("cut").name
    shutil.copytree(straight[0], folder)
    shutil.rmtree(folder / "checkpoint-9")
    unfinish(folder)
    return folder


def unfinish(folder: Path) -> None:
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "result.json").unlink()


def resumed(nursery, folder: Path, straight, **how) -> str:
    """Resume, compare with the straight run, and return what was said."""
    child = nursery.run(["train", "--resume", "--output-dir", folder], **how)
    assert child.status == 0, child.said
    assert straight[1].differences(Snapshot.of(folder)) == []
    return child.said


# -- damaged checkpoints ---------------------------------------------------------------------------


def truncate(folder: Path) -> str:
    file = next(folder.glob("*.safetensors"))
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    return f"{file.name} has"


def lose_optimizer(folder: Path) -> str:
    (folder / "optimizer.pt").unlink()
    return "optimizer.pt is missing"


def flip(folder: Path) -> str:
    data = bytearray((folder / "scheduler.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "scheduler.pt").write_bytes(data)
    return "scheduler.pt holds other bytes"


def lose_list(folder: Path) -> str:
    (folder / checkpoints.LIST).unlink()
    return "it has no checkpoint.json"


def cut_list(folder: Path) -> str:
    file = folder / checkpoints.LIST
    file.write_text(file.read_text()[:-20])
    return "checkpoint.json is cut"


DAMAGES = (truncate, lose_optimizer, flip, lose_list, cut_list)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_and_named(damage, cut):
    assert checkpoints.flaw(cut / "checkpoint-8") is None
    told = damage(cut / "checkpoint-8")
    last, flaws = checkpoints.newest(cut)
    assert last == cut / "checkpoint-6"
    assert list(flaws) == ["checkpoint-8"] and flaws["checkpoint-8"].startswith(told)
    folder = RunFolder(cut)
    assert folder.check(resume="last", overwrite=False) == last
    with pytest.raises(UsageError, match="is no whole checkpoint"):
        folder.check(resume=str(cut / "checkpoint-8"), overwrite=False)
    damage(cut / "checkpoint-6")
    with pytest.raises(UsageError, match="no checkpoint in .* is whole: checkpoint-8 is damaged"):
        folder.check(resume="last", overwrite=False)


def test_a_run_goes_on_from_the_one_before(cut, nursery, straight):
    truncate(cut / "checkpoint-8")
    said = resumed(nursery, cut, straight)
    assert "checkpoint-8 is damaged" in said and "Going on from checkpoint-6" in said
    assert "changed by something else" not in said, "the log is as it was"
    assert checkpoints.flaw(cut / "checkpoint-8") is None  # written anew on the way


def test_an_explicit_path_is_an_error(cut, nursery):
    told = truncate(cut / "checkpoint-8")
    path = cut / "checkpoint-8"
    child = nursery.run(["train", "--resume", path, "--output-dir", cut])
    assert child.status == 2 and told in child.said
    assert not (cut / "result.json").exists()


def test_a_damaged_best_checkpoint_is_told_before_training(cut, nursery):
    import json

    best = json.loads((cut / "checkpoint-8" / "trainer_state.json").read_text())["best_global_step"]
    assert best == 8  # the loss falls all the way, so an earlier one is made the best
    state = cut / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text().replace('"best_global_step": 8', '"best_global_step": 6'))
    checkpoints.seal(cut / "checkpoint-8", **{
        k: v for k, v in checkpoints.read(cut / "checkpoint-8").items() if k != "files"
    })  # fmt: skip
    truncate(cut / "checkpoint-6")
    child = nursery.run(["train", "--resume", "--output-dir", cut])
    assert child.status == 2 and "the best weights so far" in child.said, child.said


def test_weights_alone_are_no_checkpoint_to_go_on_from(nursery, straight, ground):
    folder = ground / "weights-only"
    words = [*straight[2].words[:-2], "--save-only-model", "--output-dir", folder]
    assert nursery.run(words).status == 0
    child = nursery.run(["train", "--resume", "--output-dir", folder])
    assert child.status == 2 and "holds weights only" in child.said
    assert "damaged" not in child.said and "Put the files back" not in child.said, child.said


# -- the folder ------------------------------------------------------------------------------------


def test_what_was_being_written_is_cleared_away(cut, nursery, straight):
    (cut / ".unfinished" / "checkpoint-9").mkdir(parents=True)
    (cut / ".metrics.jsonl.abc.part").write_text("half a li")
    (cut / ".adapter.xyz.writing").mkdir()
    (cut / "..adapter.xyz.writing.uvw.writing").mkdir()
    with open(cut / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "loss": 1.0}\n{"step": 9, "ev')
    resumed(nursery, cut, straight)
    assert not [p.name for p in cut.iterdir() if p.name.startswith(".")]


def test_a_done_run_is_only_written_again(straight, nursery, ground):
    folder = ground / "again"
    shutil.copytree(straight[0], folder)
    before = (folder / "checkpoint-9" / "optimizer.pt").stat().st_mtime_ns
    resumed(nursery, folder, straight)
    assert (folder / "checkpoint-9" / "optimizer.pt").stat().st_mtime_ns == before


def test_an_error_takes_no_file_of_the_users(tmp_path):
    (tmp_path / "config.yaml").write_text("r: 8\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError), RunFolder(tmp_path).held():
        raise UsageError("an option that does not fit")
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "notes.txt"}


def test_one_folder_one_process(nursery, straight, tmp_path):
    out = tmp_path / "out"
    words = [*straight[2].words[:-2], "--output-dir", out]
    with RunFolder(out).held():
        child = nursery.run(words)
        assert child.status == 1
        assert f"is in use by process {os.getpid()} on {socket.gethostname()}" in child.said
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert not out.exists()  # nothing was made in it

    child = nursery.start(words)
    while child.count("step") < 2:
        time.sleep(0.001)
    child.signal(signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match=f"is in use by process {child.number}"):
            with RunFolder(out).held():
                pass
    finally:
        child.signal(signal.SIGKILL)
    child.wait()
    assert (out / ".lock").exists()
    with RunFolder(out).held():  # a dead process holds nothing
        pass


def test_a_lock_without_the_systems_help(tmp_path, monkeypatch):
    from lorica.run import lock

    monkeypatch.setattr(lock, "fcntl", None)
    file = tmp_path / ".lock"
    with subprocess.Popen(["sleep", "60"]) as other:
        file.write_text(f"{other.pid} {socket.gethostname()}")
        with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
            lock.take(file)
        other.kill()
    lock.release(file, lock.take(file))
    file.write_text("1 another-machine")
    with pytest.raises(ValueError, match="in use by process 1 on another-machine"):
        lock.take(file)


FORKS = """
import os, signal, sys, time
from pathlib import Path
from lorica.run import lock
lock.take(Path(sys.argv[1]))
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b"x")
    time.sleep(60)
os.read(read, 1)
os.write(1, b"%d\\n" % child)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_outlives_its_run_holds_nothing(tmp_path):
    from lorica.run import lock

    file = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", FORKS, file], stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        worker = int(made.stdout.readline())
        assert made.wait() == -signal.SIGKILL
        try:
            os.kill(worker, 0)  # it lives
            lock.release(file, lock.take(file))
        finally:
            os.kill(worker, signal.SIGKILL)


# -- swapping folders ------------------------------------------------------------------------------


def test_a_name_is_never_without_a_whole_folder(tmp_path, monkeypatch):
    """Where the system swaps, an error right after leaves the new folder; where it can't, the old
    one is put back by whoever comes next."""
    out = tmp_path / "out"

    def write(text: str) -> None:
        with folders.writing(out, overwrite=True, marks=("a",)) as aside:
            (aside / "a").write_text(text)

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    write("one")
    if folders._exchange(tmp_path, tmp_path):  # a folder with itself: offered here
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", fail)
            with pytest.raises(KeyboardInterrupt):
                write("two")
        assert (out / "a").read_text() == "two"
        folders.mend(out)
    write("three")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    replace = os.replace

    def killed_between(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(source) == out:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_exchange", lambda one, other: False)
        patch.setattr(os, "replace", killed_between)
        with pytest.raises(KeyboardInterrupt):
            write("four")
    assert not out.exists()
    folders.mend(out)
    assert (out / "a").read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_exchange", lambda one, other: False)
        write("five")
    assert (out / "a").read_text() == "five"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_old_checkpoints_lose_their_name_before_their_files(tmp_path, monkeypatch):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "a").write_text("a")
    best, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"

    def fail(path: Path, **kwargs: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.rotate(tmp_path, 2, {best, last})
    assert all((path / "a").is_file() for path in checkpoints.found(tmp_path))
    checkpoints.rotate(tmp_path, 1, {best, last})
    assert checkpoints.found(tmp_path) == [best, last]


# -- errors of the disk ----------------------------------------------------------------------------


def test_a_file_that_may_not_grow(cut, nursery, straight):
    """RLIMIT_FSIZE: the kernel refuses the write, in torch's writer and in safetensors'."""
    for step in (6, 8):
        shutil.rmtree(cut / f"checkpoint-{step}")
    shutil.copytree(cut.parent / "straight" / "checkpoint-6", cut / "checkpoint-6")
    size = (cut / "checkpoint-6" / "optimizer.pt").stat().st_size
    child = nursery.run(["train", "--resume", "--output-dir", cut], largest=size - 1)
    assert child.status == 1
    assert "checkpoint-8 was not written to" in child.said and "checkpoint-6 is there" in child.said
    assert [p.name for p in checkpoints.found(cut)] == ["checkpoint-6"]
    assert checkpoints.flaw(cut / "checkpoint-6") is None
    assert not (cut / ".unfinished").exists()
    resumed(nursery, cut, straight)


def test_results_that_cannot_be_written(straight, nursery, ground):
    """All steps are taken, the last checkpoint is there, and the model does not fit."""
    folder = ground / "results"
    shutil.copytree(straight[0], folder)
    unfinish(folder)
    size = (straight[0] / "model" / "model.safetensors").stat().st_size
    child = nursery.run(["train", "--resume", "--output-dir", folder], largest=size - 1)
    assert child.status == 1, child.said
    assert "what was trained was not written to" in child.said
    assert "File too large" in child.said and "checkpoint-9 is there" in child.said
    assert not (folder / "model").exists() and not (folder / "result.json").exists()
    resumed(nursery, folder, straight)


@pytest.fixture
def disk(ground):
    """`disk(bytes)` mounts, or grows, a small disk."""
    path, mounted = ground / "disk", []
    path.mkdir(exist_ok=True)

    def size(count: int) -> Path:
        option = f"size={count}" + (",remount" if mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", path], capture_output=True
        )
        if done.returncode:
            pytest.skip("a disk can be mounted by root only")
        mounted.append(path)
        return path

    yield size
    if mounted:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk(disk, straight, nursery):
    one = sum(p.stat().st_size for p in (straight[0] / "checkpoint-8").rglob("*") if p.is_file())
    files = sum(1 for _ in (straight[0] / "checkpoint-8").rglob("*"))
    one += files * 4096 // 2  # whole pages
    out = disk(5 * one // 2) / "out"
    child = nursery.run([*straight[2].words[:-2], "--output-dir", out])
    assert child.status == 1, child.said
    assert "was not written to" in child.said and "are free there" in child.said
    left = checkpoints.found(out)
    assert left and all(checkpoints.flaw(path) is None for path in left)
    assert f"{left[-1].name} is there" in child.said
    assert not (out / ".unfinished").exists()
    disk(64 * MIB)
    resumed(nursery, out, straight)


needs_root = pytest.mark.skipif(
    os.name != "posix" or os.getuid() != 0, reason="only root can become somebody else"
)


@needs_root
def test_a_forbidden_folder(nursery, straight, ground):
    out = ground / "forbidden"
    out.mkdir(mode=0o755)
    for folder in (out, out / "deeper"):
        words = [*straight[2].words[:-2], "--output-dir", folder]
        child = nursery.run(words, user=NOBODY)
        assert child.status == 2
        assert f"`--output-dir {folder}` cannot be written to (Permission denied)" in child.said
    assert not list(out.iterdir())


@needs_root
def test_a_folder_that_becomes_forbidden(cut, nursery, straight):
    for path in (cut, *cut.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    child = nursery.start(["train", "--resume", "--output-dir", cut], user=NOBODY)
    while child.count("step") < 1 and not child.ended():
        time.sleep(0.001)
    cut.chmod(0o555)
    assert child.wait() == 1, child.said
    assert "checkpoint-9 was not written to" in child.said and "Permission denied" in child.said
    assert checkpoints.flaw(cut / "checkpoint-8") is None
    cut.chmod(0o755)
    resumed(nursery, cut, straight, user=NOBODY)


# -- before the first checkpoint -------------------------------------------------------------------


def test_a_run_without_a_checkpoint_begins_again(nursery, straight, tmp_path):
    out = tmp_path / "out"
    words = [*straight[2].words[:-2], "--output-dir", out]
    assert kill(nursery.start(words), Aim("step", 1, 0.0)) == "step"
    assert not checkpoints.found(out)
    changed = nursery.run(["train", "--resume", "--seed", 1, "--output-dir", out])
    assert changed.status == 2 and "`seed` is 42, not 1" in changed.said
    said = resumed(nursery, out, straight)
    assert "has no checkpoint yet" in said


def test_nothing_to_go_on_with(nursery, tmp_path):
    child = nursery.run(["train", "--resume", "--output-dir", tmp_path / "none"])
    assert child.status == 2 and "there is no run in" in child.said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"losses"', '"lossez"'),
        lambda text: text.replace('"bytes": ', '"bytes": 1'),
        lambda text: "[" * 100_000,
        lambda text: json.dumps({"files": {"x" * 5000: {"bytes": 1, "sha256": ""}}, "whole": True}),
        lambda text: '{"files": {}, "whole": true}',
    ],
    ids=["another name", "another size", "nested", "a long name", "an empty list"],
)
def test_a_list_that_was_changed_is_named_and_passed_over(cut, change):
    last, before = checkpoints.found(cut)[-1], checkpoints.found(cut)[-2]
    file = last / checkpoints.LIST
    file.write_text(change(file.read_text()))
    newest, flaws = checkpoints.newest(cut)
    assert newest == before and "is cut or was changed" in flaws[last.name]
    assert last not in checkpoints.resumable(cut)


def test_foreign_lines_in_the_log_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '[]\n{"mine": 1}\n{"step": 2, "seconds": 1.5, "loss": 1.0}\n{"step": 3, "se'
    )
    assert RunFolder(tmp_path).lines() == [{"step": 2, "seconds": 1.5, "loss": 1.0}]


# -- metrics.jsonl in other hands ------------------------------------------------------------------


def forget(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_text("")


def shorten(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))


def spoil(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" + file.read_bytes()[7:])


HANDS = [forget, empty, shorten, spoil]


@pytest.mark.parametrize("change", [forget, spoil])
def test_a_log_that_was_lost_before_the_resumption_is_whole_again(change, cut, nursery, straight):
    change(cut / "metrics.jsonl")
    said = resumed(nursery, cut, straight)  # which compares the lines
    assert f"{cut / 'metrics.jsonl'} was deleted, cut or changed by something else (it held" in said


@pytest.mark.parametrize("change", HANDS)
def test_a_log_that_is_lost_while_a_run_goes_on_is_whole_at_the_end(change, tmp_path, caplog):
    from lorica.run.log import RunLog

    caplog.set_level(logging.WARNING, "lorica")  # a verb run before in this process sets INFO
    log = RunLog(RunFolder(tmp_path), torch.device("cpu"), {})
    state = TrainerState(max_steps=9, log_history=[], num_input_tokens_seen=0)
    args = SimpleNamespace(eval_strategy="steps", eval_steps=3)
    log.begin(state)
    for step in range(1, 7):
        state.global_step, state.epoch = step, step / 10
        names = {"loss": 1 / step, "grad_norm": math.nan} if step % 3 else {"eval_loss": 2 / step}
        state.log_history.append({**names, "epoch": state.epoch, "step": step})
        log.on_log(args, state, None, logs=names)
        if step == 4:
            whole = (tmp_path / "metrics.jsonl").read_text()
            assert not caplog.records
            change(tmp_path / "metrics.jsonl")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith(whole) and [x["step"] for x in log.lines] == [1, 2, 3, 4, 5, 6]
    assert RunFolder(tmp_path).lines() == log.lines and '"grad_norm": null' in text
    assert caplog.text.count("was deleted, cut or changed by something else") == 1
    change(tmp_path / "metrics.jsonl")
    log.check()
    assert (tmp_path / "metrics.jsonl").read_text() == text, "the end looks once more"
    os.utime(tmp_path / "metrics.jsonl", (1, 1))
    log.check()
    assert caplog.text.count("was deleted, cut") == 2, "touched is not changed"


# -- what is said of a disk ------------------------------------------------------------------------


def full(folder: Path) -> str:
    """What a run is told that cannot write its first checkpoint."""
    with pytest.raises(OSError) as caught, checkpoints.saving("checkpoint-1", folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return str(caught.value)


def test_the_way_out_of_a_full_disk_is_one_that_is_open(tmp_path):
    """The folder of a run that has logged a step remains, so starting again would be refused."""
    folder = RunFolder(tmp_path / "out")
    with contextlib.suppress(OSError), folder.held():
        folder.write("config.yaml", "# Written by lorica\nseed: 1\n")
        said = full(folder.path)
        raise OSError
    assert "start again" in said and not folder.path.exists()
    with contextlib.suppress(OSError), folder.held():
        folder.write("config.yaml", "# Written by lorica\nseed: 1\n")
        folder.write("metrics.jsonl", '{"step": 1, "seconds": 1.0, "loss": 1.0}\n')
        said = full(folder.path)
        raise OSError
    assert "No space left on device" in said and "start again" not in said
    assert said.endswith("the same command with `--resume` begins again at the first step")
    assert folder.check(resume="last", overwrite=False) is None
    with pytest.raises(UsageError, match="holds a run already"):
        folder.check(resume=None, overwrite=False)


@pytest.mark.parametrize("logs", [True, False], ids=["a line", "a checkpoint"])
def test_a_folder_that_was_moved_is_called_moved(logs, tmp_path):
    """Whichever is written next; no second folder of the old name comes to be."""
    from lorica.run.log import RunLog

    out, there = tmp_path / "out", tmp_path / "there"

    class Mover(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                out.rename(there)

    model = llama()
    lorica.attach(model, "lora", r=2, verbose=False)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_steps=2, logging_steps=1 if logs else 100,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 16, "labels": [[1, 2, 3]] * 16})
    log = RunLog(RunFolder(out), torch.device("cpu"), {})
    run = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[log, Mover()])
    with pytest.raises(OSError) as caught:
        run.train()
    said = str(caught.value)
    assert f"`{out}` is gone. It was moved or removed while this ran" in said
    assert "--resume" in said and "There is no checkpoint" not in said
    assert not out.exists() and checkpoints.flaw(there / "checkpoint-2") is None
