"""Odd places and odd values: pipes, devices, full disks, folders that cannot be renamed, numbers
and patterns that nobody means."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io as streams
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from files import edit

import lorica
import models
from lorica import formats
from lorica.cli import main
from lorica.formats import atomic_folder as folders
from lorica.formats.atomic_folder import check_free, writing
from lorica.formats.compressed import pack, unpack
from models import perturb


def run(capsys, *words: object) -> tuple[int, str, str]:
    """Status, standard output and error of a verb; never a traceback."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "LORICA_DEBUG" not in err, err
    return status, out, err


def failure(*words: object) -> str:
    """The one message of a verb that fails."""
    said = streams.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([str(word) for word in words]) == 1
    message = said.getvalue().strip().splitlines()[-1]
    assert "LORICA_DEBUG" not in message, message
    return message


@contextlib.contextmanager
def no_longer_files(most: int):
    """A disk that takes no file above this size: the writers of every library see the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    models.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """One saved adapter on it; copy it before changing it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    perturb(adapters)
    return lorica.save(adapters, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def own(adapter, tmp_path) -> Path:
    return shutil.copytree(adapter, tmp_path / "own")


@pytest.fixture
def theirs(own) -> Path:
    """The same as PEFT would have written it."""
    (own / "lorica.json").unlink()
    return own


# -- where answers go ------------------------------------------------------------------------------


@pytest.fixture
def ask(capsys, tmp_path, monkeypatch):
    """`ask(output)` answers two prompts at once, or, if it `may` not, fails there."""
    from lorica.cli.generate import _Work
    from lorica.inference.generate import Answer

    allowed = []

    def answer(self, prompts, on_text=None):
        assert allowed[-1], "it began to answer"
        return [[Answer(f"Δ{i}\ud800", (1, 2), "eos")] for i in range(len(prompts))]

    monkeypatch.setattr(_Work, "answer", answer)
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)

    def call(output: object, *, may: bool = True) -> tuple[int, str, str]:
        allowed.append(may)
        return run(capsys, "generate", "--file", file, "--output", output)

    return call


def answers(text: str) -> list[str]:
    return [json.loads(line)["completion"] for line in text.splitlines()]


def test_answers_go_into_a_pipe(ask, tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    status, _, err = ask(pipe, may=False)
    assert status == 2 and "nobody reads from it" in err
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    for _ in range(200):  # until it has opened the pipe
        status, _, err = ask(pipe)
        if "nobody reads" not in err:
            break
    reader.join(20)
    assert status == 0, err
    assert answers(got[0]) == ["Δ0\ud800", "Δ1\ud800"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe", "prompts.txt"]


def test_a_device_stays_one(ask, tmp_path):
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.close(os.open(device, os.O_WRONLY))
    except OSError:
        pytest.skip("devices can't be made here")
    status, _, err = ask(device)
    assert status == 0, err
    assert stat.S_ISCHR(device.stat().st_mode)
    assert names(tmp_path) == ["device", "prompts.txt"]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("/proc/answers.jsonl", "cannot be written"),
        ("a" * 300, "at most 255 bytes"),
        ("dangling", "cannot be written"),
        ("nowhere/answers.jsonl", "which does not exist"),
        ("/dev/fd/1", "leave it out"),
        ("/dev/stdout", "leave it out"),
    ],
)
def test_a_place_that_takes_no_answers_is_told_before_there_are_any(ask, tmp_path, output, says):
    if output.startswith("/") and not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "file")
    status, _, err = ask(output, may=False)
    assert status != 0 and says in err
    assert names(tmp_path) == ["dangling", "prompts.txt"]


def test_a_link_is_written_through(ask, tmp_path):
    (tmp_path / "real.jsonl").write_text("old\n" * 100)
    (tmp_path / "link").symlink_to("real.jsonl")
    assert ask("link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert len(answers((tmp_path / "real.jsonl").read_text())) == 2
    assert names(tmp_path) == ["link", "prompts.txt", "real.jsonl"]


@pytest.mark.parametrize("refused", ["touch", "replace"])
def test_a_file_that_cannot_be_replaced_is_written_into(ask, tmp_path, monkeypatch, refused):
    """A folder that takes no file, or a file that is mounted by itself."""

    def fail(*args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "a.jsonl").write_text("old\n" * 100)
    monkeypatch.setattr(Path, refused, fail)
    status, _, err = ask("a.jsonl")
    assert status == 0, err
    assert len(answers((tmp_path / "a.jsonl").read_text())) == 2
    assert names(tmp_path) == ["a.jsonl", "prompts.txt"]


def test_a_full_disk_leaves_nothing_of_the_answers(ask, tmp_path, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.jsonl").write_text("old\n")
    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = ask("a.jsonl")
    assert status == 1 and "No space left" in err
    assert names(tmp_path) == ["a.jsonl", "prompts.txt"]
    assert (tmp_path / "a.jsonl").read_text() == "old\n"


# -- what a verb says ------------------------------------------------------------------------------


def spoken(*words: object, **where) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **where.pop("env", {})}
    done = subprocess.run(
        [sys.executable, "-m", "lorica", *map(str, words)],
        stderr=subprocess.PIPE, env=env, timeout=120, **where,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    return done


def test_an_encoding_without_the_letter(adapter, capsys, monkeypatch):
    held = streams.BytesIO()
    monkeypatch.setattr(sys, "stdout", streams.TextIOWrapper(held, encoding="ascii"))
    assert main(["inspect", str(adapter)]) == 0
    assert rb"norm of \u0394W" in held.getvalue()
    assert sys.stdout.errors == "strict", "as it was"
    copy = adapter.parent / "Δ\U0001f600"
    shutil.copytree(adapter, copy)
    held.truncate(0)
    held.seek(0)
    assert main(["inspect", str(copy), "--json"]) == 0
    assert json.loads(held.getvalue().decode("ascii"))["path"] == str(copy)


def test_a_full_standard_output_is_one_message(adapter):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    for words in (["inspect", adapter], ["--version"]):
        with open("/dev/full", "wb") as full:
            done = spoken(*words, stdout=full)
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr


def test_standard_output_may_be_missing(adapter, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(adapter)]) == 0


# -- folders that stay where they are --------------------------------------------------------------


def mark(folder: Path, text: str) -> None:
    (folder / "lorica.json").write_text(text)
    (folder / "lorica.safetensors").write_text(text)


def check_written(path: Path) -> None:
    """A new folder and one that is overwritten, at `path`, which stays the folder it is."""
    same = path.stat().st_ino
    with writing(path, overwrite=False) as fresh:
        mark(fresh, "new")
    (path / "notes").mkdir()
    (path / "notes" / "a.txt").write_text("a")
    with writing(path, overwrite=True) as fresh:
        mark(fresh, "newer")
    with pytest.raises(OSError, match="gone"), writing(path, overwrite=True) as fresh:
        mark(fresh, "never")
        raise OSError("gone")
    assert names(path) == ["lorica.json", "lorica.safetensors", "notes"]
    assert (path / "lorica.json").read_text() == "newer"
    assert (path / "notes" / "a.txt").read_text() == "a"
    assert path.stat().st_ino == same


@pytest.mark.parametrize("given", [".", "the whole path"])
def test_the_current_folder_can_be_written_to(tmp_path, monkeypatch, given):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_written(Path(given) if given == "." else tmp_path / "here")
    assert names(tmp_path) == ["here"]


@pytest.mark.parametrize("known", [True, False])
def test_a_mount_can_be_written_to(tmp_path, monkeypatch, known):
    """No rename reaches such a folder; `known`: the system tells that it is one."""
    path = tmp_path / "volume"
    path.mkdir()
    replace = os.replace

    def busy(a, b):
        if path in (Path(a), Path(b)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(a, b)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os.path, "ismount", lambda at: known and Path(at) == path)
    check_written(path)
    assert names(tmp_path) == ["volume"]


def test_moving_in_that_fails_brings_back_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "volume"
    path.mkdir()
    mark(path, "old")
    monkeypatch.setattr(os.path, "ismount", lambda at: Path(at) == path)
    move = shutil.move

    def full(source, target):
        if Path(target).parent == path and ".writing" in str(source):
            if Path(source).suffix == ".json":
                Path(target).write_text("half")  # as a copy to another disk leaves it
                raise OSError(errno.ENOSPC, "No space left on device")
        return move(source, target)

    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OSError, match="No space"), writing(path, overwrite=True) as fresh:
        mark(fresh, "new")
    assert names(path) == ["lorica.json", "lorica.safetensors"]
    assert {f.read_text() for f in path.iterdir()} == {"old"}


def test_what_a_killed_process_left_in_a_folder_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".out.x1.writing").mkdir()
    check_free(tmp_path, overwrite=False)
    with writing(tmp_path, overwrite=False) as fresh:
        mark(fresh, "new")
    assert names(tmp_path) == ["lorica.json", "lorica.safetensors"]
    (tmp_path / ".out.x1.old").mkdir()  # may be all there is of somebody's adapter
    (tmp_path / "lorica.json").unlink()
    with pytest.raises(ValueError, match="other things"):
        check_free(tmp_path, overwrite=True)


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for overwrite in (False, True):
        with writing(tmp_path / "link", overwrite=overwrite) as fresh:
            mark(fresh, str(overwrite))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "lorica.json").read_text() == "True"
    assert names(tmp_path) == ["link", "real"]


def test_the_home_folder_has_a_short_name(capsys, base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    both = ("--adapter=~/adapter", "--model=~/base")
    for words in (
        ("merge", *both, "--output-dir=~/m"),
        ("export", *both, "--output-dir=~/e", "--r", 1),
        ("inspect", "~/adapter"),
    ):
        status, _, err = run(capsys, *words)
        assert status == 0, err
    assert names(tmp_path) == ["adapter", "base", "e", "m"]


# -- compressed models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=16, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    adapters = lorica.attach(GPT2LMHeadModel(config), "fade", r=2, verbose=False)
    for _, layer in adapters:
        combine: Any = layer.combine
        combine.fade_(0.0)
    return pack(adapters, tmp_path_factory.mktemp("small") / "out").path


@pytest.fixture
def packed(small, tmp_path) -> Path:
    return shutil.copytree(small, tmp_path / "packed")


def test_a_folders_own_code_is_never_run(packed, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (packed / "conf.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import GPT2Config\n"
        "class Evil(GPT2Config):\n    model_type = 'evil'\n"
    )
    edit(packed / "config.json", model_type="evil", auto_map={"AutoConfig": "conf.Evil"})
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")
    with pytest.raises(ValueError, match="code of its own, which is never run"):
        unpack(packed)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("compressed.json", {"tied": {"a": ["b"]}}, "'tied'"),
        ("compressed.json", {"computed": [["b"]]}, "'computed'"),
        ("compressed.json", {"files": {"compressed.safetensors": [1]}}, "'files'"),
        ("compressed.json", {"ranks": {"a": "b"}}, "'ranks'"),
        ("compressed.json", {"class": "T5ForConditionalGeneration"}, "T5ForConditionalGeneration"),
        ("config.json", {"n_head": 0}, "`n_head` is 0"),
        ("config.json", {"n_embd": -16}, "`n_embd` is -16"),
        ("config.json", {"n_embd": "x"}, "n_embd"),
        ("config.json", {"n_positions": 10**13}, "n_positions"),
        ("config.json", {"activation_function": "nope"}, "`activation_function` is 'nope'"),
        ("config.json", "[]", "config.json"),
        ("config.json", "[" * 100_000, "nested more than 100 levels"),
        ("generation_config.json", {"max_new_tokens": "x"}, "generation_config.json"),
        ("generation_config.json", "[]", "generation_config.json"),
        ("generation_config.json", "[" * 100_000, "generation_config.json"),
        ("generation_config.json", "{", "generation_config.json"),
    ],
)
def test_a_changed_file_of_a_compressed_model(packed, file, changes, says):
    if isinstance(changes, str):
        (packed / file).write_text(changes)
    else:
        edit(packed / file, **changes)
    with pytest.raises(ValueError) as caught:
        unpack(packed)
    assert says in str(caught.value) and file in str(caught.value)
    assert str(packed) in str(caught.value)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


# -- numbers and patterns --------------------------------------------------------------------------

FLAWED = ["(", "a{99999999999}", "(?i)q_proj", "[", "*"]


@pytest.mark.parametrize("pattern", FLAWED)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_none(own, capsys, name, pattern):
    with pytest.raises(ValueError, match="no regular expression"):
        lorica.Recipe.parse("lora", **{name: {pattern: 4}})
    recipe = json.loads((own / "lorica.json").read_text())["recipe"]
    edit(own / "lorica.json", recipe={**recipe, name: {pattern: 4}})
    with pytest.raises(ValueError, match="lorica.json.*no regular expression"):
        lorica.load(models.llama(), own)
    (own / "lorica.json").unlink()
    edit(own / "adapter_config.json", **{name: {pattern: 4}})
    for read in (formats.inspect, lambda path: lorica.load(models.llama(), path)):
        with pytest.raises(ValueError, match="adapter_config.json.*no regular expression"):
            read(own)
    status, _, err = run(capsys, "inspect", own)
    assert status == 1 and f"`{name}`" in err


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}"])
def test_a_target_that_is_no_regular_expression(theirs, pattern):
    edit(theirs / "adapter_config.json", target_modules=pattern)
    with pytest.raises(ValueError, match="no regular expression"):
        lorica.load(models.llama(), theirs)
    with pytest.raises(ValueError, match="no regular expression"):
        lorica.attach(models.llama(), "lora", target_modules=pattern)


def test_a_number_as_a_pattern_is_the_name_of_a_module():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    adapters = lorica.attach(model, "lora", r=2, rank_pattern={1: 4}, verbose=False)
    assert [layer.site.r for _, layer in adapters] == [2, 4]
    assert adapters.recipe.rank_pattern == {"1": 4}


@pytest.mark.parametrize("pattern", [None, True, 1.5, -1, b"q_proj", ("q_proj",)])
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_text(name, pattern):
    with pytest.raises(ValueError, match=f"`{name}` has .* as a pattern, which is no text"):
        lorica.Recipe.parse("lora", **{name: {pattern: 4}})
    with pytest.raises(ValueError, match=f"`{name}` has '1' twice"):
        lorica.Recipe.parse("lora", **{name: {1: 4, "1": 8}})


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e39])
@pytest.mark.parametrize("name", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_float32_does_not_hold(theirs, name, value):
    changes = {name: value if name == "lora_alpha" else {"q_proj": value}}
    with pytest.raises(ValueError, match=name):
        lorica.Recipe.parse("lora", **changes)
    edit(theirs / "adapter_config.json", **changes)
    for read in (formats.inspect, lambda path: lorica.load(models.llama(), path)):
        with pytest.raises(ValueError, match=f"adapter_config.json.*{name}") as caught:
            read(theirs)
        assert len(str(caught.value)) < 1000


def test_an_alpha_that_vanishes_over_the_rank():
    assert lorica.Recipe.parse("lora", r=2, lora_alpha=1e-30).lora_alpha == 1e-30
    for fields in (
        {"lora_alpha": 1e-300},
        {"lora_alpha": 1.5e-37, "r": 2},
        {"lora_alpha": 1e-36, "r": 2, "rank_pattern": {"q": 64}},
        {"alpha_pattern": {"q_proj": 1e-300}},
    ):
        with pytest.raises(ValueError, match="also divided by the rank"):
            lorica.Recipe.parse("lora", **fields)


@pytest.mark.parametrize("name", ["r", "rank_pattern"])
def test_a_rank_that_no_layer_has(theirs, name):
    changes = {name: 10**400 if name == "r" else {"q_proj": 10**400}}
    with pytest.raises(ValueError, match="layer's size"):
        lorica.Recipe.parse("rslora", **changes)
    edit(theirs / "adapter_config.json", **changes, use_rslora=True)
    for read in (formats.inspect, lambda path: lorica.load(models.llama(), path)):
        with pytest.raises(ValueError, match="adapter_config.json.*layer's size"):
            read(theirs)


def test_an_export_of_a_rank_that_no_layer_needs(capsys, base, adapter, tmp_path):
    words = ("export", "--adapter", adapter, "--model", base, "--output-dir", tmp_path / "out")
    for r in (5_000_000_000, 10**30, 65):
        status, _, err = run(capsys, *words, "--r", r)
        assert status == 1 and "min(in, out) of the largest layer" in err and "at most" in err
    adapters = lorica.attach(torch.nn.Sequential(torch.nn.Linear(8, 4)), "lora", verbose=False, r=2)
    for r in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="at least 1"):
            formats.export(adapters, tmp_path / "out", r=r)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`r=4`"):
        formats.export(adapters, tmp_path / "out", r=5)
    assert not (tmp_path / "out").exists()
    done: Any = formats.export(adapters, tmp_path / "out", r=4)
    assert done.r == 4


def test_an_answer_pattern_that_is_too_large(capsys, base):
    words = ("eval", "--model", base, "--exact-match", "--answer-pattern", "a{99999999999}")
    status, _, err = run(capsys, *words)
    assert status == 2 and "too large" in err


@pytest.mark.parametrize("size", ["nonsense", "0", "0GB", "-1GB", "5", "GB"])
def test_a_size_of_shards_that_is_none(capsys, adapter, tmp_path, size):
    words = ("merge", "--adapter", adapter, "--output-dir", tmp_path / "out")
    status, _, err = run(capsys, *words, f"--max-shard-size={size}")
    assert status == 2 and f"--max-shard-size {size}" in err and "5GB" in err


def test_a_temperature_that_no_logit_stands():
    from lorica.inference.generate import Decoding

    assert Decoding(temperature=1e-8).samples
    with pytest.raises(ValueError, match="temperature.*1e-30"):
        Decoding(temperature=1e-320)


# -- a disk that refuses ---------------------------------------------------------------------------


def test_what_the_disk_refuses_is_told_with_the_folder_and_leaves_nothing(base, adapter, tmp_path):
    """safetensors, which has an error of its own, as transformers calls it and as Lorica does."""
    for words in (
        ("merge", "--adapter", adapter, "--model", base),
        ("export", "--adapter", adapter, "--model", base, "--to", "peft"),
    ):
        with no_longer_files(2000):
            message = failure(*words, "--output-dir", tmp_path / "new" / "out")
        assert f"`{tmp_path}/new/out` was not written: File too large (" in message, message
        assert "MiB are free there, and its weights need 0." in message
        assert message.endswith("or name a folder elsewhere") and names(tmp_path) == []
    adapters = lorica.attach(models.llama(), "lora", r=2, verbose=False)
    lorica.save(adapters, tmp_path / "kept")
    before = {entry: entry.read_bytes() for entry in (tmp_path / "kept").iterdir()}
    perturb(adapters)
    with no_longer_files(2000), pytest.raises(folders.NotWritten, match="Nothing of it is left"):
        lorica.save(adapters, tmp_path / "kept", overwrite=True)
    assert names(tmp_path) == ["kept"]
    assert {entry: entry.read_bytes() for entry in (tmp_path / "kept").iterdir()} == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device ("),
        (Exception("No space left on device (os error 28)"), "Make room there, or name a folder"),
        (PermissionError(errno.EACCES, "x"), "Permission denied ("),
        (OSError(errno.EROFS, "x"), "Make its parent folder writable, or name a folder"),
    ],
)
def test_a_writers_error_in_any_form_is_told(error, said, tmp_path):
    with pytest.raises(folders.NotWritten) as caught, writing(tmp_path / "a/b", overwrite=False):
        raise error
    assert said in str(caught.value) and names(tmp_path) == []


def test_an_error_that_is_not_the_disks_is_left_alone(tmp_path):
    """Of the values, or of a file that was read."""
    for error in (ValueError("r=0"), FileNotFoundError(errno.ENOENT, "x", "/elsewhere/base.json")):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "a", overwrite=False):
            raise error
        assert caught.value is error


def test_a_parent_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    def refuses(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".out.writing"))

    monkeypatch.setattr(folders.tempfile, "mkdtemp", refuses)
    adapters = lorica.attach(models.llama(), "lora", r=2, verbose=False)
    with pytest.raises(folders.NotWritten, match="/out` was not written: Permission denied"):
        lorica.save(adapters, tmp_path / "out")


# -- JSON within JSON ------------------------------------------------------------------------------


def deep(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [101, 300, 900, 5000])
def test_json_nested_too_deeply_is_told_in_every_file(levels, own, base, tmp_path):
    from lorica.data import read
    from lorica.run.config import read_defaults
    from lorica.run.folder import RunFolder
    from lorica.run.load_model import read_config
    from lorica.run.quantization import _fields

    said = "nested more than 100 levels deep"
    model = shutil.copytree(base, tmp_path / "model")
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace("{", '{"more": ' + deep(levels) + ",", 1)
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": ' + deep(levels) + "}\n")
    (tmp_path / "rows.json").write_text('[{"text": ' + deep(levels) + "}]")
    for name in ("adapter_config.json", "lorica.json"):
        kept = (own / name).read_text()
        (own / name).write_text(deep(levels))
        with pytest.raises(ValueError, match=said) as caught:
            formats.inspect(own)
        assert name in str(caught.value)
        (own / name).write_text(kept)
    for trust in (False, True):
        with pytest.raises(ValueError, match=said):
            read_config(str(model), trust_remote_code=trust)
    with pytest.raises(ValueError, match=said):
        _fields(deep(levels))
    for name in ("rows.jsonl", "rows.json"):
        with pytest.raises(ValueError, match="lists within lists beyond any need"):
            read(str(tmp_path / name))
    (tmp_path / "metrics.jsonl").write_bytes(
        f'{{"step": 1, "seconds": 1, "a": {deep(levels)}}}\n'.encode()
        + b'\xff\xfe{"step": 2}\n{"step": 3, "seconds": 1}\n'
    )
    assert [line["step"] for line in RunFolder(tmp_path).lines()] == [3]
    (tmp_path / "defaults.json").write_text(deep(levels))
    with pytest.raises(ValueError, match="defaults.json was changed"):
        read_defaults(tmp_path)
