"""Every compute order equals the plain one: forward and backward, in float64, for odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D
from walk import KINDS, adapt, inputs, only, recipe, serves, wrapping

import lorica
from lorica import Recipe
from lorica.methods.kernels.reference import Reference
from lorica.recipe import registry
from models import llama, logits, perturb

KERNELS = registry.names("kernels")
VARIANTS = [
    *KERNELS, "auto(saves='product')", "auto(saves='nothing')", "materialised(keep=True)",
    "materialised(saves='product')", "factored(saves='product')", "factored(saves='nothing')",
]  # fmt: skip
PLAIN = Reference()


@st.composite
def calls(draw):
    """A layer with an update, and an input for it."""
    features, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    r = draw(st.sampled_from([1, min(features, out)]))
    lead = draw(st.sampled_from([(), (1,), (2,), (0,), (23,), (3, 5), (0, 3), (2, 1, 3), (2, 0)]))
    transposed, bias = draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 9)))
    if transposed:
        module = Conv1D(out, features).double()
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    else:
        module = nn.Linear(features, out, bias=bias, dtype=torch.float64)
    adapters = lorica.attach(nn.ModuleDict({"layer": module}), "lora", r=r, verbose=False)
    layer = adapters.layers["layer"]
    perturb(adapters, 1.0)
    if k := draw(st.integers(0, 3)):
        layer.update.add_frozen_(
            torch.randn(k, features, dtype=torch.float64), torch.randn(out, k, dtype=torch.float64)
        )
    x = torch.randn(*lead, features, dtype=torch.float64)
    if draw(st.booleans()) and x.ndim > 1:  # as strided as it gets
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    grads = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return layer, x, grads


@pytest.mark.parametrize("text", VARIANTS)
@given(call=calls(), gained=st.sampled_from([None, False, True]), p=st.sampled_from([0, 0.4]),
       all_dropped=st.booleans(), gw=st.booleans())  # fmt: skip
def test_it_equals_the_reference(text, call, gained, p, all_dropped, gw):
    """Values and gradients, whatever is wanted of them; `gained` says whether g has one."""
    layer, x, (gx, ga, gb) = call
    layer.update.dropout, layer.update.drop_frozen = p, all_dropped
    layer.train()
    delta, store = layer.update.delta, layer.store
    gain = None if gained is None else torch.linspace(-2, 3, layer.out_features).double()
    gain = gain if gained is None else gain.requires_grad_(gained)
    store.parameter.requires_grad_(gw)
    kernel, results = Recipe.parse(f"lora+{text}").kernel, []
    scales = None if gain is None else lambda forms: (gain, None)
    for k in (PLAIN, kernel):
        leaf = x.detach().requires_grad_(gx)
        delta.A.requires_grad_(ga)
        delta.B.requires_grad_(gb)
        torch.manual_seed(7)
        y = k.product(leaf, store, layer.update, gain=scales)
        leaves = [(leaf, gx), (delta.A, ga), (delta.B, gb), (store.parameter, gw)]
        wanted = [t for t, g in (*leaves, (gain, gained)) if g]
        assert y.requires_grad == bool(wanted)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        grads = torch.autograd.grad((y * weight).sum(), wanted) if wanted else ()
        results.append((y.detach(), *grads))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("word", KERNELS)
@pytest.mark.parametrize("combine", registry.names("combine"))
@pytest.mark.parametrize("delta", list(wrapping()))
def test_it_serves_every_delta_and_combine(word, combine, delta):
    for kind in KINDS:
        method = f"{delta}+{combine}+{word}"
        if not serves(method, kind):
            continue
        model, x = KINDS[kind](), inputs(kind, 2, 9)
        adapters = adapt(model, method, r=2)
        perturb(adapters, 0.4)
        y = model(x)
        layer = only(adapters)
        layer.kernel = PLAIN
        torch.testing.assert_close(y, model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("word", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(word, bias):
    layer = only(adapt(KINDS["linear" if bias else "linear without bias"](), word, r=2))
    torch.nn.init.normal_(layer.update.delta.B)
    layer.update.add_frozen_(torch.randn(1, 6), torch.randn(5, 1))
    kernel = registry.build(word, {})
    x = inputs("linear", 4, 3).requires_grad_()

    def product(x, A, B):
        delta = layer.update.delta
        kept = delta.A, delta.B
        del delta.A, delta.B
        delta.A, delta.B = A, B
        y = kernel.product(x, layer.store, layer.update)
        del delta.A, delta.B
        delta.A, delta.B = kept
        return y

    pair = layer.update.delta.pair()
    assert torch.autograd.gradcheck(product, (x, pair.A, pair.B))


@pytest.mark.parametrize("word", KERNELS)
@pytest.mark.parametrize("tokens", [1, 64])
def test_bfloat16_and_autocast_are_near_the_truth(word, tokens):
    """Small updates survive half precision: they are not added into W there."""
    wide = KINDS["linear"](dtype=torch.float32)
    adapters = adapt(wide, word, r=2)
    perturb(adapters, 0.5)
    x = inputs("linear", tokens, dtype=torch.float32)
    expected = wide(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wide(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    for t in adapters.trained():
        assert t.parameter.grad.dtype == torch.float32 and t.parameter.grad.isfinite().all()

    half = KINDS["linear"](dtype=torch.bfloat16)
    adapters = adapt(half, word, r=2)
    perturb(adapters, 0.5)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("word", KERNELS)
def test_dropout_falls_alike_under_every_order(word):
    model = KINDS["linear"]()
    adapters = adapt(model, word, r=2, lora_dropout=0.5)
    perturb(adapters, 0.5)
    x, layer = inputs("linear", 64), only(adapters)
    model.train()
    torch.manual_seed(4)
    y = model(x)
    layer.kernel = PLAIN
    torch.manual_seed(4)
    torch.testing.assert_close(y, model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("word", KERNELS)
def test_the_published_threshold_is_where_the_order_changes(word):
    kernel = registry.build(word, {})
    start = kernel.threshold(6, 5)
    assert start is None or (isinstance(start, int) and start >= 1)
    adapters = lorica.attach(llama(), recipe(f"lora+{word}", r=4), verbose=False)
    shown = adapters.summary.materialise_from
    assert set(shown.values()) == {
        kernel.threshold(layer.in_features, layer.out_features) for _, layer in adapters
    }


def test_a_model_computes_the_same_under_all_of_them():
    results = {}
    for word in KERNELS:
        model = llama().double()
        perturb(lorica.attach(model, recipe(f"dora+{word}", r=4), verbose=False))
        results[word] = logits(model)
    for value in results.values():
        torch.testing.assert_close(value, results["reference"], rtol=1e-10, atol=1e-10)
