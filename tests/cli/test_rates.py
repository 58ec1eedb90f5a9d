"""`--modules-learning-rate`: given, kept, refused."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def pretrain(lorica, tmp_path):
    shape, text = tmp_path / "shape.json", tmp_path / "book.txt"
    shape.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 300,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }))  # fmt: skip
    text.write_text("\n\n".join(f"the cat number {i} saw the dog {i * 7}" for i in range(300)))

    def call(*words):
        return lorica(
            "pretrain", "--model-config", shape, "--data", text, "--max-length", 16, "--json",
            "--per-device-train-batch-size", 4, "--output-dir", tmp_path / "run", *words,
        )  # fmt: skip

    call.folder = tmp_path / "run"
    return call


def test_a_run_keeps_its_rate_over_a_resumption(pretrain, tmp_path):
    rate = ("--modules-learning-rate", "2e-2", "--learning-rate", "1e-3", "--max-steps", 6)
    assert pretrain("--method", "lora", "--r", 2, *rate, "--save-steps", 3).status == 0
    straight = json.loads((pretrain.folder / "result.json").read_text())
    assert "modules_learning_rate: 0.02" in (pretrain.folder / "config.yaml").read_text()
    last = pretrain.folder / "checkpoint-3"
    other = pretrain("--resume", last, "--modules-learning-rate", "1e-2")
    assert other.status == 2 and "`modules_learning_rate` is 0.02, not 0.01" in other.err
    assert pretrain("--resume", last).status == 0
    again = json.loads((pretrain.folder / "result.json").read_text())
    assert again["loss"] == straight["loss"]


@pytest.mark.parametrize("value", ["0", "-1", "inf"])
def test_a_rate_is_above_zero(pretrain, value):
    told = pretrain("--modules-learning-rate", value, "--max-steps", 2)
    assert (
        told.status == 2 and "it is a number above 0" in told.err and not pretrain.folder.exists()
    )
