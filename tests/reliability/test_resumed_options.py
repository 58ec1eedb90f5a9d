"""Options and folders of runs that are gone on with, repeated or written over: nothing of the
user's is lost, nothing is recorded that was not done, and what cannot be is said at once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from killed_runs import Subjects
from killing import Snapshot

from lorica.run.folder import RunFolder
from lorica.run.options import PretrainOptions, TrainOptions, UsageError

Call = Callable[..., str]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    import torch

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("LORICA_DEBUG", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)


def call(*words: object, status: int = 0) -> str:
    """The command line in this process; returns what it said."""
    from lorica.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = main([str(word) for word in words])
    assert found == status, said.getvalue()
    assert "Traceback" not in said.getvalue() and "LORICA_DEBUG" not in said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="session")
def few(subjects: Subjects) -> list[object]:
    """The words of a run without its method and its length."""
    return ["--model", subjects.folder / "llama", "--data", subjects.folder / "rows.jsonl",
            "--max-length", 24, "--save-steps", 1, "--lora-dropout", 0.1, "--save-total-limit",
            4]  # fmt: skip


@pytest.fixture(scope="session")
def made(ground: Path, few: list[object]) -> Path:
    """A run that is done, with checkpoints 1 to 4."""
    call("train", *few, "--r", 2, "--max-steps", 4, "--output-dir", ground / "made")
    return ground / "made"


@pytest.fixture
def a(made: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(made, tmp_path / "a")


def digest(run: Path) -> str:
    return json.loads((run / "result.json").read_text())["adapter_sha256"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cut(run: Path, *steps: int) -> None:
    """As a kill before the end leaves it, with these checkpoints."""
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    for path in run.glob("checkpoint-*"):
        if int(path.name[11:]) not in steps:
            shutil.rmtree(path)


# -- runs that start from an adapter ---------------------------------------------------------------


def test_a_run_from_an_adapter_is_gone_on_with_and_repeated(few, made, tmp_path):
    few = [w for w in few if w not in ("--lora-dropout", 0.1)]  # the adapter has its own
    b = tmp_path / "b"
    call("train", *few, "--adapter", made / "adapter", "--max-steps", 4, "--output-dir", b)
    config = (b / "config.yaml").read_text()
    told = yaml.safe_load(config)
    assert told["adapter"] == str(made / "adapter")
    assert not {"method", *TrainOptions.recipe_names} & told.keys()
    call("train", b / "config.yaml", "--output-dir", tmp_path / "c")
    assert digest(tmp_path / "c") == digest(b) != digest(made)
    straight = Snapshot.of(b)
    cut(b, 1, 2)
    call("train", "--resume", "--output-dir", b)
    assert straight.differences(Snapshot.of(b)) == []
    assert (b / "config.yaml").read_text() == config


def test_another_adapter_or_method_is_refused_on_resuming(few, a, made, tmp_path):
    said = call("train", "--resume", "--adapter", made / "adapter", "--output-dir", a, status=2)
    assert "`adapter` is None" in said
    few = [w for w in few if w not in ("--lora-dropout", 0.1)]
    b = tmp_path / "b"
    call("train", *few, "--adapter", made / "adapter", "--max-steps", 2, "--output-dir", b)
    said = call("train", "--resume", "--method", "dora", "--output-dir", b, status=2)
    assert "`method` is None, not 'dora'" in said
    said = call("train", "--resume", "--adapter", a / "adapter", "--output-dir", b, status=2)
    assert "`adapter` is" in said


# -- which options were not given ------------------------------------------------------------------


def filled(run: Path) -> dict[str, dict[str, object]]:
    """The defaults that the summary in result.json tells."""
    return json.loads((run / "result.json").read_text())["summary"]["defaults"]


def test_a_resumed_run_knows_which_options_were_not_given(a, made):
    told = json.loads((made / "defaults.json").read_text())["defaults"]
    assert told == filled(made) and {"lora_alpha", "learning_rate"} <= told.keys()
    assert "r" not in told  # it was typed
    config = (a / "config.yaml").read_text()
    assert f"lora_alpha: {told['lora_alpha']['value']}  # by default: lora" in config
    lines = [line.partition("  # by default")[0] for line in config.splitlines()]
    (a / "config.yaml").write_text("\n".join(lines) + "\n")  # nothing reads comments
    cut(a, 1, 2)
    call("train", "--resume", "--output-dir", a)
    assert filled(a) == told
    assert (a / "defaults.json").read_text() == (made / "defaults.json").read_text()
    assert (a / "config.yaml").read_text() == config.replace(str(made), str(a))


def test_without_the_file_every_option_counts_as_given(a, made, tmp_path):
    (a / "defaults.json").unlink()
    cut(a, 1, 2)
    call("train", "--resume", "--output-dir", a)
    assert digest(a) == digest(made) and filled(a) == {}
    assert "by default" not in (a / "config.yaml").read_text()
    alone = tmp_path / "alone" / "config.yaml"
    alone.parent.mkdir()
    shutil.copy(made / "config.yaml", alone)
    call("train", alone, "--output-dir", tmp_path / "again")
    assert digest(tmp_path / "again") == digest(made)


def test_a_value_that_was_changed_is_no_default(a):
    file = a / "defaults.json"
    told = json.loads(file.read_text())
    told["defaults"]["learning_rate"]["value"] = 0.5
    file.write_text(json.dumps(told))
    cut(a, 1, 2)
    call("train", "--resume", "--output-dir", a)
    assert "learning_rate" not in filled(a) and "lora_alpha" in filled(a)


@pytest.mark.parametrize("text", ["[", "{}", '{"defaults": 3}', '{"defaults": {"r": 8}}'])
def test_a_file_of_defaults_that_was_changed_is_named(a, text):
    cut(a, 1, 2)
    (a / "defaults.json").write_text(text)
    said = call("train", "--resume", "--output-dir", a, status=2)
    assert f"{a / 'defaults.json'} was changed" in said and "or remove it" in said
    assert not (a / "result.json").exists()


def test_a_run_that_died_before_its_configuration_begins_anew(few, made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(made / "defaults.json", out)
    call("train", *few, "--r", 2, "--max-steps", 1, "--output-dir", out)
    assert (out / "adapter").is_dir()


# -- what a run writes over ------------------------------------------------------------------------


def test_a_base_in_the_folder_is_no_run_and_stays(subjects, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(subjects.folder / "llama", "model")
    before = files(tmp_path)
    words = [*few[2:], "--max-steps", 1, "--r", 2, "--output-dir", "."]
    for model, more in (("model", ()), ("model", ("--overwrite-output-dir",)),
                        (few[1], ()), (few[1], ("--overwrite-output-dir",))):  # fmt: skip
        said = call("train", "--model", model, *words, *more, status=2)
        assert "holds a run" not in said and "`model`" in said and "name another" in said
        assert files(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["config.yaml", "defaults.json", "result.json", "metrics.jsonl", "checkpoint-1"]
)
def test_files_of_the_users_are_not_replaced(few, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "checkpoint-1":
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_args.bin").write_bytes(b"another program's")
    else:
        (tmp_path / name).write_text("seed: 7\n" if name == "config.yaml" else '{"mine": 1}\n')
    before = files(tmp_path)
    file = [name] if name == "config.yaml" else []
    words = ["train", *file, *few, "--r", 2, "--max-steps", 1, "--output-dir", "."]
    for more in ((), ("--overwrite-output-dir",)):
        said = call(*words, *more, status=2)
        assert f"holds `{name}`, which no run has written there" in said
        assert files(tmp_path) == before
    if name == "config.yaml":
        assert "there is no run" in call("train", "--resume", "--output-dir", ".", status=2)
        assert files(tmp_path) == before


def test_a_configuration_of_ours_alone_counts_as_a_run(a, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(a / "config.yaml", there)
    before = files(there)
    said = call("train", there / "config.yaml", "--output-dir", there, status=2)
    assert "holds a run already (config.yaml)" in said
    assert files(there) == before


def test_only_what_a_run_wrote_is_removed(few, a, subjects):
    """A base that was laid into the folder of a run afterwards stays, and so do other files."""
    (a / "mine.txt").write_text("mine")
    (a / "runs").mkdir()
    (a / "runs" / "notes.md").write_text("mine")
    (a / "checkpoint-9").mkdir()
    (a / "tokenizer").mkdir()
    (a / "tokenizer" / "tokenizer.json").write_text("{}")
    words = ["train", *few, "--r", 1, "--max-steps", 1, "--output-dir", a, "--overwrite-output-dir"]
    assert "holds `checkpoint-9`, which no run" in call(*words, status=2)
    (a / "checkpoint-9").rmdir()
    call(*words)
    assert not (a / "checkpoint-4").exists() and (a / "checkpoint-1").exists()
    for name in ("mine.txt", "runs/notes.md", "tokenizer/tokenizer.json"):
        assert (a / name).is_file()
    shutil.copytree(subjects.folder / "llama", a / "model")
    before = files(a)
    assert "holds `model`, which no run" in call(*words, status=2)
    assert files(a) == before


@pytest.mark.parametrize("option", ["adapter", "data", "model"])
def test_what_is_read_is_not_replaced(few, a, option):
    inside = {"adapter": "adapter", "data": "metrics.jsonl", "model": "checkpoint-4"}[option]
    path = a / inside
    before = files(a)
    for more in ((), ("--overwrite-output-dir",)):
        said = call(
            "train", f"--{option}", path, "--output-dir", a, "--max-steps", 1, *more, status=2
        )
        assert f"`--{option} {path}` lies where the run writes" in said
    assert files(a) == before


def test_a_tokenizer_that_is_read_is_not_removed(tmp_path):
    tokenizer = tmp_path / "out" / "tokenizer"
    tokenizer.mkdir(parents=True)
    said = call("pretrain", "--tokenizer", tokenizer, "--output-dir", tmp_path / "out", status=2)
    assert "lies where the run writes" in said
    said = call("pretrain", "--output-dir", tmp_path / "out", status=2)
    assert "holds `tokenizer`, which no run" in said


# -- where a checkpoint is gone on from ------------------------------------------------------------


def test_another_run_is_not_written_over_by_a_resumed_one(few, a, tmp_path):
    b = tmp_path / "b"
    call("train", *few, "--r", 2, "--seed", 5, "--max-steps", 2, "--output-dir", b)
    before = files(b)
    said = call("train", "--resume", a / "checkpoint-3", "--output-dir", b, status=2)
    assert "holds a run already" in said and "without `--output-dir`" in said
    assert files(b) == before


def test_a_checkpoint_goes_on_where_it_lies(a, made, tmp_path, monkeypatch):
    """Not in the folder that config.yaml names, which is the one it was copied from."""
    before, straight = files(made), Snapshot.of(a)
    assert yaml.safe_load((a / "config.yaml").read_text())["output_dir"] == str(made)
    cut(a, 1, 2, 3)
    call("train", "--resume", a / "checkpoint-2")
    assert straight.differences(Snapshot.of(a)) == []
    assert yaml.safe_load((a / "config.yaml").read_text())["output_dir"] == str(a)
    assert files(made) == before
    cut(a, 3)
    monkeypatch.chdir(a / "checkpoint-3")
    call("train", "--resume", ".")
    assert digest(a) == digest(made) and files(made) == before
    call("train", "--resume", a / "checkpoint-3", "--output-dir", tmp_path / "typed")
    assert digest(tmp_path / "typed") == digest(made)


def test_a_folder_that_was_typed_stays():
    named = TrainOptions(resume="q/checkpoint-3", output_dir="there").placed()
    assert named.output_dir == "there"
    assert TrainOptions(resume="q/checkpoint-3").placed().output_dir == "q"
    assert TrainOptions(resume="last").placed().output_dir == "lorica-run"


def test_a_checkpoint_without_its_configuration_is_refused(few, a, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copytree(a / "checkpoint-3", tmp_path / "bare" / "checkpoint-3")
    words = [*few, "--r", 2, "--max-steps", 4, "--learning-rate", 0.5, "--weight-decay", 0.3]
    z = tmp_path / "z"
    said = call("train", *words, "--resume", tmp_path / "bare" / "checkpoint-3",
                "--output-dir", z, status=2)  # fmt: skip
    assert "beside its run's config.yaml" in said and not z.exists()
    (a / "config.yaml").unlink()
    before = files(a)
    said = call("train", *words, "--resume", "--output-dir", a, status=2)
    assert "beside its run's config.yaml" in said and files(a) == before


def test_a_configuration_that_says_nothing_any_more_is_named(a):
    for text in ("- a\n", "a: [\n"):
        (a / "config.yaml").write_text(text)
        with pytest.raises(UsageError, match="does not say any more what the run is"):
            from lorica.run.finetune import train

            train(TrainOptions(resume="last", output_dir=str(a)))


def test_a_run_that_is_done_is_written_elsewhere(a, tmp_path):
    """Its last loss was logged by the run that it goes on with."""
    said = call("train", "--resume", a / "checkpoint-4", "--output-dir", tmp_path / "b")
    one, other = (json.loads((p / "result.json").read_text()) for p in (a, tmp_path / "b"))
    for name in ("loss", "train_loss", "steps", "adapter_sha256"):
        assert one[name] == other[name]
    assert "4 steps\n" in said and f"  mean loss   {one['train_loss']:.4f}" in said


def test_figures_that_are_no_numbers_are_said():
    from lorica.cli._training import outcome

    result = {"train_loss": 2.0, "best_step": None, "output": "out/adapter"}
    told = outcome({**result, "evaluation": {"eval_loss": None, "eval_f1": 0.5}}, "absent")
    figures = ["  loss        no finite number", "  f1          0.5000"]
    assert told == ["evaluation at the last step:", *figures, "written: out/adapter"]
    assert outcome({**result, "evaluation": None}, "absent")[0].startswith("  mean loss   2.0000")


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "checkpoint-2"]])
def test_another_number_of_processes_is_refused(a, monkeypatch, words):
    before = files(a)
    words = [words[0], *(a / name for name in words[1:])]
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = call("train", *words, "--output-dir", a, status=2)
    assert "was trained by 1 process, not 2" in said and "--nproc-per-node 1" in said
    assert files(a) == before


def test_checkpoints_that_do_not_say_how_many_processes_pass(a, made):
    from lorica.run import checkpoints

    cut(a, 2)
    file = a / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"]["RunLog"]["attributes"]["facts"].pop("processes") == 1
    file.write_text(json.dumps(state))
    kept = {k: v for k, v in checkpoints.read(a / "checkpoint-2").items() if k != "files"}
    checkpoints.seal(a / "checkpoint-2", **kept)
    call("train", "--resume", "--output-dir", a)
    assert digest(a) == digest(made)


# -- values that are refused at once ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "pretrain"])
@pytest.mark.parametrize(
    "words, part",
    [
        (["--max-length", 0], "`--max-length 0`: it is a whole number of at least 1"),
        (["--max-length", -5], "`--max-length -5`: it is a whole number of at least 1"),
        (["--max-steps", 10**23], "`--max-steps 1" + "0" * 23 + "`: it is 1,000,000,000 at most"),
        (["--num-train-epochs", 1e300], "`--num-train-epochs 1e+300`: a run has 1,000,000,000"),
        (["--save-steps", 0], "`--save-steps 0`: it is a number of steps above 0"),
        (["--logging-steps", -3], "`--logging-steps -3`: it is a number of steps above 0"),
        (["--per-device-eval-batch-size", 0], "`--per-device-eval-batch-size 0`: it is a whole"),
        (["--eval-accumulation-steps", 0], "`--eval-accumulation-steps 0`: it is a whole"),
        (["--dataloader-num-workers", -1], "`--dataloader-num-workers -1`: it is a whole number"),
        (["--weight-decay", "nan"], "`--weight-decay nan`: a finite number is wanted"),
        (["--deepspeed", "x"], "`--deepspeed x`: there is no such file"),
        (["--accelerator-config", "x"], "`--accelerator-config x`: there is no such file"),
        (["--report-to", "wandbb"], "`--report-to wandbb`: "),
        (["--output-dir", ""], "`--output-dir ''`: a path is wanted"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_values_that_mean_nothing_are_refused(tmp_path, verb, words, part):
    out = tmp_path / "out"
    assert part in call(verb, "--output-dir", out, *words, status=2)
    assert not out.exists()


def test_an_empty_path_is_no_path():
    for name in TrainOptions.paths:
        with pytest.raises(UsageError, match=f"`--{name.replace('_', '-')} ''`: a path is wanted"):
            dataclasses.replace(TrainOptions(), **{name: ""}).check()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`--data ''`"):
        PretrainOptions(data=("a.txt", "")).check()


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [])
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    out = tmp_path / "out"
    said = call("train", "--report-to", "wandb", "--output-dir", out, status=2)
    assert "`--report-to wandb`: WandbCallback requires wandb" in said and not out.exists()


def test_a_rule_book_of_a_package_that_is_missing(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text("{}")
    pytest.importorskip("transformers")
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  # pyright: ignore[reportMissingImports]

        pytest.skip("it is there")
    with pytest.raises(UsageError, match="the package deepspeed is not installed"):
        TrainOptions(further={"deepspeed": str(file)}).check()


def test_runs_without_an_end_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at most"):
        PretrainOptions(max_tokens=10**23).check()
    said = call("pretrain", "--max-tokens", 10**15, "--output-dir", tmp_path / "out", status=2)
    assert "this run would take" in said and "is the most" in said


def test_null_leaves_an_option_out(few, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("save_steps: null\neval_steps: null\nr: 2\nmax_steps: 1\n")
    words = [w for w in few if w not in ("--save-steps", 1)]
    call("train", file, *words, "--output-dir", tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert TrainOptions(further={"save_steps": None}).further == {}
    file.write_text("save_steps: {a: 1}\n")
    said = call("train", file, "--output-dir", tmp_path / "b", status=2)
    assert "line 1: `save_steps`: one value is wanted, not a mapping" in said


def test_the_parts_of_a_run_are_told(a, tmp_path):
    names = {"config.yaml", "defaults.json", "metrics.jsonl", "result.json", "adapter"}
    names |= {"report.html", "samples.json"}
    assert set(RunFolder(a).ours()) == names | {f"checkpoint-{n}" for n in (1, 2, 3, 4)}
    assert RunFolder(tmp_path).ours() == [] == RunFolder(tmp_path / "none").ours()
