"""`lorica eval`: the figures of a run again, exact match, and what the adapter changed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorica.data import read


@pytest.fixture
def evaluate(lorica, llama, text):
    """`evaluate("--max-samples", 5)` measures the tiny model on the pairs of `text`."""

    def call(*words: object, model: object = llama, data: object = text):
        named = () if model is None else ("--model", model)
        return lorica("eval", *named, "--data", data, *words)

    return call


def figures(ran) -> dict[str, float]:
    assert ran.status == 0, ran.err
    return ran.json["metrics"]


def test_figures_of_a_plain_model(evaluate):
    ran = evaluate("--json")
    found = figures(ran)
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "bits_per_character"}
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert ran.json["task"] == "causal-lm" and ran.json["data"]["shape"] == "prompt-completion"
    assert ran.json["data"]["rows"] == 48 and "base" not in ran.json
    for size in (1, 48):
        assert figures(evaluate("--per-device-eval-batch-size", size, "--json")) == pytest.approx(
            found, rel=1e-5
        )
    assert figures(evaluate("--max-samples", 5, "--json")) != found
    assert set(figures(evaluate("--metrics", "loss", "--json"))) == {"loss"}


def test_the_table_shows_them(evaluate):
    found = figures(evaluate("--json"))
    ran = evaluate()
    assert "48 examples (prompt-completion)" in ran.out
    for name, value in found.items():
        assert any(line.split() == [name, f"{value:.4f}"] for line in ran.out.splitlines())


def test_an_adapter_measures_as_in_its_training(evaluate, train, text, tmp_path):
    ran = train("--method", "dora", "--r", 4, "--learning-rate", 0.05, "--eval-data", text)
    told, adapter = ran.json["evaluation"], tmp_path / "out" / "adapter"
    plain = figures(evaluate("--json"))
    found = evaluate("--adapter", adapter, "--compare-base", "--json", model=None)
    assert figures(found)["loss"] == pytest.approx(told["eval_loss"], rel=1e-5)
    assert figures(found)["perplexity"] == pytest.approx(told["eval_perplexity"], rel=1e-5)
    assert found.json["method"] == "dora"
    assert found.json["base"]["metrics"] == pytest.approx(plain, rel=1e-6)
    assert found.json["base"]["metrics"]["loss"] > figures(found)["loss"]
    shown = evaluate("--adapter", adapter, "--compare-base").out.splitlines()
    [line] = [line.split() for line in shown if line.startswith("loss")]
    assert float(line[3]) == pytest.approx(float(line[2]) - float(line[1]), abs=2e-4)


def test_classes_measure_as_in_their_training(evaluate, train, bert, classes, tmp_path):
    ran = train(
        "--model", bert, "--eval-data", classes, "--learning-rate", 0.01, data=classes, steps=8
    )
    assert ran.status == 0, ran.err
    told, adapter = ran.json["evaluation"], tmp_path / "out" / "adapter"
    found = figures(evaluate("--adapter", adapter, "--json", model=bert, data=classes))
    assert set(found) == {"loss", "accuracy", "f1", "matthews", "f1_macro"}
    for name, value in found.items():
        if name != "f1_macro":
            assert value == pytest.approx(told[f"eval_{name}"], rel=1e-4), name
    one = tmp_path / "one.jsonl"  # a class that is not there has its number all the same
    rows = [row for row in read(classes, columns={"text": "sentence"}) if row["label"] == "good"]
    one.write_text("".join(json.dumps({"text": r["text"], "label": "good"}) + "\n" for r in rows))
    right = figures(evaluate("--adapter", adapter, "--json", model=bert, data=one))["accuracy"]
    assert 0 <= right <= 1
    ran = evaluate("--adapter", adapter, "--compare-base", model=bert, data=classes)
    assert ran.status == 2 and "classifier came with the adapter" in ran.err


# -- exact match -----------------------------------------------------------------------------------


@pytest.fixture
def knows(train, tmp_path) -> tuple[Path, Path]:
    """A run that has learnt three answers by heart, and their file."""
    file = tmp_path / "three.jsonl"
    rows = [("the cat", "sees the dog"), ("a bird", "hears a cat"), ("very big", "red and blue")]
    file.write_text(
        "".join(json.dumps({"prompt": p, "completion": f" {c}"}) + "\n" for p, c in rows)
    )
    ran = train(
        "--method", "full", "--learning-rate", 0.02, "--lr-scheduler-type", "constant",
        data=file, steps=80, out="knows",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    return tmp_path / "knows" / "model", file


def test_exact_match_counts_the_answers_that_are_known(evaluate, llama, knows):
    model, file = knows
    more = file.with_name("more.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows.append({"prompt": "not", "completion": " good good good"})
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 8):
        ran = evaluate(
            "--exact-match", "--json", "--per-device-eval-batch-size", size, model=model, data=more
        )
        assert figures(ran)["exact_match"] == 0.75
        assert ran.json["answers"]["matched"] == 3 and ran.json["answers"]["examples"] == 4
    last = ("--exact-match", "--answer-pattern", r"(\w+)$", "--json")
    assert figures(evaluate(*last, model=model, data=more))["exact_match"] >= 0.75
    plain = evaluate("--exact-match", "--max-new-tokens", 3, model=llama, data=file)
    assert "exact match: 0 of 3" in plain.out and "answers were cut off" in plain.out


def test_exact_match_with_and_without_the_adapter(evaluate, train, tmp_path):
    train("--learning-rate", 0.05)
    words = ("--adapter", tmp_path / "out" / "adapter", "--compare-base", "--exact-match")
    ran = evaluate(*words, "--max-new-tokens", 4, "--max-samples", 6, "--json")
    assert "exact_match" in figures(ran) and "exact_match" in ran.json["base"]["metrics"]


# -- what is refused -------------------------------------------------------------------------------

WRONG = [
    (["--metrics", "acuracy"], "it has loss, perplexity"),
    (["--metrics", "perplexty"], "Did you mean `perplexity`"),
    (["--answer-pattern", "x"], "no effect without `--exact-match`"),
    (["--max-new-tokens", 4], "no effect without `--exact-match`"),
    (["--compare-base"], "no effect without `--adapter`"),
    (["--exact-match", "--answer-pattern", "("], "is no regular expression"),
    (["--max-samples", 0], "`--max-samples 0`"),
    (["--max-length", 500], "ends at 64 tokens"),
    (["--task", "causal"], "causal-lm"),
]


@pytest.mark.parametrize("words, part", WRONG)
def test_wrong_usage_is_one_message(evaluate, words, part, monkeypatch):

    from lorica.run import load_model

    monkeypatch.setattr(load_model, "load_model", None)  # nothing is read for it
    ran = evaluate(*words)
    assert ran.status == 2 and part in ran.err, ran.err
    assert "Traceback" not in ran.err and not ran.out


def test_what_does_not_fit_is_one_message(evaluate, lorica, llama, bert, classes, text, tmp_path):
    ran = evaluate("--json", model=bert, data=classes)
    assert ran.status == 1 and "has no weights for classifier" in ran.json["error"]
    ran = evaluate("--exact-match", model=bert, data=classes)
    assert ran.status == 2 and "`--exact-match` is for prompts and answers" in ran.err
    ran = lorica(
        "eval", "--max-samples", 3, "--json"
    )  # left out: the embedded model and its new tasks
    assert ran.status == 0 and ran.json["data"]["examples"] == 3, ran.err
    ran = evaluate("--exact-match", "--answer-pattern", "#### (.+)")
    assert ran.status == 1 and "doesn't match the data's own answer" in ran.err
    documents = tmp_path / "a.txt"
    documents.write_text("the cat sees the dog\n")
    ran = evaluate("--exact-match", data=documents)
    assert ran.status == 1 and "there is no answer to compare with" in ran.err


# -- real models -----------------------------------------------------------------------------------


def test_a_story_model_on_real_data(evaluate, shared):
    model = shared / "data" / "models" / "stories260k-hf"
    text = shared / "data" / "text" / "shift_childrens.txt.xz"
    found = figures(evaluate("--max-samples", 40, "--json", model=model, data=text))
    assert 2.0 < found["bits_per_character"] < 5.0
    sums = shared / "data" / "tasks" / "gsm8k_test.jsonl.xz"
    ran = evaluate(
        "--max-samples", 3, "--exact-match", "--answer-pattern", "#### (.+)", "--max-new-tokens", 8,
        "--json", model=model, data=sums,
    )  # fmt: skip
    assert figures(ran)["exact_match"] == 0.0 and ran.json["answers"]["examples"] == 3


def test_an_encoder_is_no_language_model_to_measure_or_ask(lorica, bert, tmp_path):
    """Its logits see the tokens that they are to predict, so a loss would mean nothing."""
    from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

    encoder = tmp_path / "encoder"
    BertLMHeadModel(BertConfig.from_pretrained(bert)).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(encoder)
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "the cat", "labels": 1}\n{"text": "the dog", "labels": 0}\n')
    ran = lorica("eval", "--model", encoder, "--data", data, "--task", "causal-lm")
    assert ran.status != 0 and "is no causal language model" in ran.err, ran.err
    assert "column `labels` looks like a classification" in ran.err
    ran = lorica("generate", "--model", encoder, "--prompt", "the cat")
    assert ran.status != 0 and "is no causal language model" in ran.err, ran.err
