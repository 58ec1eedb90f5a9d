"""A loop that runs longer than `total_steps` finds every schedule in its end state.

A horizon that is too short by a step is the commonest mistake of a plain loop, and it must not ruin
the run.
"""

from __future__ import annotations

import math

import pytest
import torch
from walk import recipe

import lorica
from lorica.recipe import registry
from models import llama, train

STEPS, RATE = 12, 1e-2

# Each schedule with what it leaves out, and with what its curves and intervals depend on.
METHODS = (
    *registry.names("schedules"),
    "adalora(tfinal=0)",
    "cola(every=5, lr_scheduler_type='linear')",
    "plora(every=4, momentum=0.3)",
    "raclora(every=5, lr_scheduler_type='cosine')",
    "relora(every=3, rewarm=2)",
    "relora(every=4, rewarm=2, lr_scheduler_type='jagged_cosine', warmup_steps=2)",
    "relora(every=4, warm_start=2, reset='random')",
    "sora(stages=3)",
    "sora(stages=3, lr_scheduler_type='cosine', scaled=False)",
    "switchlora(interval=2, kappa=1)",
    "switchlora(interval=2, kappa=1, select='random', freeze=1)",
    "xgblora(every=3, lr_scheduler_type='linear')",
)


class Events:
    """What `Training` is asked to do to weights, by step."""

    def __init__(self, monkeypatch) -> None:
        from lorica.training.training import Training

        self.steps: list[int] = []
        for name in ("merge_", "swap_", "restarted", "set_trainable"):
            self.watch(monkeypatch, Training, name)

    def watch(self, monkeypatch, owner, name) -> None:
        original = getattr(owner, name)

        def watched(training, *args, **kwargs):
            self.steps.append(training.step)
            return original(training, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


def run(method: str, steps: int):
    """(adapters, the rate of every step) of a plain loop planned for STEPS steps."""
    adapters = lorica.attach(llama(num_hidden_layers=2), recipe(method, r=4), verbose=False)
    optimizer = lorica.optimizer(adapters, lr=RATE, total_steps=STEPS, seed=3)
    rates = []
    for step in range(steps):
        train(adapters, optimizer, 1, first=step)
        rates.append(optimizer.param_groups[0]["lorica"]["rate"])
    return adapters, rates


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_twice_the_horizon_holds_the_end_state(method, monkeypatch):
    events = Events(monkeypatch)
    adapters, rates = run(method, 2 * STEPS)
    peak = max(rates[:STEPS])
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates), rates
    assert len(set(rates[STEPS:])) == 1, f"the rate still changes: {rates[STEPS:]}"
    tensors = adapters.state_dict().values()
    assert all(t.isfinite().all() for t in tensors if t.is_floating_point())
    late = [step for step in events.steps if step >= STEPS]
    assert not late, f"events at steps {late}"


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.startswith(("cola", "plora", "relora", "switchlora"))]
)
def test_the_run_has_events_before(method, monkeypatch):
    """Else the test above would pass a schedule that does nothing."""
    events = Events(monkeypatch)
    run(method, STEPS)
    assert [step for step in events.steps if 0 < step < STEPS - 1]


@pytest.mark.parametrize("steps", [STEPS + 1, 2 * STEPS])
def test_prilora_stays_as_sparse_as_at_the_end(steps):
    adapters, _ = run("prilora(every=5)", steps)
    for _, pair in adapters.pairs():
        zeros = (pair.A == 0).sum(1)
        assert (zeros >= pair.A.shape[1] // 2).all()


@pytest.mark.parametrize("steps", [STEPS + 1, 2 * STEPS])
def test_adalora_keeps_its_pattern(steps):
    adapters, _ = run("adalora", STEPS)
    longer, _ = run("adalora", steps)
    for (_, short), (_, long) in zip(adapters.pairs(), longer.pairs(), strict=True):
        assert torch.equal(short.mask, long.mask)
        assert not long.E[long.mask == 0].any()


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_a_curve_ends_where_its_formula_does(shape):
    _, rates = run(f"cola(every=5, lr_scheduler_type='{shape}')", STEPS + 3)
    end = {"linear": 0.0, "cosine": 0.0, "constant": RATE}[shape]
    assert all(math.isclose(rate, end, abs_tol=1e-15) for rate in rates[STEPS:])


def test_the_jagged_cosine_ends_at_its_floor():
    method = "relora(every=4, rewarm=2, lr_scheduler_type='jagged_cosine', min_lr_ratio=0.2)"
    _, rates = run(method, STEPS + 3)
    assert rates[STEPS:] == pytest.approx([0.2 * RATE] * 3)
