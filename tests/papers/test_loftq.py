"""LoftQ: a start from what quantisation took away. The packed formats' own tests are in
test_quantised.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from models import llama
from reference import loftq as twin

SHAPES = {"0": (8, 6), "1": (6, 8), "2": (8, 6)}  # in -> out, one after the other


def quantise(W: torch.Tensor) -> torch.Tensor:
    """Symmetric rows of 3 bits."""
    step = W.abs().amax(1, keepdim=True) / 3
    return (W / step).round() * step


def rounded(**fields):
    """A chain whose weights were rounded, what they were, and its adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*s, dtype=torch.float64) for s in SHAPES.values()))
    before = {n: m.weight.detach().clone() for n, m in model.named_children()}
    for m in model:
        m.weight.data = quantise(m.weight.data)
    fields = {"method": "loftq", "r": 3, "unquantised": before, "verbose": False, **fields}
    return model, before, lorica.attach(model, dtype=torch.float64, **fields)


def scale_of(alpha, r):
    return alpha / r


@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_it_is_the_first_round_of_the_papers_alternation(alpha):
    _, before, adapters = rounded(lora_alpha=alpha)
    s = scale_of(alpha, 3)
    for name, layer in adapters:
        ((Q, product, values),) = twin.alternate(before[name], quantise, 3, rounds=1)
        assert torch.equal(layer.base.weight, Q), "the base keeps its values"
        pair = layer.update.delta.pair()
        torch.testing.assert_close((s * pair.B @ pair.A).detach(), product)
        size = torch.diag(torch.tensor(values, dtype=torch.float64)) / s
        torch.testing.assert_close((pair.B.T @ pair.B).detach(), size)
        torch.testing.assert_close((pair.A @ pair.A.T).detach(), size)
        assert layer.update.frozen_factors is None, "nothing takes the start back"


def test_the_error_of_reconstruction_falls_with_the_rank():
    """The paper's equation 6, ‖W − Q − s·BA‖, and its end: with the full rank nothing is left."""
    errors = []
    for r in (1, 3, 6):
        _, before, adapters = rounded(r=r)
        left = [before[n] - layer.effective()[0].detach() for n, layer in adapters]
        errors.append(sum(float(e.norm()) for e in left))
    without = sum(float((W - quantise(W)).norm()) for W in before.values())
    assert without > errors[0] > errors[1] > errors[2] and errors[2] < 1e-12, errors


def test_the_model_starts_nearer_to_the_unquantised_one():
    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, before, adapters = rounded()
    started = model(x)
    with adapters.disabled():
        bare = model(x)
    for name, layer in adapters:
        layer.base.weight.data = before[name]
    with adapters.disabled():
        exact = model(x)
    assert (started - exact).norm() < 0.7 * (bare - exact).norm()


@pytest.mark.parametrize("method", ["loftq+dora", "loftq+svd", "loftq+rslora"])
def test_it_starts_other_methods_alike(method):
    """A diagonal between the factors is 1 where there is an error to take back."""
    _, before, adapters = rounded(method=method)
    for name, layer in adapters:
        ((Q, product, _),) = twin.alternate(before[name], quantise, 3, rounds=1)
        torch.testing.assert_close(layer.effective()[0].detach(), Q + product)


def test_what_is_exact_already_starts_as_lora_does():
    """A layer that was not quantised, and ranks beyond the error's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    W = model[0].weight.detach().clone()
    model[0].weight.data[0] += 0.1  # an error of rank 1
    adapters = lorica.attach(model, "loftq", r=3, unquantised={"0": W}, verbose=False)
    error, none = (layer.update.delta.pair() for _, layer in adapters)
    torch.testing.assert_close((error.B @ error.A * error.scale).detach(), W - model[0].base.weight)
    assert not error.B[:, 1:].any() and (error.A.norm(dim=1) > 0.1).all()
    assert not none.B.any() and none.A.abs().max() <= 6**-0.5


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("loftq", {}, "none of the weights to adapt is quantised; load the model quantised"),
        ("loftq", {"unquantised": "nowhere"}, "none of the weights to adapt is quantised"),
        ("lora", {"unquantised": {}}, "`unquantised` has no effect with `lora`"),
        ("loftq", {"unquantised": {"model.layers.0.self_attn.q_proj": torch.ones(32, 32)}},
         "`unquantised` has another weight for 'model.layers.0.self_attn.q_proj'"),
        ("loftq", {"unquantised": {"model.layers.0.mlp.up_proj": torch.ones(3, 32)}},
         r"another weight for .*, \(3, 32\), than the one .*, \(48, 32\)"),
        ("loftq+relora", {}, "needs `restarts`"),
    ],
)  # fmt: skip
def test_what_cannot_start_is_refused(method, given, says):
    with pytest.raises(ValueError, match=says):
        lorica.attach(llama(num_hidden_layers=1), method, r=2, verbose=False, **given)
