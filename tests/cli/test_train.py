"""`lorica train`: a run's folder, resuming, repeating, evaluating."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file


def weights(folder: Path) -> dict:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_complete_folder(train, tmp_path):
    ran = train("--method", "dora+olora", "--r", 2, "--eval-fraction", 0.2)
    assert ran.status == 0, ran.err
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} >= {
        "config.yaml", "defaults.json", "metrics.jsonl", "result.json", "adapter", "checkpoint-6",
    }  # fmt: skip
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert ran.json == json.loads((out / "result.json").read_text())
    assert ran.json["method"] == "dora+olora" and ran.json["steps"] == 6
    assert ran.json["trainable"] == ran.json["summary"]["trainable"]
    figures = ran.json["evaluation"]
    assert figures["eval_perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    train_lines = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in train_lines] == [1, 2, 3, 4, 5, 6]
    assert set(train_lines[0]) >= {
        "step", "loss", "learning_rate", "tokens", "seconds", "tokens_per_second", "peak_memory",
    }  # fmt: skip
    assert train_lines[-1]["tokens"] == ran.json["tokens"]
    assert "train (" in ran.err  # the contract
    assert "[[" in ran.err  # one masked example


def test_config_yaml_repeats_the_run(train, lorica, tmp_path):
    first = train("--r", 2, "--lora-dropout", 0.1, "--weight-decay", 0.01, "--rank-pattern",
                  '{"q_proj": 1}')  # fmt: skip
    assert first.status == 0, first.err
    again = lorica(
        "train", tmp_path / "out" / "config.yaml", "--output-dir", tmp_path / "b", "--json"
    )
    assert again.status == 0, again.err
    assert again.json["loss"] == first.json["loss"]
    assert again.json["adapter_sha256"] == first.json["adapter_sha256"]
    assert same(tmp_path / "out", tmp_path / "b")
    one, other = (yaml.safe_load((tmp_path / n / "config.yaml").read_text()) for n in ("out", "b"))
    assert {**one, "output_dir": ""} == {**other, "output_dir": ""}
    assert one["lora_alpha"] and one["learning_rate"]
    assert one["warmup_ratio"] == 0, "0.03 of six steps is the first, which would have rate 0"


@pytest.mark.parametrize("method", ["lora", "dora+pissa+loraplus", "full"])
def test_resuming_equals_the_straight_run(train, lorica, tmp_path, monkeypatch, method):
    from lorica.run.log import RunLog

    words = ("--method", method, "--save-steps", 2, "--eval-fraction", 0.2, "--eval-steps", 2)
    if method != "full":
        words += ("--r", 2, "--lora-dropout", 0.2)
    straight = train(*words, out="straight")
    assert straight.status == 0, straight.err

    step_end = RunLog.on_step_end

    def die(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("the power went")
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunLog, "on_step_end", die)
    killed = train(*words, out="killed")
    assert killed.status == 1 and "the power went" in killed.err
    assert killed.json == {"error": killed.json["error"], "status": 1}
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    left = {p.name for p in (tmp_path / "killed").iterdir()}
    assert left == {"config.yaml", "defaults.json", "metrics.jsonl", "checkpoint-2", "checkpoint-4"}

    # Options left out come from the run's own config.yaml.
    resumed = lorica("train", "--output-dir", tmp_path / "killed", "--resume", "--json")
    assert resumed.status == 0, resumed.err
    assert resumed.json["adapter_sha256"] == straight.json["adapter_sha256"]
    assert resumed.json["loss"] == straight.json["loss"]
    assert resumed.json["evaluation"] == straight.json["evaluation"]
    assert resumed.json["train_loss"] == straight.json["train_loss"]
    assert [x["step"] for x in lines(tmp_path / "killed")] == [
        x["step"] for x in lines(tmp_path / "straight")
    ]


def test_resuming_with_other_options_or_rows_is_refused(train, lorica, text, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(text.read_text())
    assert train("--save-steps", 2, data=data).status == 0
    changed = lorica(
        "train", "--output-dir", tmp_path / "out", "--resume", "--learning-rate", "1e-3"
    )
    assert changed.status == 2 and "`learning_rate` is 0.0002, not 0.001" in changed.err
    data.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    other = lorica("train", "--output-dir", tmp_path / "out", "--resume")
    assert other.status == 1 and "a file has changed" in other.err


def test_accumulation_weighs_tokens_not_batches(lorica, llama, bert, text, classes, tmp_path):
    """8 x 1 and 2 x 4 see the same rows; a mean of the means of ragged batches would differ."""
    for name, more in (
        ("text", ("--model", llama, "--data", text)),
        ("classes", ("--model", bert, "--data", classes, "--dtype", "float32")),
    ):
        found = []
        for batch, steps in ((8, 1), (2, 4)):
            out = tmp_path / f"{name}{batch}"
            ran = lorica(
                "train", *more, "--output-dir", out, "--max-steps", 3, "--r", 2, "--json",
                "--per-device-train-batch-size", batch, "--gradient-accumulation-steps", steps,
                "--learning-rate", "1e-2", "--lr-scheduler-type", "constant", "--warmup-ratio", 0,
            )  # fmt: skip
            assert ran.status == 0, ran.err
            found.append((ran.json, weights(out), lines(out)))
        (one, a, first), (other, b, second) = found
        for x, y in zip(first, second, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], abs=1e-6)
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-5)
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5


def test_evaluation_weighs_tokens_not_batches(train, tmp_path):
    losses = [
        train("--eval-fraction", 0.3, "--per-device-eval-batch-size", n, out=f"e{n}").json[
            "evaluation"
        ]["eval_loss"]
        for n in (1, 5, 16)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


# -- tasks -----------------------------------------------------------------------------------------


def test_classification_measures_and_keeps_the_head(lorica, bert, classes, tmp_path):
    ran = lorica(
        "train", "--model", bert, "--data", classes, "--eval-fraction", 0.3, "--max-steps", 4,
        "--r", 2, "--output-dir", tmp_path / "out", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.json["task"] == "sequence-classification"
    assert ran.json["model"]["dtype"] == "float32"  # float16 is widened on a CPU
    assert set(ran.json["evaluation"]) == {
        "eval_loss", "eval_accuracy", "eval_f1", "eval_matthews",
    }  # fmt: skip
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    labels = [line.rpartition(",")[2] for line in classes.read_text().splitlines()[1:]]
    assert max(map(labels.count, labels)) > 0.6 * len(labels)
    assert config["metric_for_best_model"] == "matthews" and config["greater_is_better"]
    assert "the checkpoint has no weights for it" in ran.err
    assert any("classifier" in k for k in weights(tmp_path / "out"))


def test_regression_and_tags(lorica, bert, tmp_path):
    figures = tmp_path / "figures.csv"
    figures.write_text(
        "text,label\n" + "".join(f"the cat {'very ' * i},{i / 4}\n" for i in range(12))
    )
    more = ("--model", bert, "--eval-fraction", 0.4, "--max-steps", 2, "--r", 2, "--json")
    ran = lorica("train", "--data", figures, "--output-dir", tmp_path / "a", *more)
    assert ran.status == 0, ran.err
    assert set(ran.json["evaluation"]) == {"eval_loss", "eval_pearson", "eval_spearman", "eval_mse"}
    assert ran.json["evaluation"]["eval_loss"] == pytest.approx(ran.json["evaluation"]["eval_mse"])
    tags = tmp_path / "tags.jsonl"
    rows = [{"tokens": ["the", "cat", "sees"], "tags": ["D", "N", "V"]}] * 6
    tags.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ran = lorica("train", "--data", tags, "--output-dir", tmp_path / "b", *more)
    assert ran.status == 0, ran.err
    assert set(ran.json["evaluation"]) == {"eval_loss", "eval_accuracy", "eval_f1"}


def test_figures_follow_the_labels(lorica, bert, tmp_path):
    """Tags that mark entities are counted whole; where one class is most of the labels, Matthews
    decides; and a classifier that gives one class only is named."""
    more = ("--model", bert, "--eval-fraction", 0.4, "--r", 2, "--json")
    tags = tmp_path / "tags.jsonl"
    rows = [{"tokens": ["the", "cat", "sees"], "tags": ["O", "B-A", "I-A"]}] * 6
    tags.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ran = lorica("train", "--data", tags, "--max-steps", 2, "--output-dir", tmp_path / "a", *more)
    assert ran.status == 0, ran.err
    assert set(ran.json["evaluation"]) == {
        "eval_loss", "eval_accuracy", "eval_f1", "eval_precision", "eval_recall",
    }  # fmt: skip
    lines = [f"the cat {'very ' * (i % 5)},{'no' if i % 4 == 0 else 'yes'}" for i in range(48)]
    file = tmp_path / "uneven.csv"
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    how = ("--data", file, *more, "--max-steps", 6, "--eval-steps", 3, "--save-steps", 3)
    ran = lorica("train", *how, "--learning-rate", 1, "--output-dir", tmp_path / "b")
    assert ran.status == 0, ran.err
    assert "the highest matthews is kept (7" in ran.err
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert config["metric_for_best_model"] == "matthews" and config["greater_is_better"]
    alike = ran.json["degenerate"]
    assert alike["class"] in ("no", "yes")
    assert alike["share"] == ran.json["evaluation"]["eval_accuracy"]
    assert f"predictions are `{alike['class']}`" in ran.err and "`--learning-rate`" in ran.err
    logged = [json.loads(x) for x in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in logged if "eval_loss" in line][-1]["degenerate"]["class"]
    asked = lorica("train", *how, "--metric-for-best-model", "accuracy", "--output-dir",
                   tmp_path / "c")  # fmt: skip
    assert "the highest accuracy is kept" in asked.err, asked.err
    measured = lorica("eval", "--model", bert, "--adapter", tmp_path / "b" / "adapter",
                      "--data", file, "--json")  # fmt: skip
    assert measured.json["degenerate"] == {"class": alike["class"], "share": measured.json[
        "metrics"]["accuracy"]}, measured.err  # fmt: skip


def test_smoothed_labels_of_an_encoder_decoder_and_of_a_regression(
    train, llama, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(llama)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    words = ("--model", tmp_path / "t5", "--task", "seq2seq-lm", "--eval-fraction", 0.2)
    plain = train(*words, out="plain", steps=2)
    smooth = train(*words, "--label-smoothing-factor", 0.3, out="smooth", steps=2)
    assert plain.status == smooth.status == 0, plain.err + smooth.err
    assert smooth.json["evaluation"]["eval_loss"] != plain.json["evaluation"]["eval_loss"]
    monkeypatch.delattr(T5ForConditionalGeneration, "prepare_decoder_input_ids_from_labels")
    wrong = train(*words, "--label-smoothing-factor", 0.3, out="none", steps=2)
    assert wrong.status == 2 and "does not say what its decoder reads" in wrong.err
    figures = tmp_path / "figures.csv"
    figures.write_text("text,label\nthe cat,0.5\nthe dog,1.5\n")
    wrong = train("--label-smoothing-factor", 0.1, data=figures, out="figures")
    assert wrong.status == 2 and "the labels here are figures" in wrong.err
    assert not (tmp_path / "figures" / "adapter").exists()


def test_the_best_checkpoint_is_what_is_kept(train, text, tmp_path):
    """Training on one word alone makes every other text less likely, step by step."""
    narrow = tmp_path / "narrow.jsonl"
    narrow.write_text('{"prompt": "cat", "completion": " cat cat cat"}\n' * 8)
    ran = train("--eval-data", text, "--learning-rate", "0.3", "--save-steps", 1, "--eval-steps", 1,
                "--r", 2, "--early-stopping-patience", 2, steps=8, data=narrow)  # fmt: skip
    assert ran.status == 0, ran.err
    evaluated = {x["step"]: x["eval_loss"] for x in lines(tmp_path / "out") if "eval_loss" in x}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert ran.json["best_step"] == best and best < max(evaluated)
    assert ran.json["evaluation"]["eval_loss"] == evaluated[best]
    assert ran.json["steps"] == best + 2 < 8
    kept = load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all((kept[k] == v).all() for k, v in weights(tmp_path / "out").items())


def test_packing_bf16_and_checkpointing_run(train):
    ran = train("--packing", "best_fit", "--bf16", "--gradient-checkpointing", "--max-length", 32)
    assert ran.status == 0, ran.err
    assert ran.json["data"]["packing"] == "best_fit"


def test_full_training_writes_a_model(train, tmp_path):
    from transformers import AutoModelForCausalLM

    ran = train("--method", "full")
    assert ran.status == 0, ran.err
    assert ran.json["output"].endswith("model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


def test_tensorboard_is_told(train, tmp_path):
    pytest.importorskip("tensorboard")
    ran = train("--report-to", "tensorboard", steps=2)
    assert ran.status == 0, ran.err
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


# -- starting from an adapter ----------------------------------------------------------------------


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_starting_from_an_adapter_of_our_own_or_of_peft(train, llama, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    first = train("--r", 2, out="first", steps=3)
    assert first.status == 0, first.err
    more = train("--adapter", tmp_path / "first" / "adapter", out="second", steps=2)
    assert more.status == 0, more.err
    assert more.json["method"] == "lora" and more.json["recipe"]["r"] == 2
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    model.save_pretrained(str(tmp_path / "peft"))
    other = train("--adapter", tmp_path / "peft", out="third", steps=2)
    assert other.status == 0, other.err
    assert other.json["recipe"]["r"] == 3
    refused = train("--adapter", tmp_path / "peft", "--r", 4, out="fourth")
    assert refused.status == 2 and "leave it out" in refused.err


def test_the_embedded_data_and_model_stand_in(lorica, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lorica.embedded.base_path", lambda: llama)
    words = ("train", "--output-dir", tmp_path / "out", "--max-samples", 20, "--max-steps", 2,
             "--r", 2, "--json")  # fmt: skip
    ran = lorica(*words)
    assert ran.status == 1 and "The tokenizer loses 100.00%" in ran.err, (
        "it knows none of the words"
    )
    ran = lorica(*words, "--max-lost-text", 1)
    assert ran.status == 0, ran.err
    assert ran.json["data"]["name"] == "lorica:new" and ran.json["evaluation"]["eval_loss"] > 0


def test_resuming_a_finished_run_changes_nothing(train, lorica, tmp_path):
    first = train("--eval-fraction", 0.2, "--r", 2)
    again = lorica("train", "--output-dir", tmp_path / "out", "--resume", "--json")
    assert again.status == 0, again.err
    for name in ("steps", "loss", "train_loss", "evaluation", "adapter_sha256", "tokens"):
        assert again.json[name] == first.json[name]


def test_a_resumed_run_stops_early_at_the_same_step(train, lorica, text, tmp_path, monkeypatch):
    """The count of evaluations without a better one goes on."""
    from lorica.run.log import RunLog

    narrow = tmp_path / "narrow.jsonl"
    narrow.write_text('{"prompt": "cat", "completion": " cat cat cat"}\n' * 8)
    words = ("--eval-data", text, "--learning-rate", "0.3", "--save-steps", 1, "--eval-steps", 1,
             "--r", 2, "--early-stopping-patience", 2)  # fmt: skip
    straight = train(*words, out="straight", steps=9, data=narrow)
    assert straight.status == 0 and straight.json["steps"] < 9, straight.err
    step_end, last = RunLog.on_step_end, straight.json["steps"]

    def die(self, args, state, control, **kwargs):
        if state.global_step == last:
            raise RuntimeError("the power went")
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunLog, "on_step_end", die)
    assert train(*words, out="killed", steps=9, data=narrow).status == 1
    monkeypatch.setattr(RunLog, "on_step_end", step_end)
    resumed = lorica("train", "--output-dir", tmp_path / "killed", "--resume", "--json")
    assert resumed.status == 0, resumed.err
    for name in ("steps", "best_step", "adapter_sha256", "evaluation"):
        assert resumed.json[name] == straight.json[name]


@pytest.mark.slow
def test_two_processes_equal_one(train, llama, text, tmp_path):
    """The same rows an update, the same loss, the same evaluation; 10 rows do not divide evenly."""
    import os
    import subprocess
    import sys

    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {llama}\ndata: {text}\nmax_steps: 3\nr: 2\neval_fraction: 0.21\nlr_scheduler_type:"
        " constant\nwarmup_ratio: 0\nlearning_rate: 1e-2\n"
    )
    one = train("--r", 2, "--eval-fraction", 0.21, "--lr-scheduler-type", "constant",
                "--warmup-ratio", 0, "--learning-rate", "1e-2", out="one", steps=3)  # fmt: skip
    assert one.status == 0, one.err
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lorica",
            "train", str(config), "--output-dir", str(tmp_path / "two"), "--json",
            "--per-device-train-batch-size", "2",
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    assert two["processes"] == 2
    assert two["evaluation"]["eval_loss"] == pytest.approx(
        one.json["evaluation"]["eval_loss"], abs=1e-6
    )
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-6)
        assert a.get("tokens") == b.get("tokens")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "vera"])  # vera: tensors that all layers share
def test_a_sharded_run_equals_processes_that_hold_the_model_and_resumes(
    method, llama, text, tmp_path
):
    """FSDP2 by the Trainer, its branch forced on the CPU: shards of base and update are trained,
    saved whole, and gone on from to the bit."""
    import os
    import subprocess
    import sys

    words = ["--model", llama, "--data", text, "--method", method, "--r", "2", "--max-steps", "4",
             "--save-steps", "2", "--learning-rate", "1e-2", "--use-cpu"]  # fmt: skip
    wrap = '{"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'

    def run(script: list[Any], *more: Any) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             "2", *script, "train", *map(str, more), "--json"],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    forced = ["--", Path(__file__).with_name("sharding.py")]
    whole = run(["-m", "--", "lorica"], *words, "--output-dir", tmp_path / "whole")
    fsdp = ["--fsdp", "full_shard", "--fsdp-config", wrap]
    sharded = run(forced, *words, *fsdp, "--output-dir", tmp_path / "sharded")
    assert (tmp_path / "sharded" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()
    assert sharded["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    cut = tmp_path / "sharded" / "checkpoint-2"
    again = run(forced, "--resume", cut, "--output-dir", tmp_path / "again")
    assert again["adapter_sha256"] == sharded["adapter_sha256"]


@pytest.mark.parametrize("method", ["pclora", "adalora"])
def test_what_is_done_at_the_end_alone_keeps_the_end(train, tmp_path, method):
    """The best evaluation of a fade lies before its end, where what was promised is not there."""
    words = ["--method", method, "--r", 2, "--eval-fraction", 0.3]
    ran = train(*words, steps=8)
    assert ran.status == 0, ran.err
    assert (
        yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["load_best_model_at_end"]
        is False
    )
    for more in (["--load-best-model-at-end"], ["--early-stopping-patience", 2]):
        ran = train(*words, *more, steps=8, out="other")
        assert ran.status == 2 and "at the end of a run only" in ran.err, ran.err


def cut_off(monkeypatch, at: int) -> None:
    """The power goes after this step."""
    from lorica.run.log import RunLog

    step_end = RunLog.on_step_end

    def die(self, args, state, control, **kwargs):
        if state.global_step == at:
            raise RuntimeError("the power went")
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunLog, "on_step_end", die)


@pytest.mark.parametrize("method", ["loraga(batches=3)", "eva(batches=20)"])
def test_a_start_is_made_of_training_rows_and_a_resumed_run_needs_none(
    method, train, lorica, tmp_path, monkeypatch
):
    """20 batches of 4 are more than the 48 rows, which then come again."""
    words = ("--method", method, "--r", 2, "--save-steps", 2)
    straight = train(*words, out="straight")
    assert straight.status == 0, straight.err
    assert (
        f"`{method}` starts from" in straight.err and "batches of 4 training rows" in straight.err
    )
    other = train(*words, "--seed", 7, out="other")
    assert other.json["adapter_sha256"] != straight.json["adapter_sha256"]

    cut_off(monkeypatch, 3)
    assert train(*words, out="killed").status == 1
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*args):
        raise AssertionError("a resumed run has its start in the checkpoint")

    monkeypatch.setattr("lorica.model.attach.observe", refuse)
    resumed = lorica("train", "--output-dir", tmp_path / "killed", "--resume", "--json")
    assert resumed.status == 0, resumed.err
    assert resumed.json["adapter_sha256"] == straight.json["adapter_sha256"]
    assert resumed.json["loss"] == straight.json["loss"]
    assert resumed.json["summary"] == straight.json["summary"]
