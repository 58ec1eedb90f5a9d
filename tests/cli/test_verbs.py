"""The verbs that read and write adapters, and those that only tell."""

from __future__ import annotations

import json

import pytest


def test_methods_walks_the_rooms(lorica):
    from lorica.rooms import ROOMS, words

    ran = lorica("methods", "--json")
    assert ran.status == 0, ran.err
    rows = ran.json["methods"]
    assert {(r["axis"], r["word"]) for r in rows} == {
        (axis, word) for room, (axis, _, _) in ROOMS.items() for word in words(room)
    }
    (dora,) = [r for r in rows if r["word"] == "dora"]
    assert dora["arxiv"] == "2402.09353" and dora["year"] == 2024
    assert dora["paper"] == "DoRA: Weight-Decomposed Low-Rank Adaptation"
    assert dora["arguments"]["detach"] is True and "weight" in dora["needs"]
    table = lorica("methods")
    assert table.status == 0 and "dora" in table.out and "2402.09353" in table.out
    page = lorica("methods", "DoRA")
    assert page.status == 0 and "detach=True" in page.out and "@inproceedings" in page.out
    assert lorica("methods", "dorra").status == 2


def test_targets_counts_without_weights(lorica, llama, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(llama / "config.json", bare)
    ran = lorica("targets", bare, "--r", 2, "--json")
    assert ran.status == 0, ran.err
    layers = {group["name"]: group for group in ran.json["layers"]}
    assert layers["q_proj"]["count"] == layers["q_proj"]["adapted"] == 2
    assert layers["gate_proj"]["parameters_per_rank"] == 16 + 24
    assert layers["lm_head"]["role"] == "head" and layers["lm_head"]["adapted"] == 0
    assert layers["embed_tokens"]["role"] == "embedding"
    assert ran.json["trainable"] == 2 * ran.json["parameters_per_rank"]
    some = lorica("targets", bare, "--target-modules", "q_proj,v_proj", "--r", 1, "--json")
    assert some.json["trainable"] == 4 * (16 + 16)
    assert (
        lorica("targets", bare, "--method", "full", "--json").json["trainable"]
        == (ran.json["parameters"])
    )
    table = lorica("targets", bare)
    assert table.status == 0 and "model.layers.*.self_attn.q_proj" in table.out


@pytest.fixture
def adapter(train, tmp_path):
    assert train("--method", "rslora+olora", "--r", 2, "--learning-rate", "1e-2").status == 0
    return tmp_path / "out" / "adapter"


def test_inspect_merge_and_export(lorica, adapter, llama, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from lorica import io

    told = lorica("inspect", adapter, "--json")
    assert told.status == 0, told.err
    assert told.json["method"] == "olora+rslora" and told.json["r"] == 2
    assert len(told.json["layers"]) == 14 and not told.json["problems"]
    assert "norm of ΔW" in lorica("inspect", adapter).out

    ran = lorica("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged", "--json")
    assert ran.status == 0, ran.err
    assert 0 <= ran.json["mean_change"] <= ran.json["max_change"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.arange(3, 12)[None]
    base = adapted(ids).logits
    io.load(adapted, adapter)
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, base, atol=1e-3)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    again = lorica("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
    assert again.status == 1 and "--overwrite" in again.err

    cut = lorica(
        "export", "--adapter", adapter, "--output-dir", tmp_path / "cut", "--r", 1, "--json"
    )
    assert cut.status == 0, cut.err
    assert cut.json["r"] == 1 and 0 < cut.json["error"] < 1
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 1
    assert load_file(tmp_path / "cut" / "adapter_model.safetensors")
    whole = lorica("export", "--adapter", adapter, "--output-dir", tmp_path / "w", "--to", "merged")
    assert whole.status == 0, whole.err
    assert (tmp_path / "w" / "config.json").exists()
    wrong = lorica("export", "--adapter", adapter, "--output-dir", tmp_path / "x", "--to", "merged",
                   "--r", 1)  # fmt: skip
    assert wrong.status == 2 and not (tmp_path / "x").exists()


def test_a_classifier_merges_with_its_classes(lorica, bert, classes, tmp_path):
    from transformers import AutoModelForSequenceClassification

    ran = lorica("train", "--model", bert, "--data", classes, "--max-steps", 2, "--r", 2,
                 "--output-dir", tmp_path / "out")  # fmt: skip
    assert ran.status == 0, ran.err
    ran = lorica("merge", "--adapter", tmp_path / "out" / "adapter", "--output-dir", tmp_path / "m")
    assert ran.status == 0, ran.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert model.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_what_everybody_means_by_them(seed):
    import numpy as np

    from lorica.train import metrics

    sk = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(seed)
    for n in (2, 4):
        a, b = draw.integers(n, size=50), draw.integers(n, size=50)
        assert metrics.accuracy(a, b) == pytest.approx(sk.accuracy_score(b, a))
        kind = "binary" if n == 2 else "macro"
        assert metrics.f1(a, b, n) == pytest.approx(sk.f1_score(b, a, average=kind))
        assert metrics.matthews(a, b) == pytest.approx(sk.matthews_corrcoef(b, a))
    x = draw.normal(size=40)
    y = np.round(x + draw.normal(size=40))  # with ties
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert metrics.mse(x, y) == pytest.approx(sk.mean_squared_error(y, x))


def test_undefined_metrics_are_zero():
    import numpy as np

    from lorica.train import metrics

    same = np.zeros(4, dtype=int)
    assert metrics.matthews(same, np.array([0, 1, 0, 1])) == 0
    assert metrics.f1(same, same, 2) == 0
    assert metrics.pearson(same, np.arange(4)) == metrics.spearman(same, np.arange(4)) == 0
