"""Every start, found by walking the room."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from walk import KINDS, Beside, One, adapt, attach, inputs, only, recipe, serves

import lorica
from lorica.interfaces import Pair, Site
from lorica.methods.optional import StartsFromData, StartsFromUnquantised
from lorica.model.bases.dense import DenseLinear
from lorica.recipe import registry
from models import llama, logits, perturb

INITS = registry.names("inits")
CASES = [(i, k) for i in INITS for k in KINDS if serves(i, k)]


@pytest.mark.parametrize("scale", ["lora", "rslora", "constant(s=0.25)", "constant(s=3.0)"])
@pytest.mark.parametrize(("word", "kind"), CASES)
def test_the_function_is_kept_for_every_scale(word, kind, scale):
    model, x = KINDS[kind](), inputs(kind, 5)
    before = model(x)
    adapt(model, f"{word}+{scale}", r=3)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_zero_start_is_declared_exactly_where_it_is_true(word, kind):
    layer = only(adapt(KINDS[kind](), word, r=3))
    start = layer.update.delta.weight(layer.store).detach()
    declared = "zero_start" in registry.find(word).gives
    assert (float(start.abs().max()) == 0) == declared
    assert (layer.update.frozen_factors is None) == declared
    assert float(layer.update.weight(layer.store).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_one_factor_is_not_zero(word, kind):
    """Both zero would train nothing."""
    pair = only(adapt(KINDS[kind](), word, r=3)).update.delta.pair()
    assert pair.A.any() or pair.B.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("word", INITS)
def test_detaching_returns_the_published_bytes(word, dtype):
    model = llama(num_hidden_layers=1).to(dtype)
    published = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapters = adapt(model, word, r=4)
    perturb(adapters)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    if dtype is torch.float32:
        model(input_ids=torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
        optimizer.step()
    lorica.detach(model)
    now = dict(model.named_parameters())
    assert now.keys() == published.keys()
    for name, p in now.items():
        assert p.dtype == dtype and torch.equal(p, published[name])
        assert p.requires_grad == flags[name]


@pytest.mark.parametrize("word", INITS)
def test_the_start_follows_from_the_seed_and_the_layers_name_alone(word):
    def starts(method, *names: str, **fields):
        torch.manual_seed(1)
        layers = {n: nn.Linear(8, 6, dtype=torch.float64) for n in ("p", "q", "s")}
        adapters = attach(Beside(**{n: layers[n] for n in names}), recipe(method, r=2, **fields))
        return {n: layer.update.delta.weight(layer.store) for n, layer in adapters}, {
            n: layer.update.delta.pair() for n, layer in adapters
        }

    weights, pairs = starts(word, "p", "q", "s")
    torch.manual_seed(99)  # the global stream plays no part
    backwards, again = starts(word, "s", "q", "p")
    alone, _ = starts(word, "q")
    for name in weights:
        assert torch.equal(weights[name], backwards[name])
        assert torch.equal(pairs[name].A, again[name].A)
        assert torch.equal(pairs[name].B, again[name].B)
    assert torch.equal(weights["q"], alone["q"])
    _, other = starts(word, "p", "q", "s", seed=1)
    random = not torch.equal(other["p"].A, pairs["p"].A) or not torch.equal(
        other["p"].B, pairs["p"].B
    )
    # a start that is random for one layer of a kind is another one for the next
    if random:
        assert not torch.equal(pairs["p"].A, pairs["q"].A) or not torch.equal(
            pairs["p"].B, pairs["q"].B
        )


@pytest.mark.parametrize("word", INITS)
def test_fill_is_pure(word):
    """It reads the weight, fills the pair and draws from its generator; nothing else changes."""
    model = One(nn.Linear(8, 6, dtype=torch.float64))
    weight = model.layer.weight.detach()
    kept, init = weight.clone(), registry.build(word, {})
    fill = init.fill
    if isinstance(init, StartsFromData):
        site = Site("layer", 8, 6, 2, 1.0, False, torch.float64, weight.device, True)
        data = [model.batch(seed) for seed in range(init.batches)]
        seen = init.observe(model, {"layer": DenseLinear(model.layer)}, {"layer": site}, data)
        fill = functools.partial(init.fill_from, seen["layer"])
    if isinstance(init, StartsFromUnquantised):
        fill = functools.partial(init.fill_from, weight + 0.1 * weight.sin())
    stream, pairs = torch.get_rng_state(), []
    for _ in range(2):
        pair = Pair(
            nn.Parameter(torch.full((2, 8), torch.nan, dtype=torch.float64)),
            nn.Parameter(torch.full((6, 2), torch.nan, dtype=torch.float64)),
            1.0,
        )
        with torch.no_grad():
            fill(weight, pair, torch.Generator().manual_seed(4))
        assert pair.A.isfinite().all() and pair.B.isfinite().all(), "every entry is written"
        pairs.append(pair)
    assert torch.equal(weight, kept) and torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(pairs[0].A, pairs[1].A) and torch.equal(pairs[0].B, pairs[1].B)


@pytest.mark.parametrize("word", INITS)
def test_two_models_share_one_base(word):
    """The base is read, never written: adapting twice in turn gives twice the same."""
    model = llama(num_hidden_layers=1)
    before = logits(model)
    first = adapt(model, word, r=4).fingerprint()
    lorica.detach(model)
    assert torch.equal(logits(model), before)
    assert adapt(model, word, r=4).fingerprint() == first
