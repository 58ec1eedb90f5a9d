"""LoRA-FA: A stays at its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from models import llama, train
from reference import lorafa as twin
from reference import melora


def test_only_b_trains_and_the_update_stays_in_as_row_space():
    adapters = lorica.attach(llama(), "lorafa", r=4, verbose=False)
    start = {n: layer.update.delta.A.clone() for n, layer in adapters}
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 3)
    assert {t.role for t in adapters.trained()} == {"B"}
    for name, layer in adapters:
        pair = layer.update.delta.pair()
        assert torch.equal(pair.A, start[name]) and not pair.A.requires_grad
        delta = layer.update.weight(layer.store).detach()
        assert twin.in_row_space(delta.double(), pair.A.double()) == pytest.approx(1, abs=1e-6)


def test_a_step_of_descent_equals_the_twin():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
    adapters = lorica.attach(model, "lorafa", r=3, verbose=False)
    pair = next(adapters.pairs())[1]
    x = torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    _, B = twin.descent(pair.A.detach(), pair.B.detach(), weight.T @ x, pair.scale, 0.1)
    torch.optim.SGD([t.parameter for t in adapters.trained()], lr=0.1).step()
    torch.testing.assert_close(pair.B.detach(), B)
    assert pair.A.grad is None


LINKED = [f"reslora(shortcut={shortcut!r})" for shortcut in ("block", "input", "middle")]


@pytest.mark.parametrize("delta", ["melora", *LINKED])
def test_a_stays_to_the_bit_where_it_is_no_half_of_a_pair(delta):
    """It has no optimizer state either, and B learns what the same gradient without it says."""
    adapters = lorica.attach(llama(), f"{delta}+lorafa", r=4, verbose=False)
    start = {n: p.clone() for n, p in adapters.state_dict().items()}
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    train(adapters, optimizer, 3)
    assert {t.role for t in adapters.trained()} == {"B"}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in adapters:
        A, B = layer.update.delta.A, layer.update.delta.B
        assert isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)
        assert torch.equal(A, start[f"{name}.update.delta.A"]) and A.any()
        assert not A.requires_grad and A.grad is None and id(A) not in held
        assert not torch.equal(B, start[f"{name}.update.delta.B"]) and id(B) in held


def test_a_step_of_descent_over_minis_equals_the_twin():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
    adapters = lorica.attach(
        model, "melora(n=2)+lorafa+sgd", r=2, dtype=torch.float64, verbose=False
    )
    delta: Any = adapters.layers["0"].update.delta
    A, B = delta.A.detach().clone(), delta.B.detach().clone()
    x = torch.randn(4, 7, dtype=torch.float64)
    optimizer, y = lorica.optimizer(adapters, lr=0.1), model(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    optimizer.step()
    for columns, rows in zip(melora.cut(7, 2), melora.cut(5, 2), strict=True):
        G = weight[:, rows].T @ x[:, columns]  # each mini is a LoRA-FA of its own
        _, b = twin.descent(A[:, columns], B[rows], G, delta.scale, 0.1)
        torch.testing.assert_close(delta.B.detach()[rows], b)
    assert torch.equal(delta.A.detach(), A)


def test_half_the_optimizers_state():
    sizes = {}
    for method in ("lora", "lorafa"):
        adapters = lorica.attach(llama(), method, r=4, target_modules=["o_proj"], verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-3)
        train(adapters, optimizer, 1)
        sizes[method] = sum(
            v.numel() for s in optimizer.state.values() for v in s.values() if v.numel() > 1
        )
        assert adapters.summary.memory["optimizer"] == 4 * sizes[method]
    assert sizes["lorafa"] == sizes["lora"] / 2, "o_proj is square"


def saved_bytes(method: str) -> int:
    """Bytes that one layer keeps for backward beside its own parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    adapters = lorica.attach(model, f"{method}+reference", r=4, verbose=False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    x = torch.randn(256, 512)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del adapters
    assert y.requires_grad
    return sum(kept.values())


def test_the_input_need_not_be_kept():
    """x Aᵀ (N, r) is enough for B's gradient, where LoRA keeps x (N, in)."""
    assert saved_bytes("lorafa") <= 256 * 4 * 4 + 4 * 512 * 4
    assert saved_bytes("lora") >= 256 * 512 * 4
