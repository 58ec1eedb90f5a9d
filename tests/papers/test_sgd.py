"""Stochastic gradient descent: torch's own where the two mean the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from reference import sgd as twin


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1)])
def test_it_is_torchs_without_decay_or_without_momentum(momentum, decay):
    model = nn.Sequential(nn.Linear(6, 5).double())
    adapters = lorica.attach(model, f"sgd(momentum={momentum})", r=2, verbose=False)
    made = lorica.optimizer(adapters, lr=0.1, weight_decay=decay)
    own = [nn.Parameter(t.parameter.detach().clone()) for t in adapters.trained()]
    base = torch.optim.SGD(own, lr=0.1, momentum=momentum, weight_decay=decay)
    for _ in range(6):
        for t, p in zip(adapters.trained(), own, strict=True):
            t.parameter.grad = p.grad = torch.randn_like(p)
        made.step()
        base.step()
    for t, p in zip(adapters.trained(), own, strict=True):
        torch.testing.assert_close(t.parameter, p, rtol=1e-12, atol=1e-14)


def test_decay_is_decoupled_from_momentum():
    """Without a gradient every step shrinks a weight by ηλ of itself, and by no more."""
    model = nn.Sequential(nn.Linear(6, 5).double())
    adapters = lorica.attach(model, "sgd", r=2, verbose=False)
    made = lorica.optimizer(adapters, lr=0.1, weight_decay=0.5)
    A = next(adapters.pairs())[1].A
    start = A.detach().clone()
    for _ in range(4):
        A.grad = torch.zeros_like(A)
        made.step()
    torch.testing.assert_close(A.detach(), start * 0.95**4)


def test_a_run_over_two_layers_of_unequal_shapes_equals_the_twin():
    """Momentum and decay at once, each layer with its own state; torch decays through the
    momentum, so it can't be the judge here."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    adapters = lorica.attach(model, "sgd(momentum=0.8)", r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=0.1, weight_decay=0.3)
    values = {t.name: t.parameter.detach().clone() for t in adapters.trained()}
    states = {name: {} for name in values}
    x = torch.randn(9, 6, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for t in adapters.trained():
            values[t.name] = twin.step(
                values[t.name], t.parameter.grad, states[t.name], lr=0.1, momentum=0.8, decay=0.3
            )
        optimizer.step()
    for t in adapters.trained():
        torch.testing.assert_close(t.parameter.detach(), values[t.name], rtol=1e-12, atol=1e-14)


def test_no_momentum_no_state():
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = lorica.attach(model, "sgd(momentum=0)", r=2, verbose=False)
    made = lorica.optimizer(adapters)
    model(torch.randn(3, 6)).sum().backward()
    made.step()
    assert not any(made.state.values()) and adapters.summary.memory["optimizer"] == 0


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_out_of_range_is_an_error(momentum):
    with pytest.raises(ValueError, match=r"in \[0, 1\), e.g. 0.9"):
        lorica.Recipe.parse(f"sgd(momentum={momentum})")
