"""Ranks that are switched off: written as what remains; and PEFT's ADALORA files are read."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from files import close, peft_logits
from safetensors.torch import load_file, save_file
from torch import nn

import lorica
from lorica.formats.describe import inspect
from lorica.formats.export import export
from models import batch, llama, logits, train

PRUNED = "adalora(init_r=4, tinit=1, tfinal=4, deltaT=2)"


def trained(method: str, model: Any, steps: int = 16, r: int = 2, lr: float = 2e-2):
    adapters = lorica.attach(model, method, r=r, verbose=False)
    train(adapters, lorica.optimizer(adapters, lr=lr, total_steps=steps), steps)
    return adapters


@pytest.mark.parametrize("beside", ["", "+rslora", "+pissa", "+dora"])
def test_a_saved_adapter_is_a_plain_one_of_the_ranks_that_remain(beside, tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    adapters = trained(PRUNED + beside, model)
    out = lorica.save(adapters, tmp_path / "out")
    close(logits(model), peft_logits(base, out))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    tensors = load_file(out / "adapter_model.safetensors")
    for name, layer in adapters:
        left = max(1, int((layer.update.delta.E != 0).sum()) + 4 * (beside == "+pissa"))
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == left
    again = copy.deepcopy(base)
    assert lorica.load(again, out).fingerprint() == adapters.fingerprint()
    (out / "lorica.json").unlink()
    other = copy.deepcopy(base)
    lorica.load(other, out)
    close(logits(model), logits(other))


@pytest.mark.parametrize("after", [2, 24])
def test_pefts_own_files_are_read(after, tmp_path):
    """Before the final masking all ranks are in the file, after it those that remain."""
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    base: Any = llama(num_hidden_layers=1)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=5, target_r=2, tinit=3, tfinal=8, deltaT=2, total_step=30,
        lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks for a renamed attribute
        theirs: Any = get_peft_model(copy.deepcopy(base), config)
        adam = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
        for t in range(after):
            theirs(**batch(base, seed=t)).loss.backward()
            adam.step()
            theirs.base_model.update_and_allocate(t)
            adam.zero_grad()
        theirs.eval().save_pretrained(tmp_path / "theirs")
        read: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    with torch.no_grad():  # with labels its forward fails once it is loaded for inference
        expected = read(input_ids=batch(base)["input_ids"]).logits
    assert (expected - logits(base)).abs().max() > 1e-4
    model = copy.deepcopy(base)
    adapters = lorica.load(model, tmp_path / "theirs")
    close(logits(model), expected)
    ranks = {n.rsplit(".", 1)[-1]: layer.site.r for n, layer in adapters}
    assert sum(ranks.values()) == (15 if after == 2 else 6), ranks
    assert adapters.recipe.lora_dropout == 0.1
    shown = inspect(tmp_path / "theirs")["layers"]
    assert {n.rsplit(".", 1)[-1]: layer["r"] for n, layer in shown.items()} == ranks
    again = lorica.save(adapters, tmp_path / "ours")
    close(peft_logits(base, again), expected)


def test_a_layer_without_ranks_is_read_and_written(tmp_path):
    from peft import AdaLoraConfig, get_peft_model

    base: Any = llama(num_hidden_layers=1)
    targets = ["q_proj", "v_proj"]
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = get_peft_model(copy.deepcopy(base), config)
        torch.manual_seed(0)
        for name, p in theirs.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(p)
        config.rank_pattern = {
            f"model.layers.0.self_attn.{n}.lora_E": [n == "v_proj", False, n == "v_proj"]
            for n in targets
        }
        theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.model, config.rank_pattern)
        theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapters = lorica.load(model, tmp_path / "theirs")
    close(logits(model), logits(theirs))
    assert [layer.site.r for _, layer in adapters] == [1, 2]
    train(adapters, lorica.optimizer(adapters), 1)
    assert all(layer.update.delta.B.any() for _, layer in adapters), "it can train on"

    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("v_proj.lora_E"))
    for broken, message in (
        ({name: tensors[name][:1]}, "no triple product"),
        ({}, "a matrix each"),
    ):
        left = {k: v for k, v in tensors.items() if k != name} | broken
        save_file(left, tmp_path / "theirs" / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            lorica.load(copy.deepcopy(base), tmp_path / "theirs")


def test_shut_gates_leave_the_file(tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    adapters = trained("sora(threshold=4.0)", model, steps=30, r=8)
    out = lorica.save(adapters, tmp_path / "out")
    close(logits(model), peft_logits(base, out))
    tensors = load_file(out / "adapter_model.safetensors")
    left = {n: int(layer.update.delta.gate.count_nonzero()) for n, layer in adapters}
    assert min(left.values()) < 8
    for name, r in left.items():
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == max(1, r)


@pytest.mark.parametrize("method", [PRUNED, "sora(threshold=4.0)"])
def test_the_portable_form_has_the_largest_rank_that_remains(method, tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    adapters = trained(method, model, r=3 if "ada" in method else 8)
    ranks = [int(p.E.count_nonzero()) for _, p in adapters.pairs()]
    done = export(adapters, tmp_path / "out", portable=True)
    assert done.r == max(ranks) and done.error == 0
    close(logits(model), peft_logits(base, tmp_path / "out"))


def test_nothing_learnt_is_one_rank_of_nothing(tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    lorica.save(lorica.attach(model, "svd+init.svd", r=4, verbose=False), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {1}
    assert torch.equal(peft_logits(base, tmp_path / "out"), logits(base))
