"""Steps with a gradient that is not finite: left out, counted, and too many stop the training."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

import lorica
from lorica.recipe import registry
from lorica.tensors import figures
from lorica.training.bind import KEY, steps_left_out
from models import llama, train

RULES = registry.names("rules")


def bound(method: str = "lora", **options):
    """One layer with its optimizer, after a real step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    try:
        adapters = lorica.attach(model, f"lora+{method}", r=2, verbose=False)
    except ValueError:  # a rule of whole matrices
        adapters = lorica.attach(model, method, r=2, verbose=False)
    return adapters, lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1, **options)


def step(adapters, optimizer, bad: float | None = None, seed: int = 0, clip: bool = False) -> None:
    """One step, with one value of the middle parameter's gradient replaced by `bad`."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    adapters.model(x).square().sum().backward()
    trained = [t.parameter for t in adapters.trained()]
    if bad is not None:
        trained[len(trained) // 2].grad.view(-1)[0] = bad
    if clip:
        nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


def held(optimizer) -> list[torch.Tensor]:
    return [v.clone() for s in optimizer.state.values() for v in s.values()]


@pytest.fixture(params=["at once", "on the device"])
def reading(request, monkeypatch):
    """As on the CPU, and as on a GPU, where figures are read later."""
    monkeypatch.setattr(figures, "lags", lambda device: request.param == "on the device")
    return request.param


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("word", RULES)
def test_a_step_is_left_out_as_a_whole_by_every_rule(word, bad, reading):
    fused = {"fused": True} if word == "adamw" else {}
    adapters, optimizer = bound(word, **fused)
    step(adapters, optimizer)
    before, state = adapters.fingerprint(), held(optimizer)
    step(adapters, optimizer, bad, seed=1)
    assert adapters.fingerprint() == before
    assert all(map(torch.equal, held(optimizer), state))
    assert all(t.parameter.grad is not None for t in adapters.trained()), "others may read them"
    assert steps_left_out(optimizer) == 1 and optimizer.param_groups[0][KEY]["step"] == 2
    step(adapters, optimizer, seed=2)
    assert adapters.fingerprint() != before and steps_left_out(optimizer) == 1
    assert "found_inf" not in vars(optimizer)


@pytest.mark.parametrize("word", RULES)
def test_three_in_a_row_stop_a_plain_loop(word):
    adapters, optimizer = bound(word)
    step(adapters, optimizer)
    before = adapters.fingerprint()
    for _ in range(2):
        step(adapters, optimizer, math.nan)
    with pytest.raises(ValueError) as caught:
        step(adapters, optimizer, math.nan)
    text = str(caught.value)
    assert "training stops at step 4: 3 steps in a row had to be left out" in text
    assert "not finite from step 2 on, first in" in text and "of 2 layers that train" in text
    assert "`lr`" in text and adapters.fingerprint() == before


def test_after_clipping_no_layer_is_called_the_first():
    adapters, optimizer = bound()
    for _ in range(2):
        step(adapters, optimizer, math.nan, clip=True)
    with pytest.raises(ValueError, match="in all 2 layers that train, as after clipping"):
        step(adapters, optimizer, math.nan, clip=True)


@pytest.mark.parametrize("total, bad, stops", [
    (100, range(2, 100, 10), None),  # every tenth
    (100, [3, 4, 10, 11, 20, 21], 21),  # six within fifty
    (100, [3, 4, 10, 11, 20, 53, 54], None),  # the first of them are forgotten by then
    (12, [5], None),
    (12, [5, 9], 9),
    (5, [2], 2),
    (None, [3, 4, 10, 11, 20, 21], 21),
])  # fmt: skip
def test_a_tenth_of_the_last_fifty_steps_may_be_left_out(total, bad, stops):
    adapters, optimizer = bound(total_steps=total)
    for number in range(1, 61):
        try:
            step(adapters, optimizer, math.nan if number in bad else None)
        except ValueError as error:
            assert number == stops, error
            which = "the last 50" if total in (100, None) else f"the run's {total}"
            assert f"of {which} steps had to be left out" in str(error)
            return
        if number == total:
            break
    assert stops is None
    assert steps_left_out(optimizer) == sum(n <= (total or 60) and n <= 60 for n in bad)


def test_on_a_device_figures_are_read_late_but_not_later_than_ten_steps(monkeypatch):
    monkeypatch.setattr(figures, "lags", lambda device: True)
    adapters, optimizer = bound(fused=True)
    read: list[int] = []
    later = figures.later

    def noted(values):
        number, value = len(read) + 1, later(values)
        read.append(0)
        return lambda: (read.__setitem__(number - 1, 1), value())[1]

    monkeypatch.setattr(figures, "later", noted)
    step(adapters, optimizer)
    before = adapters.fingerprint()
    for number in range(2, 20):
        try:
            step(adapters, optimizer, math.nan)
        except ValueError as error:
            assert "training stops at step 4" in str(error) and 4 < number <= 14
            break
        assert not any(read[-5:]), "the last steps are not waited for"
    else:
        raise AssertionError("not stopped")
    assert adapters.fingerprint() == before


def test_what_still_waits_is_counted_before_a_checkpoint(monkeypatch):
    monkeypatch.setattr(figures, "lags", lambda device: True)
    adapters, optimizer = bound(fused=True)
    step(adapters, optimizer)
    step(adapters, optimizer, math.inf)
    assert optimizer.state_dict()["param_groups"][0][KEY]["left_out"]["steps"] == 1


def test_a_resumed_run_counts_on(tmp_path):
    """Two before the cut and one after it are three in a row."""
    adapters, optimizer = bound()
    step(adapters, optimizer)
    for _ in range(2):
        step(adapters, optimizer, math.nan)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    again, resumed = bound()
    again.load_state_dict(copy.deepcopy(adapters.state_dict()))
    resumed.load_state_dict(saved)
    assert steps_left_out(resumed) == 2
    with pytest.raises(ValueError, match="at step 4: 3 steps in a row"):
        step(again, resumed, math.nan)
    del saved["param_groups"][0][KEY]["left_out"]  # of an older version
    resumed.load_state_dict(saved)
    assert steps_left_out(resumed) == 0


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_gradient_scaler_skips_does_not_count(fused, caplog):
    adapters, optimizer = bound(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=100)
    for number in range(8):
        optimizer.zero_grad()
        loss = adapters.model(torch.ones(2, 6)).square().sum()
        scaler.scale(loss * (math.inf if number < 5 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert steps_left_out(optimizer) == 0 and "left out" not in caplog.text
    assert optimizer.param_groups[0][KEY]["step"] == 3


def test_the_log_does_not_fill(caplog):
    adapters, optimizer = bound(total_steps=400)
    with caplog.at_level(logging.WARNING, logger="lorica"):
        for number in range(1, 200):
            step(adapters, optimizer, math.nan if number % 10 == 0 else None)
    told = [r for r in caplog.records if "is left out" in r.getMessage()]
    assert len(told) == 5, "at the 1st, 2nd, 4th, 8th and 16th time"


def test_half_precision_gradients_are_not_taken_for_infinite():
    """Their norm is beyond float16, they are not."""
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float16))
    adapters = lorica.attach(model, "full", verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-6)
    for t in adapters.trained():
        t.parameter.grad = torch.full_like(t.parameter, 60000.0)
    optimizer.step()
    assert steps_left_out(optimizer) == 0


def test_a_run_of_every_kind_still_takes_the_same_steps():
    """The look changes no bit of an ordinary run: torch's own AdamW agrees exactly."""
    ends = []
    for own in (True, False):
        adapters = lorica.attach(llama(num_hidden_layers=1), "lora", r=2, verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-2)
        if not own:
            groups = adapters.param_groups(1e-2)
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        train(adapters, optimizer, 4)
        ends.append(adapters.fingerprint())
    assert ends[0] == ends[1]
