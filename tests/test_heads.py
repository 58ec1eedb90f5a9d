"""What trains in full without being named: heads of classifiers, and what a checkpoint lacks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5ForQuestionAnswering,
)
from transformers.utils import logging

import lorica
from lorica.model.heads import in_full, task_head
from models import bert, bert_masked, gpt2, llama, t5

logging.set_verbosity_error()


def in_full_of(model, **fields) -> list[str]:
    adapters = lorica.attach(model, "lora", r=2, verbose=False, **fields)
    found = list(adapters.saved)
    lorica.detach(model)
    return found


@pytest.fixture
def backbone(tmp_path):
    """A checkpoint of BERT without any head."""
    bert_masked().bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_the_head_of_a_classifier_trains_in_full_wherever_its_values_came_from(backbone):
    loaded = BertForSequenceClassification.from_pretrained(backbone, num_labels=3)
    assigned = bert()
    assigned.load_state_dict(bert().state_dict(), assign=True)
    resized = bert().eval()
    resized.classifier = nn.Linear(resized.config.hidden_size, 7)
    kinds = {
        "loaded": loaded,
        "copied": copy.deepcopy(loaded),
        "assigned": assigned,
        "built": bert(),
        "resized": resized,
        "resized, training": copy.deepcopy(resized).train(),
    }
    for what, model in kinds.items():
        assert in_full_of(model) == ["classifier"], what
    adapters = lorica.attach(loaded, "lora", r=2, verbose=False)
    said = "in full      classifier (the head of a BertForSequenceClassification)"
    assert said in str(adapters.summary)


def test_nothing_else_trains_in_full_wherever_its_values_came_from(tmp_path):
    llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    old = model.model.layers[0].self_attn.q_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn.q_proj = new  # a layer replaced by hand
    for layer in model.model.layers:  # what a quantiser gave back: parameters made anew
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach().clone())
    model.model.layers[1].mlp.down_proj.load_state_dict(
        {"weight": torch.randn_like(model.model.layers[1].mlp.down_proj.weight)}, assign=True
    )
    for training in (True, False):
        model.train(training)
        model.resize_token_embeddings(model.config.vocab_size + 5)
        assert in_full_of(model) == []
    assert in_full_of(model, target_modules=["q_proj", "up_proj", "down_proj"]) == []


def test_a_head_that_the_user_names_is_adapted_or_left_alone():
    assert in_full_of(bert(), target_modules=["query"]) == ["classifier"]
    names = ["query", "classifier"]
    adapters = lorica.attach(bert(), "lora", r=1, target_modules=names, verbose=False)
    assert "classifier" in adapters.layers and not adapters.saved
    assert in_full_of(bert(), exclude_modules=["classifier"]) == []
    assert in_full_of(bert(), target_modules=r".*(query|classifier)") == []
    assert in_full_of(bert(), modules_to_save=["classifier"]) == ["classifier"]
    assert in_full_of(bert(), modules_to_save=["pooler"]) == ["bert.pooler", "classifier"]
    adapters = lorica.attach(bert(), "galore", r=2, target_modules=["query"], verbose=False)
    assert "classifier.weight" in adapters.direct


def test_a_name_that_also_occurs_in_the_head_means_the_layers_of_the_backbone():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "vocab_size": 32, "max_position_embeddings": 16}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, **more))
    adapters = lorica.attach(model, "lora", r=1, target_modules=["dense"], verbose=False)
    assert list(adapters.saved) == ["classifier"]
    assert all(name.startswith("roberta.") for name in adapters.layers)
    lorica.detach(model)
    names = ["query", "classifier.dense", "out_proj"]
    adapters = lorica.attach(model, "lora", r=1, target_modules=names, verbose=False)
    assert not adapters.saved and "classifier.out_proj" in adapters.layers


def test_which_modules_are_a_head():
    assert task_head(bert()) == ["classifier"]
    for model in (llama(), gpt2(), t5(), bert_masked(), nn.Sequential(nn.Linear(2, 2))):
        assert task_head(model) == [], "output embeddings are no head of this kind"
    assert task_head(T5ForQuestionAnswering(t5().config)) == ["qa_outputs"]
    config = llama().config
    assert task_head(AutoModelForSequenceClassification.from_config(config)) == ["score"]


def test_what_the_checkpoint_lacks_trains_in_full_where_transformers_was_asked(backbone):
    model, told = BertForSequenceClassification.from_pretrained(
        backbone, num_labels=3, output_loading_info=True
    )
    missing = told["missing_keys"]
    assert in_full(model, missing) == dict.fromkeys(
        ["bert.pooler", "classifier"], "the checkpoint has no weights for it"
    )
    assert in_full_of(model, missing_keys=missing) == ["bert.pooler", "classifier"]
    assert in_full_of(model) == ["classifier"]


@pytest.mark.parametrize(("fields", "named"), [
    ({"exclude_modules": ["classifier"]}, "classifier.weight"),
    ({"target_modules": ["query", "classifier"], "r": 1}, "classifier.weight"),
])  # fmt: skip
def test_what_the_checkpoint_lacks_and_would_stay_frozen_is_an_error(backbone, fields, named):
    model, told = BertForSequenceClassification.from_pretrained(
        backbone, num_labels=3, output_loading_info=True
    )
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=named) as error:
        lorica.attach(model, "lora", **fields, missing_keys=told["missing_keys"], verbose=False)
    assert "modules_to_save=['classifier']" in str(error.value)
    assert dict(model.named_modules()) == before


def test_output_embeddings_that_the_checkpoint_lacks_have_to_be_named(tmp_path):
    llama().model.save_pretrained(tmp_path)
    model, told = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = told["missing_keys"]
    with pytest.raises(ValueError, match="modules_to_save=\\['lm_head'\\]"):
        lorica.attach(model, "lora", r=2, missing_keys=missing, verbose=False)
    assert in_full_of(model, missing_keys=missing, modules_to_save=["lm_head"]) == ["lm_head"]
    lorica.attach(model, "full", missing_keys=missing, verbose=False)


def test_a_part_of_a_module_that_the_checkpoint_lacks_is_an_error_unless_it_trains(backbone):
    model = BertForMaskedLM.from_pretrained(backbone)
    key = "bert.encoder.layer.0.attention.self.query.bias"
    with pytest.raises(ValueError, match="query.bias"):
        lorica.attach(model, "lora", r=2, missing_keys=[key], verbose=False)
    lorica.attach(model, "lora", r=2, bias="lora_only", missing_keys=[key], verbose=False)
