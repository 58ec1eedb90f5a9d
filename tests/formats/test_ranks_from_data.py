"""Adapters whose ranks followed from data: the file says them, and loading needs no data."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from files import close, peft_logits
from torch import nn

import lorica
from models import batch, llama, logits, perturb


@pytest.mark.parametrize("beside", ["", "+rslora", "+dora", "+svd(ratio=1.5)"])
def test_an_adapter_is_loaded_without_data_and_peft_computes_the_same(beside, tmp_path):
    model, seen = llama(), [batch(llama(), seed=s, size=8, length=12) for s in range(3)]
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "eva(batches=3)" + beside, r=4, data=seen, verbose=False)
    assert len({layer.site.r for _, layer in adapters}) > 1
    perturb(adapters)
    said = logits(model)
    out = lorica.save(adapters, tmp_path / "out")
    again = copy.deepcopy(base)
    loaded = lorica.load(again, out)
    assert loaded.fingerprint() == adapters.fingerprint()
    assert {n: layer.site.r for n, layer in loaded} == {n: layer.site.r for n, layer in adapters}
    torch.testing.assert_close(logits(again), said, rtol=0, atol=0)
    close(peft_logits(base, out), said)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    (out / "lorica.json").unlink()
    other = copy.deepcopy(base)
    lorica.load(other, out)
    close(logits(other), said)


@pytest.mark.parametrize(("edit", "part"), [
    (lambda layers: layers[next(iter(layers))].update(r=0), "has rank 0, where at least 1"),
    (lambda layers: layers[next(iter(layers))].update(r=10**6), "rank 1000000 is larger"),
    (lambda layers: layers.pop(next(iter(layers))), "holds nothing for the target"),
])  # fmt: skip
def test_a_file_with_other_ranks_is_refused_before_anything_is_made(edit, part, tmp_path):
    model = llama()
    adapters = lorica.attach(model, "eva(batches=1)", r=2, data=[batch(model)], verbose=False)
    out = lorica.save(adapters, tmp_path / "out")
    told = json.loads((out / "lorica.json").read_text())
    edit(told["layers"])
    (out / "lorica.json").write_text(json.dumps(told))
    fresh = llama()
    with pytest.raises(ValueError, match=part):
        lorica.load(fresh, out)
    assert type(fresh.model.layers[0].self_attn.q_proj) is nn.Linear
