"""Stochastic gradient descent: torch's own where the two mean the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica


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
