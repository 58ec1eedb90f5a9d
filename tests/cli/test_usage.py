"""What is wrong with a call is said in one message, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorica.cli._parse import read_mapping
from lorica.run.folder import RunFolder


def refused(ran, tmp_path: Path, status: int, *parts: str) -> None:
    """Exit status, one message, no traceback, nothing left behind."""
    assert ran.status == status, ran.err
    for part in parts:
        assert part in ran.err, ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("lorica: ") <= 1
    assert not (tmp_path / "out").exists()
    if ran.out:
        assert set(ran.json) == {"error", "status"} and ran.json["status"] == status


METHODS = [
    ("unknown word", ["--method", "dorra"], "did you mean `dora`"),
    ("two on one axis", ["--method", "olora+pissa"], "both choose the axis `init`"),
    ("r=0", ["--r", "0"], "at least 1"),
    ("argument", ["--method", "pissa(nitter=3)"], "`pissa` has no argument `nitter`"),
    ("no effect", ["--method", "full", "--r", "4"], "no effect"),
    ("optim", ["--optim", "sgd"], "is not the rule of the method `lora`"),
    ("flag", ["--lerning-rate", "1"], "Did you mean `--learning-rate`"),
    ("their flag", ["--weight-decai", "1"], "Did you mean `--weight-decay`"),
    ("stray word", ["--bf16", "what"], "`what` is no option"),
    ("their value", ["--save-steps", "often"], "save"),
    ("both lengths", ["--max-steps", "3", "--num-train-epochs", "1"], "the length of a run"),
    ("no evaluation", ["--early-stopping-patience", "2"], "something to evaluate on"),
    ("their evaluation", ["--eval-steps", "2"], "something to evaluate on"),
    ("warmup", ["--warmup-ratio", "2"], "fraction of the steps"),
    ("resume", ["--resume"], "there is no run in"),
    ("hash", ["--ignore-base-hash"], "no effect without `--adapter`"),
    ("scheduler", ["--lr-scheduler-type", "cosin"], "cosin"),
    ("too long", ["--max-length", "500"], "ends at 64 tokens"),
    ("shards on the CPU", ["--fsdp", "full_shard", "--use-cpu"], "shards over accelerators only"),
    ("flat shards", ["--fsdp", "full_shard", "--fsdp-config", '{"version": 1}'], '`"version": 2`'),
    ("shards and a merge", ["--method", "relora", "--fsdp", "full_shard"], "writes a whole model"),
]


@pytest.mark.parametrize("words, part", [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_wrong_usage_is_status_2(train, tmp_path, words, part):
    refused(train(*words, steps=None), tmp_path, 2, part)


def test_wrong_kind_of_value_is_status_2(train, tmp_path):
    ran = train("--r", "many")
    refused(ran, tmp_path, 2, "--r", "a whole number is wanted")


FAILURES = [
    ("target", ["--target-modules", "q_prj"], "did you mean 'q_proj'"),
    ("large r", ["--r", "999"], "is larger than min(in, out)"),
    ("layers", ["--layers-to-transform", "7"], "no target module in block 7"),
    ("column", ["--columns", "prompt=question"], "question"),
    ("not an adapter", ["--adapter", "."], "no adapter"),
]


@pytest.mark.parametrize("words, part", [m[1:] for m in FAILURES], ids=[m[0] for m in FAILURES])
def test_what_does_not_fit_is_status_1(train, tmp_path, words, part):
    refused(train(*words), tmp_path, 1, part)


def test_data_that_is_wrong_is_named_with_file_and_line(train, lorica, bert, tmp_path):
    refused(train(data=tmp_path / "none.jsonl"), tmp_path, 1, "no file or folder", "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    refused(train(data=broken), tmp_path, 1, "broken.jsonl", "line 2")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(train(data=empty), tmp_path, 1, "no rows")
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"colour": "red"}\n')
    refused(train(data=strange), tmp_path, 1, "fit no shape of data")
    known = tmp_path / "known.csv"
    known.write_text("text,label\n" + "a cat,bad\nthe dog,good\n" * 4)
    other = tmp_path / "other.csv"
    other.write_text("text,label\na cat,ugly\n")
    ran = lorica("train", "--model", bert, "--data", known, "--eval-data", other, "--output-dir",
                 tmp_path / "out")  # fmt: skip
    refused(ran, tmp_path, 1, "ugly", "outside of the 2 classes", "other.csv")


def test_models_that_are_not_there(lorica, text, tmp_path):
    out = ("--data", text, "--output-dir", tmp_path / "out")
    refused(lorica("train", "--model", tmp_path / "no", *out), tmp_path, 1, "does not exist")
    refused(lorica("train", "--model", tmp_path, *out), tmp_path, 1, "no config.json")
    refused(lorica("train", "--model", "no-one/nothing", *out), tmp_path, 1, "cannot load a model")


def test_broken_adapters_are_refused(train, tmp_path):
    assert train("--r", 2, steps=2, out="first").status == 0
    good = tmp_path / "first" / "adapter"
    for name, change in (
        ("truncated", lambda data: data[: len(data) // 2]),
        ("tampered", lambda data: data[:-4] + b"\x01\x02\x03\x04"),
    ):
        bad = tmp_path / name
        shutil.copytree(good, bad)
        file = bad / "adapter_model.safetensors"
        file.chmod(0o644)
        file.write_bytes(change(file.read_bytes()))
        refused(train("--adapter", bad), tmp_path, 1, "adapter_model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(good, other)
    (other / "lorica.json").unlink()
    (other / "adapter_config.json").write_text('{"hello": "world"}')
    refused(train("--adapter", other), tmp_path, 1, "adapter_config.json")


# -- the run's folder ------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(train, tmp_path):
    out = tmp_path / "out"
    assert train("--r", 2, steps=2).status == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    ran = train("--r", 2, steps=2)
    assert ran.status == 2 and "--resume" in ran.err and "--overwrite-output-dir" in ran.err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (out / "mine.txt").write_text("keep me")
    again = train("--r", 1, "--overwrite-output-dir", steps=2)
    assert again.status == 0 and again.json["recipe"]["r"] == 1, again.err
    assert (out / "mine.txt").read_text() == "keep me"


def test_two_processes_do_not_share_a_folder(train, tmp_path):
    out = tmp_path / "out"
    with RunFolder(out).held():
        ran = train("--r", 2, steps=1)
        assert ran.status == 1 and "in use by process" in ran.err
    out.mkdir(exist_ok=True)
    (out / ".lock").write_text("12 elsewhere")  # left by a process that was killed
    ran = train("--r", 2, steps=1)
    assert ran.status == 0, ran.err
    assert not (out / ".lock").exists()


def test_a_loss_that_is_no_number_stops_the_run(train, tmp_path):
    ran = train("--learning-rate", "1e18", "--warmup-ratio", 0, "--max-grad-norm", 0)
    assert ran.status == 1 and "diverged" in ran.err
    assert not (tmp_path / "out" / "adapter").exists()


# -- YAML ------------------------------------------------------------------------------------------


def yaml_run(lorica, tmp_path, text: str, *words: object):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return lorica("train", file, "--output-dir", tmp_path / "out", *words)


@pytest.mark.parametrize(
    "text, part",
    [
        ("lerning_rate: 1", "line 1: unknown key `lerning_rate`. Did you mean `learning_rate`"),
        (
            "r: 4\nweight_decai: 1",
            "line 2: unknown key `weight_decai`. Did you mean `weight_decay`",
        ),
        ("r: 4\nr: 5", "line 2: `r` stands there twice"),
        ("seed: 1\nr: many", "line 2: `r`: a whole number is wanted"),
        ("bf16: maybe", "line 1: `bf16`: true or false is wanted"),
        ("r: {a: 1}", "line 1: `r`: INT is wanted, not a mapping"),
        ("method: {dora: 3}", "line 1: `method`: 'dora' takes a mapping"),
        ("- a\n- b", "line 1: a mapping"),
        ("a: [1,", "this is no YAML"),
        ("save_steps: often", "line 1"),
        ("resume: x\nresume_from_checkpoint: y", "line 2: `resume_from_checkpoint` says again"),
    ],
)
def test_yaml_mistakes_are_named_with_their_line(lorica, tmp_path, text, part):
    refused(yaml_run(lorica, tmp_path, text), tmp_path, 2, "run.yaml", part)


def test_yaml_and_flags(lorica, llama, text, tmp_path):
    config = f"""
model: {llama}
data: {text}
method: {{dora: null, pissa: {{niter: 4}}}}
r: 2
learning_rate: 1e-3        # a text in YAML 1.1
target_modules: [q_proj, v_proj]
weight_decay: 1e-2
max_steps: 9
bf16: false
"""
    ran = yaml_run(lorica, tmp_path, config, "--max-steps", 2, "--bf16", "false", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["steps"] == 2 and ran.json["method"] == "dora+pissa(niter=4)"
    assert ran.json["recipe"]["target_modules"] == ["q_proj", "v_proj"]
    assert "weight_decay: 0.01" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_yaml_file_that_is_not_there(lorica, tmp_path):
    ran = lorica("train", tmp_path / "no.yaml")
    refused(ran, tmp_path, 2, "cannot read", "no.yaml")


def test_a_pipe_into_which_nobody_writes(lorica, tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    ran = lorica("train", tmp_path / "run.yaml")
    refused(ran, tmp_path, 2, "cannot read", "nothing is written into it")


def test_a_pipe_that_a_command_fills_is_read(tmp_path):
    """As `lorica train <(command)` has it, however slow the command is."""
    read, write = os.pipe()
    filling = threading.Timer(0.2, lambda: (os.write(write, b"r: 4\n"), os.close(write)))
    filling.start()
    assert read_mapping(Path(f"/dev/fd/{read}"))["r"][0] == 4
    filling.join()
    os.close(read)


# -- the process -----------------------------------------------------------------------------------


def process(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorica", *words],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **more},
    )  # fmt: skip


HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "peft", "accelerate")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["targets", "--help"],
                                   ["train", "--r", "x"]])  # fmt: skip
def test_help_and_mistakes_import_nothing_heavy(words):
    code = f"""
import sys
from lorica.cli import main
status = main({words!r})
heavy = [m for m in {HEAVY!r} if m in sys.modules]
assert not heavy, heavy
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (2 if "x" in words else 0), done.stderr
    assert "AssertionError" not in done.stderr


def test_every_verb_is_listed_and_has_help(lorica):
    from lorica.cli import verbs

    overview = lorica("--help")
    assert overview.status == 0
    for verb in verbs():
        assert f"\n  {verb} " in overview.out
        ran = lorica(verb, "--help")
        assert ran.status == 0 and f"usage: lorica {verb}" in ran.out
    assert lorica().status == 2
    refused_verb = lorica("trian")
    assert refused_verb.status == 2 and "Did you mean `train`" in refused_verb.err


def test_a_process_prints_one_json_object(llama):
    done = process("targets", str(llama), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["class"] == "LlamaForCausalLM"
    failed = process("targets", "./nothing", "--json")
    assert failed.returncode == 1 and json.loads(failed.stdout)["status"] == 1
    assert "Traceback" not in failed.stderr
    shown = process("targets", "./nothing", LORICA_DEBUG="1")
    assert shown.returncode == 1 and "Traceback" in shown.stderr


def test_how_often_to_save_says_how_often_to_evaluate(train, tmp_path):
    """Also where a run of several passes would do both after every pass."""
    ran = train(
        "--r", 2, "--save-steps", 2, "--num-train-epochs", 2, "--eval-fraction", 0.2, steps=None
    )
    assert ran.status == 0, ran.err
    lines = [json.loads(row) for row in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    told = [row["step"] for row in lines if "eval_loss" in row]
    assert told[:2] == [2, 4]


@pytest.mark.parametrize("method", ["a" * 9000, "lora+" * 3000, "pissa(niter=" + "1" * 9000])
def test_what_is_quoted_at_length_is_cut(lorica, tmp_path, method):
    ran = lorica("train", "--method", method, "--output-dir", tmp_path / "out")
    refused(ran, tmp_path, 2, "a" * 9 if method[0] == "a" else method[:5])
    assert len(ran.err) < 3000


def test_where_memory_runs_out_it_says_what_takes_less(lorica, train, llama, tmp_path, monkeypatch):
    words = ["--prompt", "the cat", "--temperature", 1, "--num-return-sequences", 1 << 40]
    ran = lorica("generate", "--model", llama, *words)
    refused(ran, tmp_path, 1, "memory ran out", "`--num-return-sequences`")

    import torch

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore")

    monkeypatch.setattr("lorica.run.trainer.TrainerMixin.training_step", full)
    ran = train()
    refused(ran, tmp_path, 1, "CUDA out of memory", "`--gradient-checkpointing`", "size`")
    assert "More" not in ran.err


def test_a_mapping_in_yaml_beside_other_fields_of_transformers(train, tmp_path):
    """The parser of flags rewrites the types of the fields, which mappings were checked against."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "save_steps: 1\nlr_scheduler_kwargs: {num_cycles: 2}\neval_strategy: no\n"
        "gradient_checkpointing: true\ngradient_checkpointing_kwargs:\n  use_reentrant: true\n"
        "load_best_model_at_end: false\n"
    )
    for _ in range(2):
        ran = train("--overwrite-output-dir", steps=1, file=file)
        assert ran.status == 0, ran.err
    file.write_text("save_steps:\n  a: 1\n")
    ran = train("--overwrite-output-dir", steps=1, file=file)
    assert ran.status == 2 and "one value is wanted, not a mapping" in ran.err
