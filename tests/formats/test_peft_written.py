"""What `save` writes, PEFT computes; and `load` reads it back bit for bit."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import peft
import pytest
import torch
from files import close, peft_logits
from transformers import MambaConfig, MambaForCausalLM

import lorica
import models
from lorica.formats.export import export
from lorica.formats.peft.names import shadows, shortest
from lorica.formats.peft.write import config, exceptions
from models import logits, perturb

HEADS = {"llama": "lm_head", "gpt2": "lm_head", "t5": "lm_head", "qwen2": "lm_head"}
METHODS = {
    "lora": {},
    "loraplus": {},
    "lorafa": {},
    "rslora": {},
    "gaussian": {},
    "orthogonal": {},
    "constant(s=0.7)": {},
    "olora": {},
    "pissa": {},
    "pissa(niter=4)": {},
    "dora": {},
    "dora+olora": {},
    "dora+pissa": {},
    "dora(detach=False)+rslora+olora": {},
}
QUERY = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q", "qwen2": "q_proj", "bert": "query"}
INPUT = {
    "llama": "embed_tokens", "gpt2": "wte", "t5": "encoder.embed_tokens",
    "qwen2": "embed_tokens", "bert": "word_embeddings",
}  # fmt: skip
OPTIONS = {
    "patterns": lambda f: {"rank_pattern": {QUERY[f]: 2}, "alpha_pattern": {QUERY[f]: 3}},
    "bias all": lambda f: {"bias": "all"},
    "bias lora_only": lambda f: {"bias": "lora_only"},
    "in full": lambda f: {"modules_to_save": [INPUT[f]]},
    "embedding": lambda f: {"target_modules": [INPUT[f], QUERY[f]]},
    "one block": lambda f: {"layers_to_transform": [1]},
}


def check(family: str, method: str, tmp_path, tied: bool | None = None, **fields):
    """Ours saved = PEFT's = ours loaded = ours read as an ordinary PEFT adapter."""
    over = {} if tied is None else {"tie_word_embeddings": tied}
    model = models.MODELS[family](**over)
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, method, r=4, verbose=False, **fields)
    perturb(adapters)
    ours = logits(model)
    assert not torch.allclose(ours, logits(base), atol=1e-3)
    out = lorica.save(adapters, tmp_path / "out")
    assert not (out / "lorica.safetensors").exists()
    close(ours, peft_logits(base, out))

    again = copy.deepcopy(base)
    loaded = lorica.load(again, out)
    assert loaded.fingerprint() == adapters.fingerprint()
    assert loaded.recipe == adapters.recipe
    assert torch.equal(logits(again), ours)

    (out / "lorica.json").unlink()
    other = copy.deepcopy(base)
    lorica.load(other, out)
    close(ours, logits(other))
    return adapters, out


@pytest.mark.parametrize("method", METHODS)
def test_llama(method, tmp_path):
    check("llama", method, tmp_path)


@pytest.mark.parametrize(
    "method", ["lora", "rslora", "dora+olora", "pissa", "dora(dropout='authors')"]
)
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "qwen2"])
def test_families(family, method, tmp_path):
    check(family, method, tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", ["lora", "rslora+olora+dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "qwen2"])
def test_options(family, option, method, tmp_path):
    check(family, method, tmp_path, **OPTIONS[option](family))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_head_and_embedding(method, tied, tmp_path):
    targets = ["embed_tokens", "lm_head", "v_proj"]
    check("llama", method, tmp_path, tied=tied, target_modules=targets)


def test_shared_biases(tmp_path):
    """A bias that two modules own trains as one, and is written for each."""
    model = models.bert_masked()
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "lora", r=4, bias="all", verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    close(logits(model), peft_logits(base, out))
    other = copy.deepcopy(base)
    assert lorica.load(other, out).fingerprint() == adapters.fingerprint()
    assert torch.equal(logits(other), logits(model))


def test_fresh_head(tmp_path):
    """A head that came without weights trains, is saved, and PEFT finds it under its task."""
    model = models.bert()
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "lora", r=4, heads=["classifier"], verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    close(logits(model), peft_logits(base, out))
    other = models.bert()  # with another random head
    torch.nn.init.normal_(other.classifier.weight)
    loaded = lorica.load(other, out)
    assert torch.equal(logits(other), logits(model))
    assert loaded.summary.heads == {"classifier": ""}


def test_config_says_what_the_user_said(tmp_path):
    model = models.llama()
    model.config._name_or_path = "some/base"
    adapters = lorica.attach(
        model, "rslora", r=4, lora_alpha=5, lora_dropout=0.1, target_modules=["q_proj", "v_proj"],
        verbose=False,
    )  # fmt: skip
    out = lorica.save(adapters, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base",
        "r": 4, "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "init_lora_weights": True, "inference_mode": True,
        "fan_in_fan_out": False,
    }  # fmt: skip
    assert {k: config[k] for k in expected} == expected
    assert "use_dora" not in config


@pytest.mark.parametrize("method", ["olora", "rslora+olora", "pissa"])
def test_carried_factors_are_folded(method, tmp_path):
    adapters, out = check("llama", method, tmp_path)
    config = json.loads((out / "adapter_config.json").read_text())
    scale = next(iter(adapters.layers.values())).site.scale
    assert config["r"] == 8 and config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(8 * scale, rel=1e-12)
    assert config["init_lora_weights"] is True


def test_patterns_are_full_paths_that_match_once(tmp_path):
    adapters, out = check("llama", "olora", tmp_path, rank_pattern={"layers.0.self_attn.q_proj": 2})
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 4}
    # The scale of that layer is alpha/2 with the recipe's alpha, written as alpha over its rank.
    assert set(config["alpha_pattern"]) <= {"model.layers.0.self_attn.q_proj"}


def test_patterns_of_nested_paths():
    """One path that ends in another: the shorter pattern is anchored."""
    values = {"a.q": 1, "b.a.q": 2, "c+d": 3, "c.d": 9}
    patterns = exceptions(values, 9)
    from peft.utils.other import get_pattern_key

    for name, value in values.items():
        for order in (patterns, dict(reversed(patterns.items()))):
            assert order.get(get_pattern_key(order.keys(), name), 9) == value


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_targets_match_exactly_the_adapted(family, tmp_path):
    """By PEFT's own matcher, for uneven selections too."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [n for n, m in models.MODELS[family]().named_modules() if n]
    for fields in ({}, {"layers_to_transform": [0]}, {"exclude_modules": [QUERY[family]]}):
        model = models.MODELS[family]()
        adapters = lorica.attach(model, "lora", r=2, verbose=False, **fields)
        theirs = LoraConfig(target_modules=config(adapters)["target_modules"])
        found = {n for n in names if check_target_module_exists(theirs, n)}
        assert found == set(adapters.layers)


def test_targets_that_no_list_can_name(tmp_path):
    """`q` is adapted and `b.q` is not: only an expression says so."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(4, 4)
            self.b = torch.nn.Module()
            self.b.q = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.b.q(self.q(x))

    from peft import PeftModel

    model, x = Block(), torch.randn(3, 4)
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "lora", r=2, target_modules="q", verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == "q"
    close(model(x), PeftModel.from_pretrained(copy.deepcopy(base), str(out))(x))
    assert lorica.load(base, out).fingerprint() == adapters.fingerprint()


def test_task_is_left_out_where_peft_would_look_for_a_head(tmp_path):
    """PEFT wants the head of a classifier in the file; one that never trained isn't there."""
    adapters, out = check("bert", "lora", tmp_path, heads=[])
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] is None
    adapters, out = check("bert", "lora", tmp_path / "head")
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_saved_module_that_peft_cannot_single_out(tmp_path):
    """PEFT's names for modules trained in full match by characters: `head` means `lm_head` too."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(4, 4)
            self.lm_head = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.lm_head(self.body(x)))

    model, x = Net(), torch.randn(3, 4)
    base = copy.deepcopy(model)
    adapters = lorica.attach(
        model, "olora", r=2, target_modules=["body"], modules_to_save=["head"], verbose=False
    )
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    assert sorted(f.name for f in out.iterdir()) == ["lorica.json", "lorica.safetensors"]
    assert "single out" in json.loads((out / "lorica.json").read_text())["why_not_peft"]
    loaded = lorica.load(base, out)
    assert loaded.fingerprint() == adapters.fingerprint()
    assert torch.equal(base(x), model(x))


def test_half_precision_base(tmp_path):
    """The adapter stays in float32; the base's hash knows nothing of its dtype."""
    model = models.llama().to(torch.bfloat16)
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "dora+olora", r=4, verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    loaded = lorica.load(copy.deepcopy(base), out)
    assert loaded.fingerprint() == adapters.fingerprint()
    assert lorica.load(copy.deepcopy(base).float(), out).hash_base() == adapters.hash_base()


def test_nothing_is_computed_anew(tmp_path, monkeypatch):
    """Loading runs no decomposition: the factors are in the file."""
    adapters, out = lorica.attach(models.llama(), "olora", r=4, verbose=False), tmp_path / "out"
    lorica.save(adapters, out)
    monkeypatch.setattr(torch.linalg, "qr", None)
    assert lorica.load(models.llama(), out).fingerprint() == adapters.fingerprint()


def test_buffers_of_saved_modules(tmp_path):
    """A module that trains in full takes its running statistics along."""

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    model, base, x = net(), net(), torch.randn(8, 4)
    adapters = lorica.attach(model, "lora", r=2, modules_to_save=["1"], verbose=False)
    model(x)
    out = lorica.save(adapters, tmp_path / "out")
    model.eval()
    base.eval()
    lorica.load(base, out)
    assert torch.equal(base(x), model(x))
    again = lorica.Adapters.of(base)
    assert again.fingerprint() == adapters.fingerprint()
    norm: Any = again.saved["1"].copy
    norm.running_mean += 1
    assert again.fingerprint() != adapters.fingerprint(), "what the forward reads is in it"
    assert again.fingerprint(buffers=False) == adapters.fingerprint(buffers=False)


def test_names_are_regular_expressions_for_peft():
    assert shadows("classifier", ["a.classifier.dense"])
    assert not shadows("classifier", ["a.subclassifier.dense"])
    assert re.fullmatch(shortest(["q"], ["q", "b.q"]), "q")


def test_what_peft_refuses_to_adapt_is_not_labelled_as_its_own(tmp_path):
    """PEFT puts no LoRA onto the output of a Mamba block, whatever the file holds."""
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4
        )
    )
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "lora", r=2, target_modules=["out_proj"], verbose=False)
    perturb(adapters, 0.1)
    written = lorica.save(adapters, tmp_path / "a")
    assert not (written / "adapter_config.json").exists()
    said = json.loads((written / "lorica.json").read_text())
    assert "PEFT refuses LORA on 'backbone.layers.0.mixer.out_proj'" in json.dumps(said)
    lorica.load(again := copy.deepcopy(base), written)
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    for how in ({}, {"portable": True}, {"r": 2}):
        with pytest.raises(ValueError, match=r"PEFT refuses LORA .*to='merged'"):
            export(adapters, tmp_path / "b", **how)
    with pytest.raises(ValueError, match="incompatible with Mamba"):  # the oracle
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["out_proj"]))
    lorica.detach(model)
    adapters = lorica.attach(model, "lora", r=2, target_modules=["in_proj"], verbose=False)
    assert (lorica.save(adapters, tmp_path / "c") / "adapter_config.json").exists()
