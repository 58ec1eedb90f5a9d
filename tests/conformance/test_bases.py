"""Every way to store the frozen weight, found by walking the room."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from walk import IN, KINDS, OUT, One, adapt, inputs, one_hot, only

import lorica
from lorica.model.bases.base import AbstractBase, all_bases, base_for
from lorica.model.bases.experts import ExpertTensor
from lorica.recipe import registry
from models import perturb


def scaled_embedding() -> One:
    torch.manual_seed(1)
    return One(Gemma3TextScaledWordEmbedding(IN, OUT, padding_idx=0, embed_scale=3.0).double())


KINDS = {**KINDS, "scaled embedding": scaled_embedding}
# quantised ones: tests/test_quantised.py; parameters, which are no modules: tests/test_experts.py
DENSE = [base for base in all_bases() if base.dense and base is not ExpertTensor]
SERVED = [(base, kind) for base in DENSE for kind in KINDS if base.serves(KINDS[kind]().layer)]


def test_every_base_is_exercised():
    assert {base for base, _ in SERVED} == set(DENSE)


@pytest.mark.parametrize(("base", "kind"), SERVED)
def test_it_presents_the_weight_as_out_by_in(base, kind):
    module, x = KINDS[kind]().layer, inputs(kind.split()[-1], 2, 3)
    store: AbstractBase = base(module)
    assert base_for(module) is base, "one file serves a module"
    assert (store.in_features, store.out_features) == (IN, OUT)
    weight = store.weight()
    assert weight.shape == (OUT, IN)
    assert store.lookup == kind.endswith("embedding")
    torch.testing.assert_close(store.product(x), one_hot(x) @ weight.T)
    bias = store.bias()
    torch.testing.assert_close(store.finish(store.linear(x)), module(x))
    torch.testing.assert_close(
        store.linear(x), one_hot(x) @ weight.T + (0 if bias is None else bias)
    )
    stored = store.parameter
    assert stored is module.weight
    assert torch.equal(stored.T if store.transposed else stored, weight)


@pytest.mark.parametrize(("base", "kind"), SERVED)
def test_it_holds_the_module_not_its_tensors(base, kind):
    """Sharding replaces a module's parameters after attach."""
    module = KINDS[kind]().layer
    store = base(module)
    module.weight = nn.Parameter(torch.ones_like(module.weight))
    assert float(store.weight().detach().mean()) == 1
    assert store.parameter is module.weight


@pytest.mark.parametrize(("base", "kind"), SERVED)
def test_pristine_and_writable_are_declared_as_they_are(base, kind):
    assert base.gives <= set(registry.CAPABILITIES)
    model = KINDS[kind]()
    published = model.layer.weight.clone()
    adapters = adapt(model, "lora", r=2)
    perturb(adapters)
    optimizer = lorica.optimizer(adapters, lr=0.1)
    model(inputs(kind.split()[-1], 3)).square().sum().backward()
    optimizer.step()
    stored = only(adapters).store.parameter
    assert torch.equal(stored, published) == ("base_unchanged" in base.gives)
    if "writable_base" in base.gives:
        with torch.no_grad():
            stored.add_(1)
        torch.testing.assert_close(only(adapters).store.weight().detach().mean(),
                                   (published + 1).mean().detach())  # fmt: skip


def test_a_subclass_is_not_taken_for_its_parent():
    """It may compute something else with its weight."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert base_for(Doubling(3, 3)) is None
    with pytest.raises(ValueError, match="cannot be adapted.*Doubling"):
        lorica.attach(nn.Sequential(Doubling(3, 3)), "lora", r=1, target_modules=["0"])
