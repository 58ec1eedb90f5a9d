"""OLoRA: a start from the QR factors of the weight, anchored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from models import MODELS, gpt2, llama, logits, train
from reference import olora as twin


def layer(method="olora", r=3, shape=(8, 6), **fields):
    torch.manual_seed(0)
    out, features = shape
    model = nn.Sequential(nn.Linear(features, out, dtype=torch.float64))
    adapters = lorica.attach(model, method, r=r, verbose=False, **fields)
    return model, adapters.layers["0"]


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (6, 6)])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_the_start_equals_the_twin(shape, r):
    _, one = layer(r=r, shape=shape)
    pair = one.update.delta.pair()
    W = one.base.weight.detach()
    start = (pair.B @ pair.A).detach()
    torch.testing.assert_close(start, twin.product(W, r))
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close((pair.B.T @ pair.B).detach(), eye)
    assert torch.equal(pair.A[:, :r].detach().tril(-1), torch.zeros(r, r, dtype=torch.float64))
    torch.testing.assert_close(start[:, :r], W[:, :r])


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_what_is_frozen_is_the_papers_residual(s):
    """W_res = W − s·B₀A₀, of which the first r columns are (1 − s) W."""
    _, one = layer(lora_alpha=3 * s)
    W = one.base.weight.detach()
    frozen = W + one.update.frozen_factors.weight()
    torch.testing.assert_close(frozen, twin.residual(W, 3, s))
    torch.testing.assert_close(frozen[:, :3], (1 - s) * W[:, :3])
    pair = one.update.delta.pair()
    torch.testing.assert_close((pair.B.T @ pair.B).detach(), torch.eye(3, dtype=torch.float64))


def test_the_default_scale_is_one():
    assert layer()[1].site.scale == 1
    assert layer("olora+rslora")[1].site.scale == pytest.approx(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [2, 4, 8])
def test_the_function_is_kept(name, alpha):
    model = MODELS[name]()
    before = logits(model)
    lorica.attach(model, "olora", r=4, lora_alpha=alpha, verbose=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_both_factors_learn_from_the_first_step():
    model, one = layer()
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    pair = one.update.delta.pair()
    assert float(pair.A.grad.abs().max()) > 1e-3 and float(pair.B.grad.abs().max()) > 1e-3


def test_signs_play_no_part_in_training():
    """Column i of B and row i of A negated: the mirror image of the same run."""
    runs = []
    for sign in (1.0, -1.0):
        adapters = lorica.attach(llama().double(), "olora", r=4, verbose=False)
        with torch.no_grad():
            for _, one in adapters:
                for p in (one.update.delta.A, one.update.delta.B.T):
                    p[1].mul_(sign)
                for p in (one.update.frozen_A, one.update.frozen_B.T):
                    p[1].mul_(sign)
        train(adapters, lorica.optimizer(adapters, lr=1e-2), 3)
        runs.append(logits(adapters.model))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_the_transposed_layout_factorises_the_same_matrix():
    """GPT-2 stores (in, out); the start is of the (out, in) matrix all the same."""
    model = gpt2(n_layer=1).double()
    adapters = lorica.attach(model, "olora", r=4, verbose=False)
    for _, one in adapters:
        pair = one.update.delta.pair()
        start = (pair.B @ pair.A).detach()
        torch.testing.assert_close(start, twin.product(one.base.weight.detach().T, 4))


def test_it_captures_less_energy_than_the_principal_part():
    """About what r random directions capture, plus the first columns (64 x 64 Gaussian, r = 8)."""
    torch.manual_seed(0)
    shares = {}
    for method in ("olora", "pissa"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        nn.init.normal_(model[0].weight)
        one = lorica.attach(model, method, r=8, verbose=False).layers["0"]
        start = one.update.delta.weight(one.store).detach()
        shares[method] = float(start.square().sum() / one.base.weight.square().sum())
    assert shares["olora"] == pytest.approx(0.230, abs=0.03)
    assert shares["pissa"] == pytest.approx(0.376, abs=0.03)


def test_in_half_precision_the_base_keeps_its_bytes_and_the_start_is_near():
    model = llama().bfloat16()
    before, kept = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    lorica.attach(model, "olora", r=4, verbose=False)
    drift = (logits(model) - before).float().abs().max() / before.float().abs().max()
    assert drift < 0.03
    lorica.detach(model)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
