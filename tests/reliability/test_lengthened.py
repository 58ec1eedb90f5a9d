"""A run that is lengthened equals the run that was longer from its start, or is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from killed_runs import Subjects
from test_resumed_options import call, digest

import lorica

CONSTANT = ("--lr-scheduler-type", "constant")


@pytest.fixture(scope="session")
def words(subjects: Subjects) -> list[object]:
    """The words of a run without its length and its curve."""
    return ["--model", subjects.folder / "llama", "--data", subjects.folder / "rows.jsonl",
            "--max-length", 24, "--save-steps", 1, "--lora-dropout", 0.1, "--save-total-limit",
            4, "--r", 2]  # fmt: skip


@pytest.mark.parametrize("curve", [CONSTANT, ("--lr-scheduler-type", "constant_with_warmup",
                                              "--warmup-steps", 2)])  # fmt: skip
@pytest.mark.parametrize("ended", [True, False])
def test_a_lengthened_run_is_the_longer_run(words, tmp_path, curve, ended):
    long, short = tmp_path / "long", tmp_path / "short"
    call("train", *words, *curve, "--max-steps", 7, "--output-dir", long)
    call("train", *words, *curve, "--max-steps", 4, "--output-dir", short)
    before = digest(short)
    if not ended:
        shutil.rmtree(short / "checkpoint-4")
        shutil.rmtree(short / "adapter")
        (short / "result.json").unlink()
    said = call("train", "--resume", "--max-steps", 7, "--output-dir", short)
    assert "lengthened from 4 to 7 steps" in said
    assert digest(short) == digest(long) != before
    told = json.loads((short / "result.json").read_text())
    assert told["steps"] == 7
    assert yaml.safe_load((short / "config.yaml").read_text())["max_steps"] == 7


@pytest.mark.parametrize(
    "streaming, length, ended",
    [
        (False, "max-tokens", True), (True, "max-steps", False),
        pytest.param(False, "max-steps", False, marks=pytest.mark.slow),
        pytest.param(True, "max-tokens", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_pretraining_is_lengthened(subjects: Subjects, tmp_path, streaming, length, ended):
    """Also beyond the end of the data, which begin anew."""
    root = subjects.folder
    words = ["--model-config", root / "shape.json", "--data", root / "shards", *CONSTANT, "--seed",
             1, "--max-length", 32, "--per-device-train-batch-size", 16, "--save-steps", 1,
             *(["--streaming"] if streaming else [])]  # fmt: skip
    size = {"max-steps": 1, "max-tokens": 16 * 32}[length]
    long, short = tmp_path / "long", tmp_path / "short"
    call("pretrain", *words, f"--{length}", 9 * size, "--output-dir", long)
    call("pretrain", *words, f"--{length}", 3 * size, "--output-dir", short)
    if not ended:
        shutil.rmtree(short / "checkpoint-3")
        shutil.rmtree(short / "model")
        (short / "result.json").unlink()
    said = call("pretrain", "--resume", f"--{length}", 9 * size, "--output-dir", short)
    assert f"lengthened from {3 * size} to {9 * size} {length[4:]}" in said
    assert digest(short) == digest(long)
    assert json.loads((short / "result.json").read_text())["steps"] == 9
    said = call("pretrain", "--resume", f"--{length}", size, "--output-dir", short, status=2)
    assert f"`{length.replace('-', '_')}` is {9 * size}, not {size}" in said


@pytest.mark.parametrize("more, why", [
    (("--lr-scheduler-type", "cosine"), "`lr_scheduler_type` is cosine"),
    (("--lr-scheduler-type", "constant_with_warmup", "--warmup-ratio", 0.5), "the warm-up"),
    ((*CONSTANT, "--method", "sora(stages=1)"), "the schedule of `sora`"),
])  # fmt: skip
def test_what_is_fitted_to_the_length_is_named(words, tmp_path, more, why):
    out = tmp_path / "out"
    call("train", *words, *more, "--max-steps", 4, "--output-dir", out)
    before = digest(out)
    said = call("train", "--resume", "--max-steps", 7, "--output-dir", out, status=2)
    assert "the run had 4 steps" in said and why in said
    assert digest(out) == before


def test_a_run_is_not_shortened(words, tmp_path):
    out = tmp_path / "out"
    call("train", *words, *CONSTANT, "--max-steps", 4, "--output-dir", out)
    said = call("train", "--resume", "--max-steps", 3, "--output-dir", out, status=2)
    assert "`max_steps` is 4, not 3" in said


def bound(method: str, steps: int, curve: str = "") -> torch.optim.Optimizer:
    from lorica.training.bind import bind

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    adapters = lorica.attach(model, method, r=2, verbose=False)
    made = adapters.recipe.rule.make(adapters.param_groups(1e-2), {})
    return bind(made, adapters, total_steps=steps, curve=curve)


def test_an_optimizer_takes_the_state_of_a_shorter_run_by_the_same_rule():
    longer = bound("lora", 9)
    longer.load_state_dict(bound("lora", 4).state_dict())
    assert longer.param_groups[0]["lorica"]["total_steps"] == 9
    with pytest.raises(ValueError, match="total_steps 4, this run 9, and the rate"):
        bound("lora", 9, "the rate").load_state_dict(bound("lora", 4).state_dict())
    with pytest.raises(ValueError, match="total_steps 9, this run 4"):
        bound("lora", 4).load_state_dict(bound("lora", 9).state_dict())
    with pytest.raises(ValueError, match="the schedule of `sora`"):
        bound("sora(stages=1)", 9).load_state_dict(bound("sora(stages=1)", 4).state_dict())
