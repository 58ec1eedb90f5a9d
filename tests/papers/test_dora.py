"""DoRA: magnitude and direction apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorica
from models import MODELS, llama, logits, masked, perturb, train
from reference import dora as twin


def layer(method="dora", bias=True, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias, dtype=torch.float64))
    adapters = lorica.attach(model, method, r=3, verbose=False, **fields)
    perturb(adapters, 0.7)
    return model, adapters, adapters.layers["0"]


def parts(one):
    pair = one.update.delta.pair()
    return one.base.weight.detach(), pair.A, pair.B, pair.scale, one.combine.m


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", ["kaiming", "olora", "pissa"])
def test_the_function_is_kept_over_every_start(name, start):
    model = MODELS[name]()
    before = logits(model)
    lorica.attach(model, f"dora+{start}", r=4, verbose=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_the_start_is_exact_where_the_update_is_zero():
    """m and the norm come from the same function, so g is exactly 1."""
    model = nn.Sequential(nn.Linear(7, 5, bias=False))
    x = torch.randn(4, 7)
    before = model(x)
    one = lorica.attach(model, "dora", r=3, verbose=False).layers["0"]
    assert torch.equal(one.combine.gain(one.store, one.update), torch.ones(5))
    assert torch.equal(model(x), before)


def test_the_effective_weight_equals_the_twin():
    _, _, one = layer()
    with torch.no_grad():
        torch.testing.assert_close(one.effective()[0], twin.effective(*parts(one)))


def test_row_norms_are_the_magnitudes_whatever_the_factors():
    _, _, one = layer()
    with torch.no_grad():
        torch.testing.assert_close(one.effective()[0].norm(dim=1), one.combine.m.abs())


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_equal_the_twin(detach):
    model, _, one = layer(f"dora(detach={detach})")
    x = torch.randn(6, 7, dtype=torch.float64)
    y = model(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    W, A, B, s, m = parts(one)
    with torch.no_grad():
        dV, dA, dB, dm = twin.gradients(weight.T @ x, W, A, B, s, m, detach=detach)
    torch.testing.assert_close(A.grad, dA)
    torch.testing.assert_close(B.grad, dB)
    torch.testing.assert_close(m.grad, dm)
    V = (W + s * B @ A).detach()
    along = (dV * V).sum(1)
    assert (along.abs().max() < 1e-10) == (not detach), "the exact gradient is orthogonal to V"


def test_the_detached_and_the_exact_gradient_differ():
    grads = []
    for detach in (True, False):
        model, _, one = layer(f"dora(detach={detach})")
        x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        grads.append(one.update.delta.B.grad)
    assert (grads[0] - grads[1]).norm() / grads[0].norm() > 0.05


@pytest.mark.parametrize("kind", ["update", "authors"])
def test_dropout_equals_the_twin(kind, monkeypatch):
    model, _, one = layer(f"dora(dropout='{kind}')", lora_dropout=0.5)
    x = torch.randn(6, 7, dtype=torch.float64)
    dropped = x * masked(monkeypatch, x) * 2
    model.train()
    W, A, B, s, m = parts(one)
    expected = twin.with_dropout(
        x, dropped, W, one.base.bias, A, B, s, m, authors=kind == "authors"
    )
    torch.testing.assert_close(model(x), expected)


def test_a_positive_factor_on_the_direction_changes_nothing():
    torch.manual_seed(0)
    V, m = torch.randn(5, 7, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    zero = torch.zeros(1, 7, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    scaled = V * torch.rand(5, 1, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(
        twin.effective(V, *zero, 1.0, m), twin.effective(scaled, *zero, 1, m)
    )


def test_the_cheap_norm_is_the_norm():
    """c² from W, A and B without V, against V's own norm; cancellation included."""
    _, _, one = layer("dora+olora")
    with torch.no_grad():
        V = one.base.weight + one.update.weight(one.store)
        torch.testing.assert_close(one.update.row_norms(one.store), twin.norms(V))
        pair = one.update.delta.pair()
        pair.B.mul_(1e3)
        V = one.base.weight + one.update.weight(one.store)
        torch.testing.assert_close(one.update.row_norms(one.store), twin.norms(V))


def test_weight_decay_spares_the_magnitude():
    adapters = lorica.attach(llama(), "dora", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for t in adapters.trained():
        assert decay[id(t.parameter)] == (0.0 if t.role == "magnitude" else 0.1)
    rates = {g["lr"] for g in optimizer.param_groups}
    assert rates == {1e-3}, "the magnitude trains at the factors' rate"


def test_a_magnitude_can_move_without_its_direction():
    """What LoRA cannot do at rank r: scale every row on its own."""
    adapters = lorica.attach(llama(num_hidden_layers=1), "dora", r=1, verbose=False)
    one = next(iter(adapters.layers.values()))
    with torch.no_grad():
        before = one.effective()[0].clone()
        one.combine.m.mul_(torch.linspace(0.5, 2, one.out_features))
        after = one.effective()[0]
    cosine = F.cosine_similarity(before, after, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert torch.linalg.matrix_rank(after - before) > 1


def test_an_embedding_has_a_magnitude_per_output_dimension():
    adapters = lorica.attach(llama(), "dora", r=4, target_modules=["embed_tokens"], verbose=False)
    assert adapters.layers["model.embed_tokens"].combine.m.shape == (32,)
    train(adapters, lorica.optimizer(adapters, lr=1e-3), 2)


@pytest.mark.parametrize("argument", ["dropout='none'", "detach=1"])
def test_options_are_checked(argument):
    with pytest.raises(ValueError, match="allowed"):
        lorica.Recipe.parse(f"dora({argument})")
