"""What `load` refuses a folder for, `inspect` names, and the reverse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from files import edit
from safetensors.torch import load_file, save_file

import lorica
import models
from lorica.formats import inspect, restore

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    adapters = lorica.attach(models.llama(), "lora", r=4, verbose=False)
    return lorica.save(adapters, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def own(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "own")


@pytest.fixture
def theirs(own):
    """As PEFT writes it."""
    (own / "lorica.json").unlink()
    return own


def named_by_both(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        lorica.load(models.llama(), folder)
    try:
        seen = " ".join(inspect(folder)["problems"])
    except ValueError as error:
        seen = str(error)
    for word in words:
        assert word in str(caught.value), f"load: {caught.value}"
        assert word in seen, f"inspect: {seen}"


def test_a_good_folder_has_no_problems(own):
    assert inspect(own)["problems"] == []
    lorica.load(models.llama(), own)
    (own / "lorica.json").unlink()
    assert inspect(own)["problems"] == []
    lorica.load(models.llama(), own)


@pytest.mark.parametrize("method", ["mora", "dora+olora", "bone", "svd"])
def test_methods_of_other_forms_have_none_either(method, tmp_path):
    adapters = lorica.attach(models.llama(), method, r=4, verbose=False)
    out = lorica.save(adapters, tmp_path / "out")
    assert inspect(out)["problems"] == []
    lorica.load(models.llama(), out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": -8}, ["`lora_alpha=-8`", "positive"]),
        ({"lora_alpha": 0}, ["`lora_alpha=0`", "positive"]),
        ({"alpha_pattern": {"q_proj": -1}}, ["alpha_pattern", "-1", "positive"]),
        ({"lora_dropout": 5}, ["`lora_dropout=5`", "[0, 1)"]),
        ({"lora_dropout": -0.1}, ["`lora_dropout=-0.1`", "[0, 1)"]),
        ({"bias": "x"}, ["`bias='x'`", "'lora_only'"]),
        ({"r": 0}, ["`r=0`", "at least 1"]),
        ({"r": None}, ["'r'", "must be given"]),
        ({"target_modules": None}, ["'target_modules'", "must be given"]),
        ({"target_modules": "("}, ["`target_modules`", "no regular expression"]),
        ({"modules_to_save": ["("]}, ["`modules_to_save`", "no regular expression"]),
        ({"use_qalora": True}, ["`use_qalora=True`", "not implemented"]),
        ({"init_lora_weights": "loftq"}, ["'loftq'", "can't be read"]),
        ({"peft_type": "LOHA"}, ["'LOHA'", "read are LORA files"]),
        ({"peft_type": "MISS", "bias": "x"}, ["`bias='x'`", "'MiSS_only'"]),
        ({"peft_type": "MISS", "miss_dropout": 5}, ["`miss_dropout=5`", "[0, 1)"]),
        ({"r": 3}, [f"{KEY} is (4, 32), of rank 3 expected"]),
        ({"rank_pattern": {"q_proj": 2}}, [f"{KEY} is (4, 32), of rank 2 expected"]),
    ],
)  # fmt: skip
def test_a_configuration_of_pefts(theirs, changes, words):
    edit(theirs / "adapter_config.json", **changes)
    named_by_both(theirs, *words)


def change(folder: Path, key: str, value: torch.Tensor | None) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(key)
    save_file({**tensors, **({} if value is None else {key: value})}, file)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(4, 32, dtype=torch.int32), [f"{KEY} is of torch.int32"]),
        (torch.full((4, 32), float("nan")), [KEY, "not finite"]),
        (torch.full((4, 32), float("-inf")), [KEY, "not finite"]),
        (None, ["model.layers.0.self_attn.q_proj"]),
        (torch.ones(3, 32), ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_a_tensor_of_pefts(theirs, value, words):
    change(theirs, KEY, value)
    named_by_both(theirs, *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dtype", "float7", ["`dtype='float7'`", "bfloat16"]),
        ("form", "other", ["`form='other'`", "'peft'"]),
        ("recipe", {"method": "nonsense"}, ["`recipe`", "nonsense"]),
        ("recipe", {"method": "lora", "target_modules": "("}, ["no regular expression"]),
        ("files", {"adapter_model.safetensors": "0" * 64}, ["changed since it was saved"]),
        ("files", {"elsewhere": "0" * 64}, ["lacks 'elsewhere'"]),
        ("files", {}, ["adapter_model.safetensors"]),
    ],
)
def test_what_lorica_json_says(own, key, value, words):
    edit(own / "lorica.json", **{key: value})
    named_by_both(own, *words)


def test_a_mask_of_a_module_in_full_may_hold_infinities(tmp_path):
    """Buffers are no result of training; what trains is finite."""

    def net():
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(4, 4))
        inner.register_buffer("mask", torch.full((2,), float("-inf")))
        return torch.nn.Sequential(torch.nn.Linear(4, 4), inner)

    fields = {"target_modules": ["0"], "modules_to_save": ["1"], "exclude_modules": ["1.0"]}
    adapters = lorica.attach(net(), "lora", r=2, verbose=False, **fields)
    out = lorica.save(adapters, tmp_path / "out")
    assert inspect(out)["problems"] == []
    assert lorica.load(net(), out).fingerprint() == adapters.fingerprint()
    adapters.saved["1"].copy.mask.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        lorica.save(adapters, tmp_path / "again")


def test_a_changed_folder_is_not_resumed_from(own):
    adapters = lorica.attach(models.llama(), "lora", r=4, verbose=False)
    info = json.loads((own / "lorica.json").read_text())
    edit(own / "lorica.json", files={**info["files"], "adapter_config.json": "0" * 64})
    with pytest.raises(ValueError, match="changed since it was saved"):
        restore(adapters, own)
