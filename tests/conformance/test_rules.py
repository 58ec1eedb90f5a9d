"""Every update rule, found by walking the room."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util

import pytest
import torch
from torch import nn
from walk import adapt, recipe, weight_of

import lorica
from lorica.recipe import registry
from lorica.training.left_out import TooManyLeftOut
from models import llama, train

RULES = registry.names("rules")
RATES = (1.0, 0.3, 0.1, 0.03, 0.01)


def problem(dtype: torch.dtype = torch.float64):
    """One layer, and a weight at rank 2 from it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 6, bias=False, dtype=dtype))
    goal = model[0].weight.detach() + torch.randn(6, 2, dtype=dtype) @ torch.randn(
        2, 7, dtype=dtype
    )
    return model, goal


@pytest.mark.parametrize("kind", ["quadratic", "regression"])
@pytest.mark.parametrize("word", RULES)
def test_it_converges(word, kind):
    x = torch.randn(40, 7, dtype=torch.float64)
    best = [1.0]
    for lr in RATES:
        if min(best) < 1e-4:
            break
        model, goal = problem()
        adapters = lorica.attach(model, recipe(word, r=2, lora_alpha=2), verbose=False)
        optimizer = lorica.optimizer(adapters, lr=lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=250)
        losses = []
        for _ in range(250):
            weight = weight_of(adapters, "0")
            off = weight - goal if kind == "quadratic" else (model(x) - x @ goal.T) / 40**0.5
            loss = off.square().sum()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            try:
                optimizer.step()
            except TooManyLeftOut:  # this rate is too high
                break
            scheduler.step()
        best.append(losses[-1] / losses[0])
    assert min(best) < 1e-4, dict(zip(RATES, best[1:], strict=False))


@pytest.mark.parametrize("word", RULES)
def test_the_order_of_pairs_plays_no_part(word):
    def run(names):
        torch.manual_seed(1)
        layers = {n: nn.Linear(6, 6, dtype=torch.float64) for n in "pqs"}
        model = nn.ModuleDict({n: layers[n] for n in names})
        adapters = lorica.attach(model, recipe(word, r=2), verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-2)
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for _ in range(4):
            loss = sum(i * model[n](x).square().sum() for i, n in enumerate("pqs", 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return adapters.state_dict()

    one, other = run("pqs"), run("sqp")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("word", RULES)
def test_nothing_grows_after_the_second_step(word):
    adapters = adapt(llama(num_hidden_layers=1), word, r=4)
    optimizer = lorica.optimizer(adapters, lr=1e-3)

    def held() -> int:
        gc.collect()
        live = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum(t.numel() for t in live)

    train(adapters, optimizer, 2)
    before = held()
    train(adapters, optimizer, 4)
    assert held() <= before, "bytes that earlier tests left may go, none may come"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", RULES)
def test_dtype_is_kept_and_the_state_is_of_the_declared_size(word, dtype):
    model, goal = problem(dtype)
    adapters = lorica.attach(model, recipe(word, r=2), verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    model(torch.randn(3, 7, dtype=dtype)).square().sum().backward()
    optimizer.step()
    trained = [t.parameter for t in adapters.trained()]
    assert all(p.dtype == dtype for p in trained)
    state = [v for s in optimizer.state.values() for v in s.values() if v.numel() > 1]
    assert all(v.dtype == dtype for v in state)
    declared = adapters.recipe.rule.state_elements(adapters)
    assert sum(v.numel() for v in state) == declared


@pytest.mark.parametrize("word", RULES)
def test_a_zero_rate_moves_nothing_and_a_missing_gradient_is_no_step(word):
    adapters = adapt(llama(num_hidden_layers=1), word, r=4)
    optimizer = lorica.optimizer(adapters, lr=0.0, weight_decay=0.1)
    before = adapters.fingerprint()
    train(adapters, optimizer, 2)
    assert adapters.fingerprint() == before
    idle = adapters.trained()[0].parameter
    for t in adapters.trained()[1:]:
        t.parameter.grad = torch.ones_like(t.parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    kept = idle.clone()
    optimizer.step()
    assert torch.equal(idle, kept) and adapters.fingerprint() != before


@pytest.mark.parametrize("word", RULES)
def test_a_resumed_run_is_the_straight_run(word, tmp_path):
    def fresh():
        adapters = adapt(llama(num_hidden_layers=1), word, r=4)
        return adapters, lorica.optimizer(adapters, lr=1e-2, weight_decay=0.01)

    straight, optimizer = fresh()
    saved = []
    for step in range(5):
        saved.append((copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())))
        train(straight, optimizer, 1, first=step)
    for cut in range(1, 5):
        resumed, optimizer = fresh()
        resumed.load_state_dict(saved[cut][0])
        torch.save(saved[cut][1], tmp_path / "optimizer.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        train(resumed, optimizer, 5 - cut, first=cut)
        assert resumed.fingerprint() == straight.fingerprint(), f"cut after {cut} steps"


def twin(word: str):
    """`tests/reference/<word>.py` where it has a step for a pair."""
    if importlib.util.find_spec(f"reference.{word}") is None:
        return None
    return getattr(importlib.import_module(f"reference.{word}"), "pair_step", None)


@pytest.mark.parametrize("word", [w for w in RULES if twin(w) is not None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_equals_its_plain_twin(word, weight_decay):
    model, _ = problem()
    adapters = lorica.attach(model, recipe(word, r=2), verbose=False)
    optimizer = lorica.optimizer(adapters, lr=0.05, weight_decay=weight_decay)
    _, pair = next(adapters.pairs())
    A, B, state = pair.A.detach().clone(), pair.B.detach().clone(), {}
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for p in (pair.A, pair.B):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        A, B = twin(word)(A, B, pair.A.grad, pair.B.grad, state, lr=0.05, decay=weight_decay)
        optimizer.step()
        torch.testing.assert_close(pair.A.detach(), A, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(pair.B.detach(), B, rtol=1e-12, atol=1e-14)
