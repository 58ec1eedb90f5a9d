"""PeriodicLoRA, arXiv 2402.16141: stages that unload their update, or all but a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from chains import R, effective, gradient, move, one, rank, several, teacher
from lorica import Recipe
from reference import plora as twin
from reference.cola import rate

STEPS, EVERY = 20, 8


@pytest.mark.parametrize("accumulate", ["factors", "base"])
@pytest.mark.parametrize("momentum", [0, 0.3])
def test_it_is_the_twin_over_three_stages(momentum, accumulate):
    adapters, optimizer = several(
        f"plora(every={EVERY}, momentum={momentum}, accumulate='{accumulate}')", steps=STEPS
    )
    pairs = dict(adapters.pairs())
    runs = {
        name: twin.Run(layer.store.weight().detach(), pairs[name].A.detach(), 3 / R, momentum)
        for name, layer in adapters
    }
    for u in range(STEPS):
        factor = rate(u, [EVERY, 2 * EVERY], STEPS)
        for run in runs.values():
            run.step(gradient(run.effective(), u)[2], 0.02 * factor)
        move(adapters, optimizer, u)
        for name, run in runs.items():
            pair = pairs[name]
            if (u + 1) % EVERY == 0:
                run.unload(pair.A.detach())
            own = effective(adapters, name)
            torch.testing.assert_close(own, run.effective(), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(pair.A.detach(), run.A, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(pair.B.detach(), run.B, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("accumulate", ["factors", "base"])
def test_without_momentum_it_is_cola_bit_for_bit(accumulate):
    plora, cola = (
        one(f"{word}(every={EVERY}, accumulate='{accumulate}')", steps=STEPS)
        for word in ("plora", "cola")
    )
    for u in range(STEPS):
        assert move(*plora, u) == move(*cola, u)
    assert plora[0].fingerprint() == cola[0].fingerprint()


@pytest.mark.parametrize("accumulate", ["factors", "base"])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("beside", ["", "+dora", "+pissa"])
def test_unloading_keeps_the_function_for_any_momentum(momentum, accumulate, beside):
    method = f"plora(every={EVERY}, momentum={momentum}, accumulate='{accumulate}'){beside}"
    adapters, optimizer = one(method, steps=STEPS)
    layer, pair = adapters.layers["0"], next(adapters.pairs())[1]
    seen = []
    post: Any = optimizer._optimizer_step_post_hooks
    optimizer.register_step_post_hook(
        lambda *_: seen.append((effective(adapters), pair.A.clone(), pair.B.clone()))
    )
    post.move_to_end(next(iter(post)))  # look before the schedule does
    start = layer.store.weight().detach().clone()
    for u in range(EVERY):
        move(adapters, optimizer, u)
    before, A, B = seen[-1]
    torch.testing.assert_close(effective(adapters), before, rtol=0, atol=1e-13)
    assert torch.equal(pair.A, A) and torch.equal(pair.B, momentum * B) and B.any()
    assert all(not v.any() for p in (pair.A, pair.B) for v in optimizer.state[p].values())
    assert torch.equal(layer.store.weight(), start) == (accumulate == "factors")


def test_unloading_each_step_is_descent_sketched_by_the_factor():
    """One step of gradient descent from B = 0 moves W by −η·s²·G·AᵀA."""
    adapters, optimizer = one(
        "plora(every=1, lr_scheduler_type='constant', accumulate='base')+sgd", steps=6, lr=0.1
    )
    pair = next(adapters.pairs())[1]
    for u in range(5):
        W, A = effective(adapters), pair.A.detach().clone()
        G = gradient(W, u)[2]
        expected = twin.descent_unloaded_each_step(W, A, G, pair.scale, 0.1)
        move(adapters, optimizer, u)
        torch.testing.assert_close(effective(adapters), expected, rtol=1e-12, atol=1e-14)


def test_the_rank_grows_by_r_with_each_stage_of_a_fresh_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False, dtype=torch.float64))
    adapters = lorica.attach(model, "plora(every=5)", r=2, dtype=torch.float64, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=30)
    start, ranks = effective(adapters), []
    for u in range(30):
        model(torch.randn(9, 20, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if u % 5 == 3:
            ranks.append(rank(effective(adapters) - start))
    assert ranks == [2, 4, 6, 8, 10, 12]


def test_what_momentum_does():
    """Rank 24 from a teacher, r = 2, ten stages. Without noise a fresh factor each time is far
    better (0.07) than any momentum (m = 0.3: 0.43), whose stages go on in one row space. What the
    paper wants of a momentum, that one noisy stage is not taken in full, shows at one example a
    step and noise of 3: 0.95 without, 0.92 with m = 0.5 (seeds 0 to 2). Spikes of the error after
    an unloading, which it should damp, appeared for no m: in 40 steps nothing rose by more than
    0.002."""
    method = "plora(every=120, momentum={})"
    assert teacher(method.format(0)) < 0.1
    assert teacher(method.format(0.3)) > 0.35
    noisy: dict[str, Any] = {"batch": 1, "noise": 3.0}
    assert teacher(method.format(0.5), **noisy) < teacher(method.format(0), **noisy) - 0.02


@pytest.mark.parametrize(("method", "message"), [
    ("plora(momentum=1)", r"the part that stays, in \[0, 1\)"),
    ("plora(momentum=-0.1)", "all of an update is unloaded"),
    ("plora(accumulate='x')", "'factors', 'base'"),
    ("plora(every=0)", "at least 1"),
    ("plora+cola", "both edit the (base|pair)"),
])  # fmt: skip
def test_arguments_out_of_range(method, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(method)


def test_momentum_asks_for_factors_that_train():
    """ΔW has to be linear in one of them."""
    plain, kept = Recipe.parse("plora(accumulate='base')"), Recipe.parse("plora(momentum=0.3)")
    assert "pair" not in plain.schedules[0].needs
    assert {"pair", "factors"} <= kept.schedules[0].needs


def test_left_out_the_interval_is_fitted_to_five_stages(caplog):
    caplog.set_level("INFO", logger="lorica")
    one("plora", steps=1000)
    assert "plora: every=200, 4 restarts, rate cosine in each" in caplog.text
