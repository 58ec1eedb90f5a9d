"""Models loaded for a task: what files say of it, and what they leave out."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from torch import Tensor
from transformers import (
    BertConfig,
    LlamaConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

import lorica
from lorica import formats
from lorica.data.lengths import longest
from lorica.recipe.registry import names
from lorica.run.load_model import _class_of, _task, load_base, load_model
from lorica.run.token_weighting import counted_labels
from lorica.tensors import linalg
from lorica.tensors.linalg import all_finite
from models import llama


def some_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(token_models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **more)


@pytest.mark.parametrize(("config", "said", "end"), [
    (T5Config(n_positions=512), 512, None),
    (T5Config(), None, None),
    (RobertaConfig(max_position_embeddings=514), None, 512),
    (RobertaConfig(max_position_embeddings=514), 512, 512),
    (RobertaConfig(max_position_embeddings=514), 128, 128),
    (MPNetConfig(max_position_embeddings=514), None, 512),
    (BertConfig(max_position_embeddings=512), None, 512),
])  # fmt: skip
def test_positions_end_where_the_models_tables_do(config, said, end):
    assert longest(config, some_tokenizer(model_max_length=said)) == end


def test_a_name_alone_makes_no_encoder_decoder():
    told = {"task_type": None, "base": {"class": "SomeForConditionalGeneration"}, "path": "here"}
    assert _task(told, T5Config()) == "seq2seq-lm"
    other = LlamaConfig(architectures=["OtherForConditionalGeneration"])
    assert _task(told, other) is None
    with pytest.raises(ValueError, match="does not say what its model does"):
        _class_of(told, other)


def test_an_adapter_of_the_hub_finds_the_bases_tokenizer(tmp_path: Path, monkeypatch: Any):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    some_tokenizer(model_max_length=33).save_pretrained(base)
    model = llama()
    model.name_or_path = str(base)
    formats.save(lorica.attach(model, "lora", r=2, verbose=False), tmp_path / "down")
    monkeypatch.setattr(formats.safe_files, "_download", lambda repository: tmp_path / "down")
    monkeypatch.chdir(tmp_path)
    assert load_base("owner/name", str(base))[1].model_max_length == 33
    some_tokenizer(model_max_length=44).save_pretrained(tmp_path / "down")
    assert load_base("owner/name", str(base))[1].model_max_length == 44, "the adapter's own"
    shutil.rmtree(tmp_path / "down")
    with pytest.raises(ValueError):
        load_base("owner/name", str(base))


def test_a_trainer_that_does_not_say_shifts_no_labels():
    labels = torch.tensor([[3, 4, -100]])
    older: Any = SimpleNamespace()
    assert counted_labels(older, {"labels": labels}) == 2
    newer: Any = SimpleNamespace(_loss_shifts_labels=True)
    assert counted_labels(newer, {"labels": labels}) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_holds_no_numbers_is_not_loaded(tmp_path: Path, value: float):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="not finite, in model.layers.1.mlp.up_proj.weight: .* Use"
    ):
        load_model(str(tmp_path), "causal-lm", labels=None, dtype="auto", widen=True)


@pytest.mark.parametrize("init", names("inits"))
def test_nothing_starts_on_a_base_that_holds_no_numbers(init: str):
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[2, 3] = torch.nan
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.weight \(.* not finite"):
        lorica.attach(model, init, r=2, verbose=False)
    assert list(model.modules()) == before


def test_a_weight_is_read_once_for_values_that_are_not_finite(monkeypatch: pytest.MonkeyPatch):
    weights = [torch.ones(2), torch.ones(2), torch.ones(2)]
    assert all(map(linalg.loaded_finite, weights))
    weights[1].add_(torch.nan)
    read: list[Tensor] = []
    monkeypatch.setattr(linalg, "all_finite", lambda W: read.append(W) or all_finite(W))
    assert [linalg.finite_weight(W) for W in weights] == [True, False, True]
    assert [id(W) for W in read] == [id(weights[1])]
    assert linalg.finite_weight(weights[0]) and len(read) == 2, "found so once, at the load"


def test_large_values_are_finite():
    assert all_finite(torch.full((4,), 3e38)) and all_finite(torch.full((9,), 60000.0).half())
    assert all_finite(torch.ones(3).to(torch.float8_e4m3fn)) and all_finite(torch.ones(3).int())
    assert all_finite(torch.empty(0, 4)) and all_finite(torch.tensor([True]))
    assert not all_finite(torch.tensor([1, torch.nan, 1]).half())
    assert not all_finite(torch.tensor([3e38, 3e38, -torch.inf]))
