"""`--add-tokens`: a run with new tokens, and every verb on what it leaves."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

TOKENS = ["<new>", "<bot>"]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "the <new> cat", "completion": " sees <bot> <new> good"}
    file.write_text((json.dumps(row) + "\n") * 8)
    return file


def test_a_run_with_new_tokens_and_what_it_leaves(train, lorica, rows, llama, tmp_path):
    listed = tmp_path / "tokens.txt"
    listed.write_text("<new>\n<bot>\n")
    words = ("--learning-rate", "3e-2", "--r", 2, "--save-steps", 3, "--add-tokens", listed)
    straight = train(*words, data=rows)
    assert straight.status == 0, straight.err
    assert straight.json["summary"]["tokens"] == {
        "model.embed_tokens": [20, 21],
        "lm_head": [20, 21],
    }
    adapter = tmp_path / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [20, 21], "lm_head": [20, 21]}

    told = lorica("inspect", adapter, "--json").json
    assert told["tokens"] == [20, 21] and not told["problems"]
    assert "tokens      20 to 21" in lorica("inspect", adapter).out
    ask = ("--prompt", "the <new> cat", "--max-new-tokens", 4, "--dtype", "float32")
    answer = lorica("generate", "--adapter", adapter, *ask)
    assert answer.status == 0 and "<new>" in answer.out, answer.err
    figures = lorica("eval", "--adapter", adapter, "--data", rows, "--json")
    assert figures.status == 0 and figures.json["metrics"]["loss"] < 2.9, figures.err
    merged = lorica("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
    assert merged.status == 0, merged.err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 22
    assert lorica("generate", "--model", tmp_path / "merged", *ask).out == answer.out
    bf16 = ("--output-dir", tmp_path / "bf16", "--dtype", "bfloat16")
    assert lorica("export", "--adapter", adapter, *bf16).status == 0
    more = lorica("train", "--adapter", adapter, "--data", rows, "--max-steps", 1, "--output-dir",
                  tmp_path / "more", "--json")  # fmt: skip
    assert more.status == 0 and more.json["loss"] < 2.9, more.err


@pytest.mark.parametrize("method", ["dora", "full"])
def test_resumed_is_the_straight_run(train, lorica, rows, tmp_path, method):
    import shutil

    words = ("--method", method, "--save-steps", 2, "--add-tokens", *TOKENS)
    straight = train(*words, out="straight", steps=4, data=rows)
    assert straight.status == 0, straight.err
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for name in ("checkpoint-4", "model" if method == "full" else "adapter"):
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again" / "result.json").unlink()
    resumed = lorica("train", "--resume", "--output-dir", tmp_path / "again", "--json")
    assert resumed.status == 0, resumed.err
    assert resumed.json["adapter_sha256"] == straight.json["adapter_sha256"]


def test_a_new_row_starts_as_the_mean_of_its_pieces(llama):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorica.run import new_tokens

    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    table = model.get_input_embeddings().weight.detach().clone()
    draws = torch.get_rng_state()
    new = new_tokens.add(tokenizer, ["red cat", "zebra"])
    new_tokens.start(model, new)
    assert torch.equal(torch.get_rng_state(), draws)
    grown = model.get_input_embeddings().weight
    assert grown.shape == (22, 16) and torch.equal(grown[:20], table)
    own = table[tokenizer.convert_tokens_to_ids(["red", "cat"])].mean(0)
    torch.testing.assert_close(grown[20], own)
    torch.testing.assert_close(grown[21], table.mean(0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cat",), "the tokenizer has this token already"),
        (("<a>", "<a>"), "twice"),
        (("<a>,",), "tokens are wanted"),
    ],
)
def test_refused(train, rows, words, said):
    ran = train("--add-tokens", *words, data=rows)
    assert ran.status and said in ran.err


def test_modules_to_save_hold_the_rows_then(train, lorica, rows, tmp_path):
    words = ("--add-tokens", *TOKENS, "--modules-to-save", "embed_tokens", "lm_head", "--r", 2)
    ran = train(*words, data=rows)
    assert ran.status == 0, ran.err
    assert ran.json["summary"]["tokens"] == {}
    adapter = tmp_path / "out" / "adapter"
    stored = load_file(adapter / "adapter_model.safetensors")
    assert stored["base_model.model.lm_head.weight"].shape == (22, 16)
    assert lorica("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").status == 0
