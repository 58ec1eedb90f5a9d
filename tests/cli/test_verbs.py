"""The verbs that read and write adapters, and those that only tell."""

from __future__ import annotations

import json

import pytest


def test_methods_walks_the_rooms(lorica):
    from lorica.methods.choice import AXES
    from lorica.recipe.registry import names

    ran = lorica("methods", "--json")
    assert ran.status == 0, ran.err
    rows = ran.json["methods"]
    assert {(r["axis"], r["method"]) for r in rows} == {
        (field, name) for axis, (field, _, _) in AXES.items() for name in names(axis)
    }
    (dora,) = [r for r in rows if r["method"] == "dora"]
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

    from lorica import formats

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
    formats.load(adapted, adapter)
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


def test_an_approximation_says_what_is_lost(lorica, train, llama, tmp_path):
    """By layer and of the logits; of an update without factors, and of one that is no matrix."""
    for i, method in enumerate(("mora", "reslora(shortcut='input')")):
        assert train("--method", method, "--learning-rate", "1e-2", out=str(i)).status == 0
        adapter, cut = tmp_path / str(i) / "adapter", tmp_path / f"cut{i}"
        words = ("export", "--adapter", adapter, "--output-dir", cut, "--r", 1)
        told = lorica(*words)
        assert told.status == 0, told.err
        ran = lorica(*words, "--overwrite", "--json")
        assert ran.status == 0, ran.err
        assert len(ran.json["errors"]) == 14 and 0 < ran.json["error"] <= 1
        for name, error in ran.json["errors"].items():
            assert f"  {error:.2e}  {name}\n" in told.out
        logits = ran.json["logits"]
        assert 0 < logits["relative_change"] and 0 < logits["max_change"]
        assert f"changed by {logits['max_change']:.2e} at most" in told.out
        assert f"{logits['relative_change']:.2e} of their size" in told.out
        assert ("by a matrix:" in told.out) == (len(ran.json["approximated"]) == 14) == (i == 1)

    words = ("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
    plain = lorica(*words)
    assert plain.status == 1 and "lorica merge --approximate" in plain.err
    ran = lorica(*words, "--approximate", "--json")
    assert ran.status == 0, ran.err
    assert len(ran.json["approximated"]) == 14 and max(ran.json["approximated"].values()) > 0
    told = lorica(*words, "--approximate", "--overwrite")
    assert told.status == 0 and "an approximation, which loses up to" in told.out
    assert told.out.count("model.layers.") == 14
    exact = lorica("merge", "--adapter", tmp_path / "0" / "adapter", "--output-dir", tmp_path / "m",
                   "--approximate")  # fmt: skip
    assert exact.status == 1 and "leave it out (`--approximate`)" in exact.err


def test_a_compressed_model_is_written_told_and_asked(lorica, train, llama, text, tmp_path):
    """Of a run whose base has faded out; one that has not is refused."""
    from safetensors.torch import load_file

    faded, early = tmp_path / "faded" / "adapter", tmp_path / "early" / "adapter"
    assert train("--method", "pclora(alpha=1)", "--r", 2, out="faded").status == 0
    assert train("--method", "fade", "--r", 2, out="early").status == 0
    out = tmp_path / "small"
    words = ("export", "--adapter", faded, "--output-dir", out, "--to", "compressed")
    ran = lorica(*words, "--json")
    assert ran.status == 0, ran.err
    small, told = ran.json, json.loads((out / "compressed.json").read_text())
    assert len(small["ranks"]) == 14 and set(small["ranks"].values()) == {2}
    weights = load_file(out / "compressed.safetensors")
    assert small["parameters"] == sum(
        t.numel() for n, t in weights.items() if n not in told["computed"]
    )
    whole = load_file(llama / "model.safetensors")
    assert small["parameters_before"] == sum(t.numel() for t in whole.values())
    assert told["class"] == "LlamaForCausalLM" and told["method"] == "pclora(alpha=1)"
    assert (out / "tokenizer.json").exists()
    seen = lorica("inspect", out, "--json").json
    assert seen["type"] == "compressed" and seen["ranks"] == small["ranks"]
    shown = lorica("inspect", out)
    assert "compressed LlamaForCausalLM" in shown.out and "q_proj" in shown.out
    again = lorica(*words)
    assert again.status == 1 and "--overwrite" in again.err
    said = lorica(*words, "--overwrite")
    assert said.status == 0 and "read back, they are the same" in said.out
    sizes = f"{small['parameters_before']:,} to {small['parameters']:,} parameters"
    assert sizes in said.out and "logits changed by" in said.out

    assert lorica("merge", "--adapter", faded, "--output-dir", tmp_path / "dense").status == 0
    asked = [
        lorica("eval", "--model", m, "--data", text, "--json").json["metrics"]
        for m in (out, tmp_path / "dense")
    ]
    assert asked[0]["loss"] == pytest.approx(asked[1]["loss"], rel=1e-5)
    prompt = ("--prompt", "the cat", "--max-new-tokens", 4, "--json")
    answers = [lorica("generate", "--model", m, *prompt).json for m in (out, tmp_path / "dense")]
    said = [[a["completion"] for a in answer["answers"]] for answer in answers]
    assert said[0] == said[1] and said[0][0]
    wrong = lorica("eval", "--model", out, "--data", text, "--task", "seq2seq-lm")
    assert wrong.status != 0 and "is a LlamaForCausalLM and none for seq2seq-lm" in wrong.err

    no = lorica("export", "--adapter", early, "--output-dir", tmp_path / "no", "--to", "compressed")
    assert no.status == 1 and not (tmp_path / "no").exists()
    for part in ("`fade` cannot be compressed", "'model.layers.0.", "Allowed are", "--to merged"):
        assert part in no.err
    wrong = lorica(*words, "--portable")
    assert wrong.status == 2 and "`--to compressed` writes a model" in wrong.err


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

    from lorica.inference import metrics

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

    from lorica.inference import metrics

    same = np.zeros(4, dtype=int)
    assert metrics.matthews(same, np.array([0, 1, 0, 1])) == 0
    assert metrics.f1(same, same, 2) == 0
    assert metrics.pearson(same, np.arange(4)) == metrics.spearman(same, np.arange(4)) == 0


def test_a_decoder_classifies_in_batches_after_its_training(lorica, llama, classes, tmp_path):
    """A tokenizer pads; the model's configuration says with what only if somebody tells it."""
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    ran = lorica("train", "--model", llama, "--data", classes, "--method", "mora", "--max-steps", 2,
                 "--r", 2, "--output-dir", tmp_path / "out", "--json")  # fmt: skip
    assert ran.status == 0, ran.err
    adapter = tmp_path / "out" / "adapter"
    with safe_open(adapter / "lorica.safetensors", "pt") as tensors:
        assert any("score.copy.weight" in key for key in tensors.keys()), "a form of our own"
    ran = lorica("eval", "--model", llama, "--adapter", adapter, "--data", classes, "--json")
    assert ran.status == 0, ran.err
    told = ran.json["metrics"]["accuracy"]
    ran = lorica("merge", "--adapter", adapter, "--output-dir", tmp_path / "m")
    assert ran.status == 0, ran.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert model.config.pad_token_id == 2 and model.config.id2label == {0: "bad", 1: "good"}
    ran = lorica("eval", "--model", tmp_path / "m", "--data", classes, "--json")
    assert ran.status == 0 and ran.json["metrics"]["accuracy"] == told, ran.err
