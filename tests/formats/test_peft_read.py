"""Adapters that PEFT made compute here what they compute there; what can't is refused by name."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from files import close, edit, peft_logits, peft_made, there_and_back
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.config import PromptLearningConfig
from safetensors.torch import load_file, save_file

import lorica
import models
from lorica.formats.peft.config import _PROMPTS
from models import logits

LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
MADE = {
    "lora": ("llama", {}),
    "one name": ("llama", {"target_modules": ["v_proj"]}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "float alpha": ("llama", {"lora_alpha": 2.5}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "olora dora": ("llama", {"init_lora_weights": "olora", "use_dora": True, "use_rslora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "random": ("llama", {"init_lora_weights": False}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "first match": (
        "llama",
        {
            "rank_pattern": {r"layers\.0.*q_proj": 2, "q_proj": 3, "nothing": 7},
            "alpha_pattern": {"self_attn.q_proj": 5, r"layers\.1\.self_attn\.q_proj": 9},
        },
    ),
    "expression": ("llama", {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "exclude": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "one block": ("llama", {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "blocks": ("llama", {"layers_to_transform": [0]}),
    "bias all": ("qwen2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only", "use_dora": True}),
    "rank above the layer's": ("llama", {"r": 40}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding olora": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "init_lora_weights": "olora"},
    ),
    "in full": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "bert bias": (
        "bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "bert all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "t5": ("t5", {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_equals_peft(case, tmp_path):
    family, fields = MADE[case]
    base = models.MODELS[family]()
    theirs, _ = peft_made(base, tmp_path / "theirs", **{**LLAMA, **fields})
    if case == "first match":  # PEFT sorts the patterns as it writes them
        theirs = peft_logits(base, tmp_path / "theirs")
    there_and_back(base, theirs, tmp_path)


def test_all_linear_as_it_was_never_resolved(tmp_path):
    """The word itself may stand in a file written by hand."""
    base = models.llama()
    theirs, _ = peft_made(base, tmp_path / "a", **{**LLAMA, "target_modules": "all-linear"})
    edit(tmp_path / "a" / "adapter_config.json", target_modules="all-linear")
    model = copy.deepcopy(base)
    assert len(lorica.load(model, tmp_path / "a")) == 14
    close(theirs, logits(model))


def test_training_goes_on_as_in_peft(tmp_path):
    """Gradients of a loaded, unconverted OLoRA adapter are PEFT's."""
    base = models.llama()
    fields = {**LLAMA, "init_lora_weights": "olora"}
    _, theirs = peft_made(base, tmp_path / "a", **fields)
    model = copy.deepcopy(base)
    adapters = lorica.load(model, tmp_path / "a")
    theirs(**models.batch(base)).loss.backward()
    model(**models.batch(base)).loss.backward()
    name = "model.layers.0.self_attn.q_proj"
    layer = theirs.get_submodule(f"base_model.model.{name}")
    pair = adapters.layers[name].update.delta.pair()
    assert pair is not None
    close(layer.lora_A["default"].weight.grad, pair.A.grad)
    close(layer.lora_B["default"].weight.grad, pair.B.grad)


def test_anchored_start_on_a_transposed_layer(tmp_path):
    base = models.gpt2()
    fields = {**LLAMA, "target_modules": ["c_fc"], "init_lora_weights": "pissa"}
    peft_made(base, tmp_path / "a", **fields)
    refused(base, tmp_path / "a", "transposed layer", "path_initial_model_for_weight_conversion")


def refused(model, path, *words: str, **options) -> str:
    """The load fails with these words and leaves the model as it was."""
    before = {n: (p, p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        lorica.load(model, path, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (p, value, grad) in before.items():
        assert after[name] is p and torch.equal(p, value) and p.requires_grad == grad, name
    return message


@pytest.fixture
def made(tmp_path):
    base = models.llama()
    peft_made(base, tmp_path / "a", **LLAMA)
    return base, tmp_path / "a"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("qalora_group_size", 8),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("velora_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
        ("a_switch_of_tomorrow", "on"),
    ],
)
def test_switches_that_are_not_implemented(made, key, value):
    base, path = made
    edit(path / "adapter_config.json", **{key: value})
    refused(base, path, f"`{key}={value!r}`", "adapter_config.json", "not implemented")


def test_every_key_of_a_plain_config_is_known(made):
    """Defaults are let pass, whatever the version of PEFT adds."""
    base, path = made
    edit(path / "adapter_config.json", a_switch_of_tomorrow=None, another=False, third={})
    lorica.load(base, path)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("LOHA", "merge_and_unload()"),
        ("IA3", "merge_and_unload()"),
        ("XLORA", "PEFT (`PeftModel.from_pretrained(base, folder)`), which can't merge this type"),
        ("PREFIX_TUNING", "there is nothing to merge"),
        (None, "train an adapter here"),
    ],
)
def test_other_methods(made, kind, advice):
    base, path = made
    edit(path / "adapter_config.json", peft_type=kind)
    refused(base, path, repr(kind), "read are LORA files", advice)


def test_the_types_without_anything_to_merge_are_those_of_peft():
    known = PEFT_TYPE_TO_CONFIG_MAPPING
    prompts = {k.value for k, kind in known.items() if issubclass(kind, PromptLearningConfig)}
    assert prompts == _PROMPTS


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq", "tomorrow"])
def test_starts_that_cannot_be_had(made, start):
    base, path = made
    edit(path / "adapter_config.json", init_lora_weights=start)
    refused(base, path, repr(start), "path_initial_model_for_weight_conversion")


def test_eva_is_harmless(made):
    base, path = made
    edit(path / "adapter_config.json", init_lora_weights="eva", eva_config={"rho": 2.0})
    lorica.load(base, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": "4"}, ["'r' is '4', not int"]),
        ({"r": True}, ["'r' is True"]),
        ({"lora_alpha": "16"}, ["'lora_alpha'"]),
        ({"r": ...}, ["'r'", "must be given"]),
        ({"target_modules": None}, ["'target_modules'", "must be given"]),
        ({"target_modules": ["query"]}, ["means no module", "q_proj"]),
        ({"target_modules": "("}, ["no regular expression"]),
        ({"rank_pattern": {"(": 2}}, ["no regular expression"]),
        ({"rank_pattern": {"q_proj": "x"}}, ["rank_pattern"]),
        ({"use_dora": "yes"}, ["'use_dora'"]),
        ({"bias": "some"}, ["`bias='some'`"]),
        ({"lora_dropout": 2.0}, ["lora_dropout"]),
    ],
)
def test_wrong_values(made, changes, words):
    base, path = made
    edit(path / "adapter_config.json", **changes)
    refused(base, path, "adapter_config.json", *words)


def change_tensors(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_extra_and_misshapen_are_listed_together(made):
    base, path = made
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"

    def change(tensors):
        del tensors[key.format(0)]
        tensors[key.format(1)] = torch.zeros(3, 32)
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2)

    change_tensors(path, change)
    refused(
        base, path, key.format(0) + " is missing", key.format(1) + " is (3, 32)",
        "layers.7.self_attn.q_proj.lora_A.weight belongs to nothing",
    )  # fmt: skip


def test_magnitudes_that_are_missing(made):
    """PEFT only warns."""
    base, path = made
    edit(path / "adapter_config.json", use_dora=True)
    refused(base, path, "lora_magnitude_vector is missing")


def test_magnitudes_that_the_config_is_silent_about(tmp_path):
    base = models.llama()
    peft_made(base, tmp_path / "a", **{**LLAMA, "use_dora": True})
    edit(tmp_path / "a" / "adapter_config.json", use_dora=False)
    refused(base, tmp_path / "a", "lora_magnitude_vector belongs to nothing")


def test_another_bases_embedding(tmp_path):
    base = models.llama()
    peft_made(base, tmp_path / "a", **{**LLAMA, "target_modules": ["embed_tokens"]})
    other = models.llama(seed=1)
    refused(other, tmp_path / "a", "embed_tokens.base_layer.weight", "another base")


def test_resized_vocabulary(tmp_path):
    base = models.llama()
    peft_made(base, tmp_path / "a", **{**LLAMA, "target_modules": ["embed_tokens"]})
    refused(models.llama(vocab_size=70), tmp_path / "a", "of a vocabulary of 61", "has 70 rows")


def test_another_model(made):
    _, path = made
    refused(models.gpt2(), path, "means no module of this GPT2LMHeadModel")
    refused(models.llama(hidden_size=16), path, "instead of")
    edit(path / "adapter_config.json", target_parameters=["mlp.experts.gate_up_proj"])
    refused(models.llama(), path, "matches no stack of experts' weights")


def test_pickles(made):
    base, path = made
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    refused(base, path, "pickle", "save_pretrained")


def test_a_copied_bias_that_differs(tmp_path):
    base = models.bert()
    fields = {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}
    peft_made(base, tmp_path / "a", **{**LLAMA, **fields})

    def change(tensors):
        keys = [k for k in tensors if re.search(r"modules_to_save.*bias$", k)]
        assert keys
        for key in keys:
            tensors[key] += 1

    change_tensors(tmp_path / "a", change)
    refused(base, tmp_path / "a", "differs from")


def test_lower_precision(made):
    """A file in bfloat16 trains on in float32."""
    base, path = made

    def change(tensors):
        tensors.update({k: t.to(torch.bfloat16) for k, t in tensors.items()})

    change_tensors(path, change)
    adapters = lorica.load(base, path)
    assert {p.dtype for _, pair in adapters.pairs() for p in (pair.A, pair.B)} == {torch.float32}


def test_frozen(made):
    base, path = made
    lorica.load(base, path, trainable=False)
    assert not any(p.requires_grad for p in base.parameters())


def test_the_file_of_a_folder_without_tensors(made):
    base, path = made
    (path / "adapter_model.safetensors").unlink()
    refused(base, path, "no adapter_model.safetensors", "README.md")
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4
