"""`lorica generate`: prompts of every kind, adapters, and what goes to which stream."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

# In words that the tiny tokenizer knows: what a turn says, and nothing else.
CHATTING = ("--chat", "--chat-template", "{% for m in messages %}{{ m['content'] }} {% endfor %}")


@pytest.fixture
def generate(lorica, llama):
    """`generate("--prompt", "the cat")` asks the tiny model for eight tokens."""

    def call(*words: object, model: object = llama):
        return lorica("generate", "--model", model, "--max-new-tokens", 8, *words)

    return call


@pytest.fixture
def adapter(train, tmp_path) -> Path:
    """A DoRA adapter that six steps have moved far enough to say something else."""
    ran = train("--method", "dora", "--r", 4, "--learning-rate", 0.05)
    assert ran.status == 0, ran.err
    return tmp_path / "out" / "adapter"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def texts(ran) -> list[str]:
    assert ran.status == 0, ran.err
    return [answer["completion"] for answer in ran.json["answers"]]


def test_one_prompt_is_answered_on_standard_output(generate):
    ran = generate("--prompt", "the cat sees")
    assert ran.status == 0, ran.err
    [answer] = texts(generate("--prompt", "the cat sees", "--json"))
    assert ran.out == answer + "\n" and answer.strip()
    assert "Traceback" not in ran.err


def test_several_prompts_and_answers(generate):
    ran = generate("--prompt", "the cat", "--prompt", "a dog, not big", "--json")
    one, other = ran.json["answers"]
    assert (one["prompt"], other["prompt"]) == ("the cat", "a dog, not big")
    assert set(one) == {"prompt", "completion", "tokens", "stopped"}
    assert texts(ran) == [
        texts(generate("--prompt", p["prompt"], "--json"))[0] for p in (one, other)
    ]
    drawn = ("--num-return-sequences", 3, "--temperature", 5, "--json")
    assert len(set(texts(generate("--prompt", "the cat", *drawn)))) == 3
    assert texts(generate("--prompt", "the cat", *drawn)) == texts(
        generate("--prompt", "the cat", *drawn)
    )
    shown = generate("--prompt", "the cat", "--prompt", "a dog").out
    assert shown.startswith("> the cat\n") and "\n> a dog\n" in shown


def test_an_adapter_speaks_the_same_merged(generate, lorica, adapter):
    words = ("--prompt", "the cat sees", "--prompt", "a small bird", "--json")
    plain, adapted = texts(generate(*words)), texts(generate(*words, "--adapter", adapter))
    assert adapted != plain
    assert texts(generate(*words, "--adapter", adapter, "--merged")) == adapted
    alone = lorica("generate", "--adapter", adapter, "--max-new-tokens", 8, *words)
    assert texts(alone) == adapted, "the adapter names its base"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_an_adapter_of_peft_is_one_too(generate, llama, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    model.eval().save_pretrained(tmp_path / "peft")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("the cat sees", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=2)
    theirs = tokenizer.decode(out[0], skip_special_tokens=True)
    [ours] = texts(generate("--prompt", "the cat sees", "--adapter", tmp_path / "peft", "--json"))
    assert "the cat sees" + ours == theirs


def test_a_file_gives_a_line_for_each_answer(generate, text, tmp_path):
    ran = generate("--file", text, "--max-samples", 5)
    assert ran.status == 0, ran.err
    rows = [json.loads(line) for line in ran.out.splitlines()]
    source = [json.loads(line) for line in text.read_text().splitlines()][:5]
    assert [(r["prompt"], r["reference"]) for r in rows] == [
        (s["prompt"], s["completion"]) for s in source
    ]
    out = tmp_path / "answers.jsonl"
    ran = generate("--file", text, "--max-samples", 5, "--output", out, "--batch-size", 2)
    assert ran.status == 0 and [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert f"written to {out}" in ran.out
    again = generate("--file", out, "--max-samples", 2, "--json")  # what was written can be read
    assert texts(again) == [row["completion"] for row in rows[:2]]


def test_a_text_file_holds_a_prompt_a_line(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n\na small dog\n")
    ran = generate("--file", file, "--json")
    assert [a["prompt"] for a in ran.json["answers"]] == ["the cat", "a small dog"]
    assert texts(ran)[0] == texts(generate("--prompt", "the cat", "--json"))[0]


def test_columns_may_have_other_names(generate, tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text("1\tthe cat\n2\ta dog\n")
    ran = generate("--file", file, "--header", "_,ask", "--columns", "prompt=ask", "--json")
    assert [a["prompt"] for a in ran.json["answers"]] == ["the cat", "a dog"]


# -- conversations ---------------------------------------------------------------------------------


def test_each_line_of_standard_input_is_a_turn(generate, monkeypatch):
    def chat(lines: str, *words: str):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return generate(*CHATTING, *words)

    ran = chat("the cat\n\na dog\n/exit\nnever asked\n", "--json")
    assert ran.status == 0, ran.err
    turns = ran.json["messages"]
    assert [m["role"] for m in turns] == ["user", "assistant"] * 2
    assert [m["content"] for m in turns[::2]] == ["the cat", "a dog"]
    assert all(m["content"] for m in turns)
    assert chat("the cat\na dog\n").out.splitlines() == [m["content"] for m in turns[1::2]]
    shared = chat("the cat\nthe cat\n", "--json").json["messages"]
    assert shared[1] == turns[1], "the first turn knows nothing of the second"


def test_a_template_makes_a_prompt_a_turn(generate):
    ran = generate("--prompt", "the cat", "--chat-template", "plain", "--json")
    assert ran.json["answers"][0]["prompt"] == "User: the cat\n\nAssistant: "


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [True, False], ids=["one terminal", "output elsewhere"])
def test_a_single_answer_grows_on_the_terminal(lorica, llama, monkeypatch, both):
    from lorica.cli import generate, main

    words = ["generate", "--model", str(llama), "--prompt", "the cat", "--max-new-tokens", "8"]
    answer = lorica(*words).out
    monkeypatch.setattr(generate, "_TERMINAL", both)

    def run(*more: str) -> tuple[str, str]:
        out, err = io.StringIO(), Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert main([*words, *more]) == 0
        return out.getvalue(), err.getvalue()

    assert run() == ("" if both else answer, answer)
    assert run("--no-stream") == (answer, "")
    out, err = run("--json")
    assert json.loads(out)["answers"][0]["completion"] + "\n" == answer and err == ""


def test_a_conversation_grows_on_the_terminal(llama, monkeypatch):
    from lorica.cli import generate, main

    monkeypatch.setattr(generate, "_TERMINAL", True)
    out, err, asked = io.StringIO(), Terminal(), Terminal("the cat\na dog\n")
    with monkeypatch.context() as patch:
        for name, stream in (("stdin", asked), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        words = ("generate", "--model", str(llama), *CHATTING, "--max-new-tokens", "4")
        assert main(words) == 0
    assert out.getvalue() == ""
    lines = err.getvalue().splitlines()
    assert [line[:2] for line in lines] == ["> ", "> ", "> "] and len(lines[0]) > 2


# -- encoder-decoders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(llama, tmp_path_factory) -> Path:
    """An encoder-decoder with the tokenizer of the others."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "t5"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_decoder_answers(generate, t5, text, monkeypatch):
    assert texts(generate("--prompt", "the cat", "--json", model=t5))
    ran = generate("--file", text, "--max-samples", 3, "--json", model=t5)
    assert len(texts(ran)) == 3 and all("reference" in a for a in ran.json["answers"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    ran = generate(*CHATTING, model=t5)
    assert ran.status == 1 and "asked of a causal model" in ran.err


# -- what is refused -------------------------------------------------------------------------------

WRONG = [
    ([], "nothing to answer was given"),
    (["--prompt", "a", "--chat"], "`--prompt` and `--chat` was given"),
    (["--prompt", "a", "--output", "x"], "`--output` has no effect without `--file`"),
    (["--prompt", "a", "--max-samples", 2], "`--max-samples` has no effect without `--file`"),
    (["--prompt", "a", "--merged"], "`--merged` has no effect without `--adapter`"),
    (["--prompt", "a", "--batch-size", 0], "`--batch-size 0`"),
    (["--prompt", "a", "--num-return-sequences", 2], "draw them with `do_sample`"),
    (["--prompt", "a", "--temperature", 0], "`temperature` is 0.0"),
    (["--prompt", "a", "--top-k", "many"], "a whole number is wanted"),
    (["--prompt", "a", "--tempratur", 1], "Did you mean `--temperature`"),
    (["--file", "conftest.py"], ".py"),
    (["--chat", "--num-return-sequences", 2, "--do-sample"], "goes on from one answer"),
]


@pytest.mark.parametrize("words, part", WRONG)
def test_wrong_usage_is_one_message(generate, words, part):
    ran = generate(*words)
    assert ran.status == (1 if "--file" in words else 2), ran.err
    assert part in ran.err and "Traceback" not in ran.err and not ran.out


def test_what_does_not_fit_is_said_before_the_weights_are_read(
    generate, lorica, bert, llama, text, tmp_path, monkeypatch
):
    from lorica.run import load_model

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(load_model, "load_model", refuse)
        for words, status, part in (
            (("--chat",), 1, "this tokenizer has none"),
            (("--file", text, "--output", tmp_path / "no" / "where"), 2, "does not exist"),
            (("--file", tmp_path / "none.jsonl"), 1, "none.jsonl"),
            (("--prompt", "a", "--adapter", llama), 1, "no adapter"),
            (("--prompt", "a", "--chat-template", "chatlm"), 1, "chatml"),
        ):
            ran = generate(*words)
            assert ran.status == status and part in ran.err, ran.err
    ran = lorica("generate", "--prompt", "copy: ab\n", "--max-new-tokens", 4, "--json")
    assert ran.status == 0, ran.err  # left out: the embedded model
    ran = generate("--prompt", "a", model=bert)
    assert ran.status == 1 and "has no weights for" in ran.err
    ran = generate("--prompt", "the " * 80, "--json")
    assert ran.status == 1 and "positions end at 64" in ran.json["error"]
    with_whole_model = lorica("generate", "--adapter", llama, "--prompt", "a")
    assert with_whole_model.status == 1


def test_a_yaml_file_may_hold_the_options(lorica, llama, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\n")
    file = tmp_path / "ask.yaml"
    file.write_text(
        f"model: {llama}\nfile: {tmp_path / 'p.txt'}\nmax_new_tokens: 3\n"
        "stop_strings: ['zz', ', ']\n"
    )
    ran = lorica("generate", file, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["answers"][0]["tokens"] == 3


# -- real models -----------------------------------------------------------------------------------


def test_a_story_goes_on(generate, shared):
    model = shared / "data" / "models" / "stories260k-hf"
    [answer] = texts(generate("--prompt", "Once upon a time", "--json", model=model))
    assert answer.startswith(", there was")
    file = shared / "data" / "tasks" / "gsm8k_test.jsonl.xz"
    ran = generate("--file", file, "--max-samples", 2, "--json", model=model)
    assert all(a["prompt"].startswith("Question: ") for a in ran.json["answers"])


def test_what_the_tokenizer_loses_of_a_prompt_is_named(generate):
    ran = generate("--prompt", "the cat sees 48/2 = 24", "--max-new-tokens", 1)
    assert ran.status == 0 and "the tokenizer loses" in ran.err and "does not see them" in ran.err
    ran = generate("--prompt", "the cat sees", "--max-new-tokens", 1)
    assert ran.status == 0 and "loses" not in ran.err
