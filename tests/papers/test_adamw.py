"""AdamW: decay apart from the moments."""

from __future__ import annotations

import pytest
import torch

import lorica
from models import llama, train
from reference import adamw as twin


def test_a_training_run_equals_the_twin():
    """A whole model, three steps, decay on the factors and not on the magnitudes."""
    model = llama(num_hidden_layers=1).double()
    adapters = lorica.attach(model, "dora", r=2, target_modules=["q_proj"], verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1)
    states = {t.name: {} for t in adapters.trained()}
    expected = {t.name: t.parameter.detach().clone() for t in adapters.trained()}

    def follow(*_):
        for t in adapters.trained():
            decay = 0.0 if t.role == "magnitude" else 0.1
            expected[t.name] = twin.step(
                expected[t.name], t.parameter.grad, states[t.name], lr=1e-2, decay=decay
            )

    optimizer.register_step_pre_hook(follow)
    train(adapters, optimizer, 3)
    for t in adapters.trained():
        torch.testing.assert_close(t.parameter.detach(), expected[t.name])


def test_decay_does_not_pass_through_the_moments():
    p, state = torch.ones(1, dtype=torch.float64), {}
    p = twin.step(p, torch.zeros(1, dtype=torch.float64), state, lr=0.1, decay=0.5)
    assert float(p) == pytest.approx(0.95) and float(state["v"]) == 0


@pytest.mark.parametrize(("name", "value"), [("betas", (0.5, 0.9)), ("eps", 1e-3)])
def test_options_reach_it(name, value):
    adapters = lorica.attach(llama(), "lora", r=2, verbose=False)
    assert lorica.optimizer(adapters, lr=1e-3, **{name: value}).defaults[name] == value
