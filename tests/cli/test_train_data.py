"""Data through the verbs: what columns mean, what is refused, and how messages say what to type."""

from __future__ import annotations

import json

import pytest
import yaml

from lorica.cli import as_flags


def put(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]


def test_an_encoder_is_refused_as_a_causal_model(lorica, bert, tmp_path):
    data = put(tmp_path / "a.jsonl", *[{"text": "the cat", "labels": n % 2} for n in range(8)])
    for words in (["--task", "causal-lm"], ["--shape", "text"]):
        ran = lorica(
            "train", "--model", bert, "--data", data, *words, "--output-dir", tmp_path / "a",
            "--max-steps", 1,
        )  # fmt: skip
        assert ran.status == 1 and "no causal language model" in ran.err
        assert "`labels` looks like a classification: type" in ran.err
        assert "`--task sequence-classification`" in ran.err
    ran = lorica(
        "train", "--model", bert, "--data", data, "--output-dir", tmp_path / "b", "--max-steps", 1,
        "--json",
    )  # fmt: skip
    assert ran.status == 0 and ran.json["task"] == "sequence-classification"
    assert "labels: 2 classes (0, 1)" in ran.err


def test_messages_beside_text(train, lorica, tmp_path):
    data = put(tmp_path / "a.jsonl", *[{"text": "left", "messages": CHAT}] * 4)
    ran = train("--chat-template", "plain", data=data, out="a")
    assert ran.status == 1 and "`--shape messages`" in ran.err
    more = ("--chat-template", "plain", "--max-lost-text", 1)
    for number, words in enumerate((["--shape", "messages"], ["--columns", "text=_"])):
        ran = train(*more, *words, data=data, out=f"b{number}", steps=1)
        assert ran.status == 0, ran.err
        assert ran.json["data"]["shape"] == "messages"


def test_proposals_are_flags(train, tmp_path):
    rows = [{"id": n, "story": "the cat sees the dog and the bird"} for n in range(4)]
    ran = train(data=put(tmp_path / "a.jsonl", *rows))
    assert ran.status == 1 and "`--columns text=story`" in ran.err
    assert "columns={" not in ran.err
    lost = train(data=put(tmp_path / "b.jsonl", *[{"text": "unseen words"}] * 4), out="lost")
    assert lost.status == 1 and "`--max-lost-text 1.0`" in lost.err


@pytest.mark.parametrize("documents, count", [("paragraph", 2), ("line", 3), ("file", 1)])
def test_documents_of_a_text(documents, count, train, tmp_path):
    data = tmp_path / "a.txt"
    data.write_text("the cat\nsees\n\nthe dog\n")
    ran = train("--documents", documents, data=data, steps=1)
    assert ran.status == 0, ran.err
    assert ran.json["data"]["examples"] == count


def test_the_day_of_the_first_start_is_used_again(train, lorica, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    data = put(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 8)
    more = ("--chat-template", template, "--save-steps", 2, "--max-lost-text", 1)
    ran = train(*more, "--now", "2024-07-26T10:00", data=data, steps=4)
    assert ran.status == 0, ran.err
    kept = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert kept["now"].startswith("2024-07-26T10:00")
    again = lorica(
        "train", tmp_path / "out" / "config.yaml", "--resume", tmp_path / "out" / "checkpoint-2",
        "--json",
    )  # fmt: skip
    assert again.status == 0, again.err
    assert again.json["data"]["sha256"] == ran.json["data"]["sha256"]
    wrong = train(*more, "--now", "yesterday", data=data, out="b")
    assert wrong.status == 2 and "is no time; type one like" in wrong.err


def test_arguments_are_flags_in_messages():
    said = as_flags("`train_on={'tool'}` or (`chat_template=\"chatml\"`), `shape=3 x`, `x=1`")
    assert said == "`--train-on tool` or (`--chat-template chatml`), `shape=3 x`, `x=1`"


def test_a_run_that_trains_nothing_is_an_error(train, text, tmp_path):
    few = put(
        tmp_path / "a.jsonl", *[json.loads(line) for line in text.read_text().split("\n")[:3]]
    )
    for steps, more in [(4, ()), (None, ("--num-train-epochs", 1))]:
        ran = train("--dataloader-drop-last", *more, data=few, steps=steps, out=f"a{steps}")
        assert ran.status == 2, ran.err
        assert "`--dataloader-drop-last` leaves out the last batch" in ran.err
        assert "has 3 of 4 examples" in ran.err and "at most 3" in ran.err
        assert not (tmp_path / f"a{steps}" / "adapter").exists()
    ran = train("--dataloader-drop-last", steps=None, out="b")  # 48 examples
    assert ran.status == 0 and ran.json["steps"] == 36


def test_a_run_without_an_optimizer_step_writes_nothing(train, tmp_path, monkeypatch):
    """What the plan did not foresee is seen once the Trainer is done."""
    from lorica.run.loop import RunTrainer

    monkeypatch.setattr(RunTrainer, "train", lambda self, **_: None)
    ran = train("--dataloader-drop-last", "--num-train-epochs", 1, steps=None)
    assert ran.status == 1 and "no optimizer step was taken" in ran.err, ran.err
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_warm_up_of_one_step_is_none(train, tmp_path):
    for number, more in enumerate([(), ("--warmup-ratio", 0.1), ("--warmup-ratio", 0.01)]):
        ran = train(*more, out=f"a{number}")
        lines = (tmp_path / f"a{number}" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["learning_rate"] > 0, ran.err
    train("--warmup-ratio", 0.5, out="b")
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["learning_rate"] == 0


def test_figures_that_a_task_lacks_are_refused_before_the_first_step(train, lorica, bert, classes,
                                                                     tmp_path):  # fmt: skip
    more = ("--eval-fraction", 0.2, "--metric-for-best-model")
    ran = train(*more, "accuracy")
    assert ran.status == 2 and "figures of `causal-lm` are loss, perplexity" in ran.err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    words = ("train", "--model", bert, "--data", classes, "--max-steps", 4, "--eval-steps", 2,
             "--save-steps", 2, "--json", *more)  # fmt: skip
    ran = lorica(*words, "mathews", "--output-dir", tmp_path / "a")
    assert ran.status == 2 and "Did you mean `matthews`?" in ran.err
    ran = lorica(*words, "matthews", "--output-dir", tmp_path / "b")
    assert ran.status == 0, ran.err
    assert "the checkpoint with the highest matthews is kept" in ran.err


def test_a_figure_that_should_fall_is_lowered(train, tmp_path):
    ran = train("--eval-fraction", 0.2, "--metric-for-best-model", "perplexity", "--eval-steps", 2,
                "--save-steps", 2, "--learning-rate", 0.05)  # fmt: skip
    assert ran.status == 0, ran.err
    assert "the checkpoint with the lowest perplexity is kept" in ran.err
    told = [
        json.loads(line)
        for line in (tmp_path / "out" / "metrics.jsonl").read_text().split("\n")
        if line
    ]
    seen = {line["step"]: line["eval_perplexity"] for line in told if "eval_perplexity" in line}
    assert ran.json["best_step"] == min(seen, key=seen.__getitem__)


def test_half_precision_without_a_gpu_is_refused(train):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for word in ("--fp16", "--fp16-full-eval"):
        ran = train(word)
        assert ran.status == 2 and f"`{word}` has no effect on a CPU" in ran.err


def test_eval_says_what_the_tokenizer_loses(lorica, llama, tmp_path):
    data = put(tmp_path / "a.jsonl", *[{"prompt": "the cat", "completion": " unseen"}] * 2)
    ran = lorica("eval", "--model", llama, "--data", data)
    assert ran.status == 0, ran.err
    assert "the tokenizer loses" in ran.out
