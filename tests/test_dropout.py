"""Dropout by a seed: the share and independence of what falls, and that no mask is kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.tensors import dropout
from models import llama, perturb


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_the_share_that_falls_is_p_and_neighbours_are_independent(p):
    n = 400_000
    gone = dropout.Mask(p, seed=1).blank_(torch.ones(n)) == 0
    assert abs(gone.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for lag in (1, 2, 64):  # P(both) = p²
        both = (gone[:-lag] & gone[lag:]).double().mean()
        assert abs(both - p * p) < 6 * math.sqrt(p * p / n), lag


def test_gaps_have_the_geometric_distribution():
    at = dropout._positions(1_000_000, 0.2, seed=3)
    gaps = at.diff()
    for gap in range(1, 8):
        expected = 0.2 * 0.8 ** (gap - 1)
        found = (gaps == gap).double().mean()
        assert abs(found - expected) < 5 * math.sqrt(expected / gaps.numel()), gap


@given(count=st.integers(0, 50), p=st.floats(0.001, 0.999), seed=st.integers(0, 2**62 - 1))
def test_positions_ascend_and_stay_inside(count, p, seed):
    at = dropout._positions(count, p, seed)
    assert at.diff().gt(0).all() and (at >= 0).all() and (at < count).all()


@given(data=st.data())
def test_backward_drops_what_forward_dropped(data):
    shape = data.draw(st.sampled_from([(3,), (2, 5), (0, 4), (2, 3, 4)]))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = dropout.drop(x, 0.5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), (x * gradient).detach())
    assert gradient.unique().tolist() in ([], [0.0], [2.0], [0.0, 2.0])


def test_seeds_come_from_torchs_generator_and_nothing_is_saved():
    x, kept = torch.ones(1000, requires_grad=True), []
    torch.manual_seed(3)
    one, two = dropout.drop(x, 0.3), dropout.drop(x, 0.3)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        again = dropout.drop(x, 0.3)
    assert torch.equal(one, again) and not torch.equal(one, two) and not kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_draw_the_same_again(reentrant):
    x = torch.ones(1000, requires_grad=True)

    def segment(x):
        return dropout.drop(x, 0.3).square()

    torch.manual_seed(3)
    y = checkpoint(segment, x, use_reentrant=reentrant)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach())  # y = (mask / 0.7)² where x = 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("method", ["lora", "dora", "mora", "svd"])
def test_a_model_under_checkpointing_trains_as_without(method):
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = llama()
        adapters = lorica.attach(model, method, r=4, lora_dropout=0.3, verbose=False)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(20).view(2, 10)
        torch.manual_seed(5)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([t.parameter.grad for t in adapters.trained()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_draws_once_forward_and_once_backward(monkeypatch):
    drawn, draw = [], dropout._positions
    monkeypatch.setattr(dropout, "_positions", lambda *call: drawn.append(call) or draw(*call))
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    adapters = lorica.attach(model, "lora", r=2, lora_dropout=0.3, verbose=False)
    perturb(adapters)
    model.train()
    y = model(torch.randn(5, 12, requires_grad=True))
    assert len(drawn) == 1
    y.sum().backward()
    assert drawn == [drawn[0]] * 2, "the gradients of x, A and B share one mask"
