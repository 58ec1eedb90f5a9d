"""SwitchLoRA's optimizer, arXiv 2406.06564: Adam's step count kept per vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from lorica.tensors import dtensor_ops
from reference import vectoradamw


@pytest.fixture
def one(float64):
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = lorica.attach(model, "vectoradamw", r=3, verbose=False)
    return next(adapters.pairs())[1], lorica.optimizer(adapters, lr=0.1, weight_decay=0.01)


def step(pair, made, sign=None):
    pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
    if sign is not None:
        pair.A.grad.copy_(sign)
    made.step()
    return pair.A.grad, pair.B.grad


def test_with_equal_counts_it_is_adamw(one):
    pair, made = one
    own = [nn.Parameter(pair.A.detach().clone()), nn.Parameter(pair.B.detach().clone())]
    base = torch.optim.AdamW(own, lr=0.1, weight_decay=0.01)
    for _ in range(8):
        own[0].grad, own[1].grad = step(pair, made)
        base.step()
    torch.testing.assert_close(pair.A, own[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pair.B, own[1], rtol=1e-12, atol=1e-14)


def test_a_reset_vector_starts_anew_and_its_neighbours_go_on(one):
    pair, made = one
    A, B, state = pair.A.detach().clone(), pair.B.detach().clone(), {}
    for i in range(8):
        if i == 4:
            dtensor_ops.zero_rows(pair.A, [1], 0, made)
            dtensor_ops.zero_rows(pair.B, [0, 2], 1, made)
            for key in (("A", 1), ("B", 0), ("B", 2)):
                state[key] = {}
        grads = step(pair, made)
        A, B = vectoradamw.pair_step(A, B, *grads, state, lr=0.1, decay=0.01)
        torch.testing.assert_close(pair.A.detach(), A, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(pair.B.detach(), B, rtol=1e-12, atol=1e-14)
    assert made.state[pair.A]["step"].flatten().tolist() == [8, 4, 8]
    assert made.state[pair.B]["step"].tolist() == [[4, 8, 4]]


def test_after_five_frozen_steps_the_first_is_half_as_long(float64):
    """m = v = 0 and a zero gradient move nothing, but count: 0.522·lr at the sixth."""
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = lorica.attach(model, "vectoradamw", r=3, verbose=False)
    pair, made = next(adapters.pairs())[1], lorica.optimizer(adapters, lr=0.1)
    frozen = torch.ones_like(pair.A)
    frozen[1] = 0
    start = pair.A[1].detach().clone()
    for _ in range(5):
        step(pair, made, frozen)
    assert torch.equal(pair.A[1], start)
    before = pair.A[1].detach().clone()
    step(pair, made, torch.ones_like(pair.A))
    moved = (before - pair.A[1].detach()) / 0.1
    torch.testing.assert_close(moved, torch.full_like(moved, 0.522), rtol=1e-3, atol=0)
