"""Merged models that plain transformers loads, exports for other programs, and `inspect`."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from files import close, peft_logits, peft_made

import lorica
import models
from lorica.formats import export, inspect, merge_to
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
    assert not report.suspicious and report.untied == bool(adapters.summary.tied)
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

    monkeypatch.setattr("lorica.formats.merge.merge", off)
    with pytest.raises(ValueError, match="rounding to .* explains .* would not be the trained one"):
        merge_to(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


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
    done: Any = export(adapters, tmp_path / "out", portable=True)
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


@pytest.mark.parametrize("method", ["mora(type=1)", "bat", "dora+olora", "svd"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_no_thin_product_is_cut_to_one(method, family, tmp_path):
    """The best approximation, whose logits are what PEFT computes from the file."""
    model = models.MODELS[family]()
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, method, r=4, verbose=False)
    perturb(adapters)
    sample = {"input_ids": models.batch(model)["input_ids"]}
    before = logits(model)
    done: Any = export(adapters, tmp_path / "out", r=3, sample=sample)
    assert torch.equal(logits(model), before), "measuring leaves the model as it was"
    assert set(done.errors) == set(adapters.layers) and not done.approximated
    for name, layer in adapters:
        moved = (layer.effective()[0] - layer.store.weight()).detach().double()
        s = torch.linalg.svdvals(moved)
        assert done.errors[name] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)
    assert done.error == max(done.errors.values()) > 0.05
    theirs = peft_logits(base, tmp_path / "out")
    far = (theirs - before).abs()
    assert done.logits.max_change == pytest.approx(float(far.max()), rel=1e-3)
    relative = float(far.norm() / before.norm())
    assert done.logits.relative_change == pytest.approx(relative, rel=1e-3)
    assert json.loads(json.dumps(done.as_dict()))["logits"]["rms"] > 0


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_what_is_no_matrix_is_made_one_first(shortcut, tmp_path):
    word = f"reslora(shortcut={shortcut!r})"
    model = models.llama(num_hidden_layers=3)
    base, sample = copy.deepcopy(model), {"input_ids": models.batch(model)["input_ids"]}
    perturb(lorica.attach(model, word, r=4, verbose=False), 0.3)
    before, twin = logits(model), copy.deepcopy(model)
    with pytest.raises(ValueError, match="has no low-rank form; give a rank"):
        export(model, tmp_path / "out", portable=True)
    whole: Any = export(model, tmp_path / "whole", r=4, sample=sample)
    cut: Any = export(model, tmp_path / "cut", r=2, sample=sample)
    assert whole.error == 0 < cut.error and torch.equal(logits(model), before)
    first = [n for n in whole.approximated if ".0." in n]
    assert max(whole.approximated[n] for n in first) < 1e-6, "nothing comes before the first"
    assert max(whole.approximated.values()) > 0.05 and whole.approximated == cut.approximated
    theirs = peft_logits(base, tmp_path / "whole")
    far = float((theirs - before).norm() / before.norm())
    assert whole.logits.relative_change == pytest.approx(far, rel=1e-3)
    assert whole.logits.relative_change > 0 and cut.logits != whole.logits

    from lorica.methods.deltas.reslora import approximated

    with approximated(lorica.Adapters.of(twin), [sample]) as lost:
        lorica.merge(twin)
    assert lost == pytest.approx(whole.approximated)
    close(logits(twin), theirs)
    with pytest.raises(ValueError, match="no ΔW to merge"):
        merge_to(model, tmp_path / "merged", sample=sample)
    report = merge_to(model, tmp_path / "merged", sample=sample, approximate=True)
    assert report.approximated == pytest.approx(lost) and "an approximation" in str(report)
    assert report.relative_change == pytest.approx(whole.logits.relative_change, rel=1e-3)
    assert json.loads(json.dumps(report.as_dict()))["approximated"].keys() == lost.keys()
    close(logits(model), theirs)


def test_where_no_input_can_be_made_up_it_says_so(tmp_path):
    def made(word: str):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 6) for _ in range(2)]
        return lorica.attach(torch.nn.Sequential(*layers), word, r=3, verbose=False)

    adapters = made("mora")
    perturb(adapters)
    done: Any = export(adapters, tmp_path / "a", r=2)
    assert done.logits is None and "no transformers model" in done.not_measured
    told: Any = export(adapters, tmp_path / "b", r=2, sample={"input": torch.ones(1, 6)})
    assert told.logits.max_change > 0 and told.not_measured is None
    with pytest.raises(ValueError, match="Sequential is no transformers model.*sample="):
        export(made("reslora(shortcut='input')"), tmp_path / "c", r=2)


@pytest.mark.parametrize(
    ("method", "fields", "options", "words"),
    [
        ("lora", {}, {"sample": {}}, "without `r` nothing is cut"),
        ("lora", {}, {"to": "merged", "approximate": True}, "merging is exact"),
        ("fade", {}, {"r": 2}, "`fade` is no plain sum"),
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
