"""LoRA-FA: A stays at its start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from models import llama, train
from reference import lorafa as twin


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


def test_half_the_optimizers_state():
    sizes = {}
    for method in ("lora", "lorafa"):
        adapters = lorica.attach(llama(), method, r=4, target_modules=["o_proj"], verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-3)
        train(adapters, optimizer, 1)
        sizes[method] = sum(
            v.numel() for s in optimizer.state.values() for v in s.values() if v.numel() > 1
        )
        assert adapters.contract.memory["optimizer"] == 4 * sizes[method]
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
