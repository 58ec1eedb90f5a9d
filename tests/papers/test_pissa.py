"""PiSSA: a start from the principal singular part, anchored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from models import MODELS, logits
from reference import pissa as twin


def layer(method="pissa", r=3, shape=(8, 6), spectrum=None, **fields):
    torch.manual_seed(0)
    out, features = shape
    model = nn.Sequential(nn.Linear(features, out, dtype=torch.float64))
    if spectrum is not None:
        u, _, vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
        model[0].weight.data = u @ torch.diag(spectrum) @ vh
    adapters = lorica.attach(model, method, r=r, verbose=False, **fields)
    return model, adapters.layers["0"]


@pytest.mark.parametrize("s", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_the_start_is_the_best_approximation_for_every_scale(s, shape):
    _, one = layer(shape=shape, lora_alpha=3 * s)
    W = one.base.weight.detach()
    part, values = twin.top_part(W, 3)
    torch.testing.assert_close(one.update.delta.weight(one.store).detach(), part)
    pair = one.update.delta.pair()
    size = torch.diag(torch.tensor(values, dtype=torch.float64)) / s
    torch.testing.assert_close((pair.B.T @ pair.B).detach(), size)
    torch.testing.assert_close((pair.A @ pair.A.T).detach(), size)


def test_the_largest_direction_left_is_the_next_one():
    _, one = layer()
    W = one.base.weight.detach()
    rest = W + one.update.frozen_factors.weight()
    torch.testing.assert_close(torch.linalg.svdvals(rest)[0], torch.linalg.svdvals(W)[3])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["pissa", "pissa(niter=4)", "pissa+rslora", "pissa+dora"])
def test_the_function_is_kept(name, method):
    model = MODELS[name]()
    before = logits(model)
    lorica.attach(model, method, r=4, lora_alpha=6, verbose=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_both_factors_learn_from_the_first_step():
    model, one = layer()
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    pair = one.update.delta.pair()
    assert float(pair.A.grad.abs().max()) > 1e-3 and float(pair.B.grad.abs().max()) > 1e-3


def test_a_weight_of_lower_rank_gives_zero_factors_and_finite_gradients():
    spectrum = torch.tensor([2.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    model, one = layer(r=4, spectrum=spectrum)
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    pair = one.update.delta.pair()
    for p in (pair.A, pair.B):
        assert p.isfinite().all() and p.grad.isfinite().all()


def test_the_randomised_start_comes_near_the_exact_one():
    spectrum = torch.linspace(0, 3, 40, dtype=torch.float64).flip(0).exp()
    exact = layer("pissa", r=8, shape=(48, 40), spectrum=spectrum)[1]
    whole = exact.update.delta.weight(exact.store).detach()
    errors = []
    for niter in (1, 4, 16):
        one = layer(f"pissa(niter={niter})", r=8, shape=(48, 40), spectrum=spectrum)[1]
        part = one.update.delta.weight(one.store).detach()
        errors.append(float((part - whole).norm() / whole.norm()))
        repeated = layer(f"pissa(niter={niter})", r=8, shape=(48, 40), spectrum=spectrum)[1]
        assert torch.equal(repeated.update.delta.A, one.update.delta.A), "seeded"
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4, errors


@pytest.mark.parametrize("niter", [-1, 1.5])
def test_the_number_of_iterations_is_a_whole_number(niter):
    with pytest.raises(ValueError, match=rf"`pissa\(niter={niter}\)`: .*a whole number"):
        lorica.Recipe.parse(f"pissa(niter={niter})")


def quantise(W: torch.Tensor) -> torch.Tensor:
    """Symmetric 4-bit rows."""
    step = W.abs().amax(1, keepdim=True) / 7
    return (W / step).round() * step


def test_the_residual_of_a_decaying_spectrum_quantises_better():
    spectrum = torch.linspace(0, 4, 40, dtype=torch.float64).flip(0).exp()
    _, one = layer(r=8, shape=(48, 40), spectrum=spectrum)
    W, part = one.base.weight.detach(), one.update.delta.weight(one.store).detach()
    with_part = (W - quantise(W - part) - part).norm()
    assert with_part < 0.7 * (W - quantise(W)).norm()


@pytest.mark.parametrize("method", ["pissa", "loraga"])
def test_iterations_have_an_end(method):
    with pytest.raises(ValueError, match="niter.*up to 1,000"):
        lorica.Recipe.parse(f"{method}(niter=999999999)")
