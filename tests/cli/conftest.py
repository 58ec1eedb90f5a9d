"""Tiny models with a tokenizer, data of a few lines, and the command line called in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = "the a cat dog bird sees likes hears red blue small big and not very good bad".split()


class Ran:
    """One call: exit status, standard output and error."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch):
    """One thread, no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORICA_DEBUG", raising=False)


@pytest.fixture
def lorica(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`lorica("methods", "--json")` runs the verb in this process."""
    import torch

    from lorica.cli import main

    torch.set_num_threads(1)

    def call(*words: object) -> Ran:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Ran(status, out, err)

    return call


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of 2 layers x 16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 2 layers x 16 without a head."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).half().save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _sentences(count: int) -> list[str]:
    import random

    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(count)]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 prompts and completions of uneven length."""
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    rows = zip(_sentences(96)[::2], _sentences(96)[1::2], strict=True)
    file.write_text(
        "".join(json.dumps({"prompt": p, "completion": " " + c}) + "\n" for p, c in rows)
    )
    return file


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 labelled sentences."""
    file = tmp_path_factory.mktemp("data") / "classes.csv"
    rows = [f"{s},{'good' if 'cat' in s else 'bad'}" for s in _sentences(40)]
    file.write_text("\n".join(["sentence,label", *rows]) + "\n")
    return file


@pytest.fixture
def train(lorica, llama, text, tmp_path) -> Callable[..., Ran]:
    """`train("--r", 2, out="a")`: six steps of the tiny model into tmp_path / out."""

    def call(
        *words: object,
        out: str = "out",
        steps: int | None = 6,
        data: object = text,
        file: object = None,
    ) -> Ran:
        length = () if steps is None else ("--max-steps", steps)
        page = () if "--report-html" in words else ("--no-report-html",)  # a fifth of the time
        first = () if file is None else (file,)
        return lorica(
            "train", *first, "--model", llama, "--data", data,
            "--output-dir", tmp_path / out, *length,
            "--per-device-train-batch-size", 4, "--json", *page, *words,
        )  # fmt: skip

    return call
