"""Merged models that plain transformers loads, exports for other programs, and `inspect`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from files import close, peft_logits, peft_made

import lorica
import models
from lorica.io import export, inspect, merge_to
from models import logits, perturb

# family -> what is adapted where an embedding and a head are shared
TIED = [
    ("llama", True, ["lm_head", "q_proj"]),
    ("llama", True, ["embed_tokens"]),
    ("llama", True, ["embed_tokens", "lm_head"]),
    ("llama", False, ["embed_tokens", "lm_head"]),
    ("llama", True, "all-linear"),
    ("gpt2", True, ["lm_head", "c_attn"]),
    ("gpt2", True, ["wte"]),
    ("t5", True, ["lm_head", "q"]),
    ("t5", True, ["encoder.embed_tokens", "q"]),
    ("t5", True, ["decoder.embed_tokens", "lm_head"]),
    ("t5", True, ["shared", "q"]),
    ("t5", True, "all-linear"),
    ("qwen2", True, ["lm_head", "k_proj"]),
    ("bert", True, "all-linear"),
]


@pytest.mark.parametrize(("family", "tied", "targets"), TIED)
@pytest.mark.parametrize("method", ["lora", "dora+olora"])
def test_merged_models_load_with_plain_transformers(family, tied, targets, method, tmp_path):
    model = models.MODELS[family](tie_word_embeddings=tied)
    adapters = lorica.attach(model, method, r=4, target_modules=targets, verbose=False)
    perturb(adapters)
    before = logits(model)
    report = merge_to(model, tmp_path / "out")
    close(before, logits(model))
    plain = type(model).from_pretrained(tmp_path / "out")
    close(before, logits(plain))
    assert not report.suspicious and report.untied == bool(adapters.contract.tied)
    assert not (tmp_path / "out" / "lorica.json").exists()


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_modules_trained_in_full_are_merged(targets, tmp_path):
    model = models.llama(tie_word_embeddings=True)
    adapters = lorica.attach(
        model, "lora", r=4, modules_to_save=targets, bias="all", target_modules=["q_proj"],
        verbose=False,
    )  # fmt: skip
    perturb(adapters)
    before = logits(model)
    merge_to(adapters, tmp_path / "out")
    close(before, logits(type(model).from_pretrained(tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_rounding_explains_a_merge_and_nothing_more(family, dtype, tmp_path, monkeypatch):
    model = models.MODELS[family]().to(dtype)
    perturb(lorica.attach(model, "lora", r=4, verbose=False))
    wrong = copy.deepcopy(model)
    report = merge_to(model, tmp_path / "out")
    assert not report.suspicious, report
    assert report.mean_change <= report.max_change
    json.dumps(report.as_dict())

    merge = lorica.merge

    def off(model):
        name = next(iter(lorica.Adapters.of(model).layers))
        merge(model)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(-1)

    monkeypatch.setattr("lorica.io.merged.merge", off)
    report = merge_to(wrong, tmp_path / "wrong")
    assert report.suspicious and "MORE" in str(report), report


def test_merge_writes_the_tokenizer_in_shards_and_atomically(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    model = models.llama()
    lorica.attach(model, "lora", r=2, verbose=False)
    merge_to(model, tmp_path / "out", tokenizer=Tokenizer(), max_shard_size="20KB")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "model.safetensors.index.json", "config.json"} <= names
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    other = models.llama()
    lorica.attach(other, "lora", r=2, verbose=False)
    with pytest.raises(ValueError, match="overwrite=True"):
        merge_to(other, tmp_path / "out")
    assert lorica.Adapters.of(other)  # refused before anything happened
    merge_to(other, tmp_path / "out", overwrite=True)
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names and "model.safetensors.index.json" not in names


def test_merge_refusals(tmp_path):
    with pytest.raises(ValueError, match="no adapters are attached"):
        merge_to(models.llama(), tmp_path / "out")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    lorica.attach(model, "lora", r=2, verbose=False)
    with pytest.raises(ValueError, match=r"no transformers model.*lorica\.merge"):
        merge_to(model, tmp_path / "out")


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rslora", "olora", "pissa", "constant(s=0.3)"])
def test_portable_is_exact_with_one_rank_and_alpha(method, tmp_path):
    model = models.llama()
    base = copy.deepcopy(model)
    adapters = lorica.attach(
        model, method, r=4, rank_pattern={"q_proj": 2}, verbose=False,
        target_modules=["q_proj", "embed_tokens", "down_proj"],
    )  # fmt: skip
    perturb(adapters)
    done = export(adapters, tmp_path / "out", portable=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.r and done.error == 0
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and not config["use_rslora"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    close(logits(model), peft_logits(base, tmp_path / "out"))


def test_export_of_a_folder_gives_the_base_back(tmp_path):
    model = models.llama()
    base = copy.deepcopy(model)
    perturb(lorica.attach(model, "dora+olora", r=4, bias="all", verbose=False))
    ours = logits(model)
    folder = lorica.save(model, tmp_path / "own")
    plain = copy.deepcopy(base)
    export(folder, tmp_path / "peft", model=plain)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), base.parameters(), strict=True)
    )
    close(ours, peft_logits(base, tmp_path / "peft"))
    report = export(folder, tmp_path / "merged", to="merged", model=plain)
    assert not report.suspicious  # type: ignore[union-attr]
    close(ours, logits(type(model).from_pretrained(tmp_path / "merged")))
    with pytest.raises(ValueError, match="holds no base"):
        export(folder, tmp_path / "x")


def test_lower_precision(tmp_path):
    model = models.llama()
    base = copy.deepcopy(model)
    perturb(lorica.attach(model, "lora", r=4, verbose=False))
    done = export(model, tmp_path / "out", dtype="bfloat16")
    assert inspect(tmp_path / "out")["dtypes"] == ["bfloat16"]
    assert 0 < done.error < 0.02  # type: ignore[union-attr]
    assert lorica.load(base, tmp_path / "out")
    close(logits(model), logits(base), tolerance=0.05)


def test_cutting_the_rank_is_the_best_approximation(tmp_path):
    model = models.llama()
    adapters = lorica.attach(model, "olora", r=4, target_modules=["q_proj"], verbose=False)
    perturb(adapters)
    whole = {n: f.weight() for n, layer in adapters if (f := layer.update.factors())}
    done = export(adapters, tmp_path / "out", r=3)
    other = lorica.load(models.llama(), tmp_path / "out")
    errors = []
    for name, layer in other:
        factors = layer.update.factors()
        assert factors is not None and factors.A.shape[0] == 3
        s = torch.linalg.svdvals(whole[name].double())
        best = s[3:].norm() / s.norm()
        error = (factors.weight() - whole[name]).norm() / whole[name].norm()
        assert error.item() == pytest.approx(best.item(), rel=1e-4)
        errors.append(error.item())
    assert done.error == pytest.approx(max(errors), rel=1e-4)  # type: ignore[union-attr]
    exact = export(adapters, tmp_path / "exact", r=8)
    assert exact.error == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "fields", "options", "words"),
    [
        ("lora", {}, {"to": "gguf"}, "allowed: 'peft', 'merged'"),
        ("lora", {}, {"dtype": "int4"}, "allowed: float32"),
        ("lora", {}, {"to": "merged", "r": 4}, "base's dtype"),
        ("lora", {}, {"tokenizer": 1}, "to='merged'"),
        ("dora", {}, {"portable": True}, "no plain sum.*to='merged'"),
        ("lora", {"bias": "lora_only"}, {"portable": True}, "biases trained in full"),
        ("lora", {"modules_to_save": ["lm_head"]}, {"r": 2}, "lm_head trained in full"),
        ("full", {}, {}, "trains the base itself"),
        ("full", {}, {"portable": True}, "trains the base itself"),
    ],
)
def test_export_refusals(method, fields, options, words, tmp_path):
    model = models.qwen2()
    lorica.attach(model, method, verbose=False, **({} if method == "full" else {"r": 2}), **fields)
    with pytest.raises(ValueError, match=words):
        export(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# -- inspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["olora", "rslora", "dora"])
def test_inspect(method, tmp_path):
    model = models.llama()
    adapters = lorica.attach(model, method, r=4, modules_to_save=["lm_head"], verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    seen = inspect(out)
    json.dumps(seen)
    assert seen["type"] == "peft" and seen["method"] == method and seen["problems"] == []
    assert seen["saved"] == ["lm_head"] and seen["dtypes"] == ["float32"]
    assert seen["base"]["sha256"] == adapters.hash_base()
    assert seen["versions"]["lorica"] == lorica.__version__
    assert seen["task_type"] == "CAUSAL_LM"
    assert set(seen["layers"]) == set(adapters.layers)
    for name, layer in adapters:
        factors = layer.update.factors()
        assert factors is not None
        info = seen["layers"][name]
        assert info["norm"] == pytest.approx(factors.weight().norm().item(), rel=1e-4)
        assert info["shape"] == [layer.out_features, layer.in_features]
        assert info["scale"] == pytest.approx(factors.scale)
    assert seen["bytes"] == (out / "adapter_model.safetensors").stat().st_size


def test_inspect_what_peft_made(tmp_path):
    peft_made(
        models.llama(), tmp_path / "a", r=4, use_rslora=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, init_lora_weights="olora",
    )  # fmt: skip
    seen = inspect(tmp_path / "a")
    assert seen["method"] == "LORA, use_rslora, init_lora_weights=olora"
    layer = seen["layers"]["model.layers.0.self_attn.q_proj"]
    assert layer["r"] == 2 and layer["scale"] == pytest.approx(3 / 2**0.5)
    assert seen["versions"]["peft"]


def test_inspect_lists_problems(tmp_path):
    from safetensors.torch import load_file, save_file

    adapters = lorica.attach(models.llama(), "lora", r=4, verbose=False)
    out = lorica.save(adapters, tmp_path / "out")
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors[first][0, 0] = float("inf")
    save_file(tensors, file)
    problems = " ".join(inspect(out)["problems"])
    assert "changed since it was saved" in problems and first in problems


def test_inspect_other_forms(tmp_path):
    adapters = lorica.attach(models.llama(), "full", verbose=False)
    seen = inspect(lorica.save(adapters, tmp_path / "out"))
    assert seen["type"] == "model" and seen["layers"] == {} and seen["parameters"] > 0
