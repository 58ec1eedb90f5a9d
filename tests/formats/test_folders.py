"""Folders: atomic, never over other things, refused when cut, changed or another program's."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from files import edit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorica
import models
from lorica.formats import restore
from lorica.formats.atomic_folder import writing
from lorica.formats.lorica_json import READER
from lorica.formats.safe_files import read_json, read_tensors
from models import logits, perturb


def adapted(method="olora", model=None, **fields):
    adapters = lorica.attach(model or models.llama(), method, r=2, verbose=False, **fields)
    perturb(adapters)
    return adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One saved adapter; copy it before changing it."""
    return lorica.save(adapted(), tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def own(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "own")


def refused(path, *words: str, model=None, **options) -> None:
    model = model or models.llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        lorica.load(model, path, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert list(dict(model.named_parameters())) == list(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# -- writing ---------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten(tmp_path, own):
    adapters = adapted()
    with pytest.raises(ValueError, match="overwrite=True"):
        lorica.save(adapters, own)
    (tmp_path / "other").mkdir()
    lorica.save(adapters, tmp_path / "other")  # empty is free
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="thesis.txt"):
            lorica.save(adapters, tmp_path / "work", overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        lorica.save(adapters, tmp_path / "work" / "thesis.txt", overwrite=True)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_overwriting_keeps_what_is_not_ours(own):
    (own / "tokenizer.json").write_text("{}")
    (own / "notes").mkdir()
    (own / "notes" / "a.txt").write_text("a")
    (own / "lorica.safetensors").write_text("stale")
    lorica.save(adapted("dora"), own, overwrite=True)
    assert (own / "tokenizer.json").read_text() == "{}"
    assert (own / "notes" / "a.txt").read_text() == "a"
    assert not (own / "lorica.safetensors").exists()
    assert lorica.load(models.llama(), own).recipe.text() == "dora"
    assert [e.name for e in own.parent.iterdir()] == ["own"]


def test_a_write_that_fails_leaves_what_was_there(own, monkeypatch):
    before = {f.name: f.read_bytes() for f in own.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lorica.save(adapted("dora"), own, overwrite=True)
    assert {f.name: f.read_bytes() for f in own.iterdir()} == before
    assert [e.name for e in own.parent.iterdir()] == ["own"]


def test_a_swap_that_fails_puts_the_old_folder_back(own, monkeypatch):
    before = {f.name for f in own.iterdir()}
    replace, calls = os.replace, []

    def fail_second(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError("gone")
        replace(a, b)

    # Where the file system cannot exchange two folders at once.
    monkeypatch.setattr("lorica.formats.atomic_folder._exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="gone"), writing(own, overwrite=True) as fresh:
        (fresh / "lorica.json").write_text("{}")
    assert {f.name for f in own.iterdir()} == before


def test_permissions_are_the_usual(folder, tmp_path):
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_tensors_that_are_not_whole(tmp_path):
    adapters = adapted("lora")
    pair = dict(adapters.pairs())["model.layers.0.self_attn.q_proj"]
    keep = pair.A.data
    for broken in (keep.reshape(-1), keep[:0]):
        pair.A.data = broken
        with pytest.raises(ValueError, match="Gather them before saving"):
            lorica.save(adapters, tmp_path / "out")
    pair.A.data = keep
    pair.B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite.*learning rate"):
        lorica.save(adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- reading ---------------------------------------------------------------------------------------


def test_another_base(folder):
    other = models.llama(seed=1)
    refused(folder, "another base", "check_base=False", "--ignore-base-hash", model=other)
    lorica.load(other, folder, check_base=False)
    refused(folder, "in bfloat16 here", model=models.llama().to(torch.bfloat16))


def test_another_model(folder):
    refused(folder, "does not fit this BertForSequenceClassification", model=models.bert())
    refused(folder, "instead of", model=models.llama(hidden_size=16), check_base=False)


def test_a_newer_format(own):
    edit(own / "lorica.json", reader=READER + 1, lorica="9.9")
    refused(own, "Lorica 9.9", "pip install -U lorica")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_files_that_were_changed(own, name):
    data = bytearray((own / name).read_bytes())
    data[-3] ^= 1
    (own / name).write_bytes(data)
    refused(own, name, "changed since it was saved", "delete lorica.json")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_files_that_are_missing(own, name):
    (own / name).unlink()
    refused(own, f"lacks '{name}'")


def test_what_is_no_adapter(tmp_path, own):
    refused(tmp_path / "nowhere", "does not exist", "owner/name")
    refused(tmp_path, "no adapter folder", "own/", str(own))
    refused(own / "adapter_config.json", "is a file", str(own))


def test_hub_ids_offline():
    refused("someone/some-adapter", "hub id", "Check the name and the connection")


def test_hub_ids(folder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder)
    )
    lorica.load(models.llama(), "someone/some-adapter")
    assert asked == ["someone/some-adapter"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "a": 1,\n  "b" 2\n}', ["line 3, column 7"]),
        ("[1]", ["holds a list"]),
        ('{"a": 1, "a": 2}', ["'a' is given twice"]),
        ('{"a": NaN}', ["`NaN`"]),
        ("[" * 100_000, ["lorica.json"]),
        ("{}", ["must be given"]),
        ('{"reader": "1"}', ["'reader' is '1', not int"]),
        ('{"reader": true}', ["'reader' is True"]),
        ("", ["line 1, column 1"]),
    ],
)
def test_broken_json(own, text, words):
    (own / "lorica.json").write_text(text)
    refused(own, "lorica.json", *words)


def test_a_recipe_that_says_nothing(own):
    info = json.loads((own / "lorica.json").read_text())
    for recipe in ({"method": "nonsense"}, {"method": "lora", "r": "x"}, {"colour": "red"}):
        edit(own / "lorica.json", recipe=recipe)
        refused(own, "lorica.json", "recipe")
    edit(own / "lorica.json", recipe=info["recipe"], dtype="float7")
    refused(own, "float7", "bfloat16")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_tensors(folder, tmp_path, cut):
    data = (folder / "adapter_model.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    file.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        read_tensors(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), head=st.booleans())
def test_flipped_bits(folder, tmp_path, where, bit, head):
    """In the header a reader sees most of them; the hash sees all."""
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    length = 8 + int.from_bytes(data[:8], "little") if head else len(data)
    data[int(where * length)] ^= 1 << bit
    out = tmp_path / "flipped"
    shutil.copytree(folder, out, dirs_exist_ok=True)
    (out / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="changed since it was saved"):
        lorica.load(models.llama(), out)
    try:
        read_tensors(out / "adapter_model.safetensors")
    except ValueError as error:
        known = ("no complete safetensors file", "is no name", "was changed")
        assert any(words in str(error) for words in known)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    where=st.floats(0, 1, exclude_max=True),
    insert=st.sampled_from(["", "{", "}", '"', ",", "\x00", "é", "]", "1", "\n"]),
)
def test_broken_json_never_raises_anything_else(folder, tmp_path, where, insert):
    text = (folder / "lorica.json").read_text()
    at = int(where * len(text))
    file = tmp_path / "lorica.json"
    file.write_text(text[:at] + insert + text[at + 1 :])
    try:
        assert isinstance(read_json(file), dict)
    except ValueError as error:
        assert str(file) in str(error)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="a.json"):
        read_json(tmp_path / "a.json")


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora+olora", "pissa(niter=2)", "lorafa", "full"])
def test_restore(method, tmp_path):
    fields = {} if method == "full" else {"r": 2}
    first = lorica.attach(models.gpt2(), method, verbose=False, **fields)
    perturb(first)
    out = lorica.save(first, tmp_path / "out")
    second = lorica.attach(models.gpt2(), method, verbose=False, **fields)
    restore(second, out)
    assert second.fingerprint() == first.fingerprint()
    assert torch.equal(logits(second.model), logits(first.model))


def test_restore_what_grew(tmp_path):
    """A restarting schedule carries more and more; a resumed run starts with what attach left."""
    from files import close, peft_logits

    first, base = adapted("olora"), models.llama()
    for name, layer in first:
        k = 3 if "q_proj" in name else 1
        layer.update.add_frozen_(
            torch.randn(k, layer.in_features), torch.randn(layer.out_features, k)
        )
    out = lorica.save(first, tmp_path / "out")
    close(logits(first.model), peft_logits(base, out))
    second = adapted("olora")
    restore(second, out)
    assert second.fingerprint() == first.fingerprint()
    assert lorica.load(base, out).fingerprint() == first.fingerprint()
    third = lorica.attach(models.llama(), "olora", r=2, verbose=False)
    restore(first, lorica.save(third, tmp_path / "less"))
    assert first.fingerprint() == third.fingerprint()


def test_restore_wants_the_same_recipe(own, folder):
    other = lorica.attach(models.llama(), "olora", r=2, lora_dropout=0.5, verbose=False)
    before = other.fingerprint()
    with pytest.raises(ValueError, match=r"`lora_dropout` 0.0 \(here 0.5\)"):
        restore(other, folder)
    assert other.fingerprint() == before
    (own / "lorica.json").unlink()
    with pytest.raises(ValueError, match=r"lorica\.load"):
        restore(other, own)


def test_restore_wants_the_same_base(folder):
    other = adapted(model=models.llama(seed=1))
    before = other.fingerprint()
    with pytest.raises(ValueError, match="another base"):
        restore(other, folder)
    assert other.fingerprint() == before


# -- the other forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_full_training_is_saved_as_a_model(tied, tmp_path):
    model = models.llama(tie_word_embeddings=tied).to(torch.bfloat16)
    adapters = lorica.attach(model, "full", verbose=False)
    perturb(adapters, size=0.01)
    out = lorica.save(model, tmp_path / "out")
    plain = type(model).from_pretrained(out)
    assert plain.dtype == torch.float32
    stored = dict(plain.named_parameters())
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    info = json.loads((out / "lorica.json").read_text())
    assert info["form"] == "model" and "model.safetensors" in info["files"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.from_pretrained"):
        lorica.load(models.llama(), out)


def test_full_training_of_a_plain_module(tmp_path):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 3))

    first = lorica.attach(net(), "full", verbose=False)
    perturb(first)
    out = lorica.save(first, tmp_path / "out")
    second = lorica.attach(net(), "full", verbose=False)
    restore(second, out)
    assert second.fingerprint() == first.fingerprint()


def test_what_peft_cannot_compute_is_written_in_our_own_form(tmp_path, monkeypatch):
    """Whatever declares no PEFT form: the same state, another file."""
    from lorica.methods.combine.dora import Dora

    monkeypatch.setattr(Dora, "peft_flags", None)
    first = adapted("dora+olora", bias="lora_only", modules_to_save=["lm_head"])
    out = lorica.save(first, tmp_path / "out")
    assert sorted(f.name for f in out.iterdir()) == ["lorica.json", "lorica.safetensors"]
    assert "no form of `dora`" in json.loads((out / "lorica.json").read_text())["why_not_peft"]
    model = models.llama()
    assert lorica.load(model, out).fingerprint() == first.fingerprint()
    assert torch.equal(logits(model), logits(first.model))
    data = bytearray((out / "lorica.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "lorica.safetensors").write_bytes(data)
    refused(out, "changed since it was saved")


def test_a_base_that_training_writes_to(tmp_path, monkeypatch):
    """The weights themselves are state then; an error while loading leaves those of the model."""
    from lorica.methods.deltas.lowrank import LowRank

    monkeypatch.setattr(LowRank, "withdraws", frozenset({"base_unchanged"}))
    first = adapted("lora")
    with torch.no_grad():
        for _, layer in first:
            layer.store.parameter.add_(0.1)
    out = lorica.save(first, tmp_path / "out")
    info = json.loads((out / "lorica.json").read_text())
    assert info["form"] == "lorica" and "trains the base itself" in info["why_not_peft"]
    refused(out, "another base", model=models.llama(seed=1))
    model = models.llama()
    assert lorica.load(model, out).fingerprint() == first.fingerprint()
    assert torch.equal(logits(model), logits(first.model))
    second = adapted("lora")
    restore(second, out)
    assert second.fingerprint() == first.fingerprint()


def test_factors_that_are_computed_are_kept_exactly(tmp_path, monkeypatch):
    """A delta whose factors are no parameters: PEFT gets the factors, we get the parameters."""
    from files import close, peft_logits

    from lorica.interfaces import Factors
    from lorica.methods.deltas.lowrank import LowRankDelta

    monkeypatch.setattr(
        LowRankDelta, "factors", lambda self: Factors(self.A, self.B * self.scale, 1.0)
    )
    model = models.llama()
    base = copy.deepcopy(model)
    first = adapted("rslora+olora", model)
    out = lorica.save(first, tmp_path / "out")
    assert (out / "lorica.safetensors").exists()
    close(logits(model), peft_logits(base, out))
    assert lorica.load(base, out).fingerprint() == first.fingerprint()
