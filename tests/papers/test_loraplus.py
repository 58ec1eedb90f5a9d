"""LoRA+: B learns λ times faster than A."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from models import llama, perturb, train
from reference import loraplus as twin
from reference import melora, reslora


def attached(method="loraplus(loraplus_lr_ratio=4)", **fields):
    return lorica.attach(llama(), method, r=4, verbose=False, **fields)


def rate_of(optimizer) -> dict[int, dict]:
    return {id(p): g for g in optimizer.param_groups for p in g["params"]}


def test_the_rates_are_the_twins():
    adapters = attached("dora+loraplus(loraplus_lr_ratio=4)", bias="lora_only")
    optimizer = lorica.optimizer(adapters, lr=1e-3, weight_decay=0.1)
    groups, trained = rate_of(optimizer), adapters.trained()
    expected = twin.rates([t.role for t in trained], 1e-3, 4)
    assert [groups[id(t.parameter)]["lr"] for t in trained] == expected
    decay = {t.role: groups[id(t.parameter)]["weight_decay"] for t in trained}
    assert decay["A"] == decay["B"] == 0.1 and decay["magnitude"] == 0


def test_the_defaults_are_the_authors():
    optimizer = lorica.optimizer(attached("loraplus"))
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([5e-5, 16 * 5e-5])


def test_a_ratio_of_one_is_lora():
    runs = []
    for method in ("lora", "loraplus(loraplus_lr_ratio=1)"):
        adapters = attached(method)
        train(adapters, lorica.optimizer(adapters, lr=1e-2), 4)
        runs.append(adapters.fingerprint())
    assert runs[0] == runs[1]


def test_the_ratio_stands_after_every_step_of_a_scheduler():
    adapters = attached()
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    for step in range(5):
        train(adapters, optimizer, 1, first=step)
        scheduler.step()
        a, b = sorted(g["lr"] for g in optimizer.param_groups)
        assert b / a == pytest.approx(4)


def test_equal_gradients_move_b_further_by_the_ratio():
    """Adam's first step is the rate times the gradient's sign."""
    adapters = attached()
    optimizer = lorica.optimizer(adapters, lr=1e-3, eps=1e-30)
    before = {t.name: t.parameter.detach().clone() for t in adapters.trained()}
    for t in adapters.trained():
        t.parameter.grad = torch.full_like(t.parameter, 0.3)
    optimizer.step()
    for t in adapters.trained():
        moved = before[t.name] - t.parameter.detach()
        expected = 4e-3 if t.role == "B" else 1e-3
        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=1e-7)


def test_a_step_over_minis_moves_each_role_at_its_rate():
    """Side by side, A and B are no pair, but roles they have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=False, dtype=torch.float64))
    method = "melora(n=2)+loraplus(loraplus_lr_ratio=4)+sgd"
    adapters = lorica.attach(model, method, r=2, dtype=torch.float64, verbose=False)
    perturb(adapters)
    delta: Any = adapters.layers["0"].update.delta
    x = torch.randn(3, 7, dtype=torch.float64)
    optimizer, y = lorica.optimizer(adapters, lr=0.1), model(x)
    weight, A, B = torch.randn_like(y), delta.A.detach().clone(), delta.B.detach().clone()
    dA, dB = melora.gradients(weight.T @ x, A, B, 2, delta.scale)
    (y * weight).sum().backward()
    optimizer.step()
    torch.testing.assert_close(delta.A.detach(), A - 0.1 * dA)
    torch.testing.assert_close(delta.B.detach(), B - 0.4 * dB)


@pytest.mark.parametrize("shortcut", ["block", "input", "middle"])
def test_a_step_over_linked_layers_moves_each_role_at_its_rate(shortcut):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(3)))
    method = f"reslora(shortcut={shortcut!r})+loraplus(loraplus_lr_ratio=4)+sgd"
    adapters = lorica.attach(model, method, r=2, dtype=torch.float64, verbose=False)
    perturb(adapters)
    deltas: Any = [layer.update.delta for _, layer in adapters]
    A, B = ([p.detach().clone().requires_grad_() for p in ps] for ps in
            ([d.A for d in deltas], [d.B for d in deltas]))  # fmt: skip
    W = [layer.store.weight().detach() for _, layer in adapters]
    x, weight = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    run = reslora.chain(x, W, A, B, deltas[0].scale, shortcut, 4, between=lambda y: y)
    (run[-1][1] * weight).sum().backward()
    optimizer = lorica.optimizer(adapters, lr=0.1)
    (model(x) * weight).sum().backward()
    optimizer.step()
    for delta, a, b in zip(deltas, A, B, strict=True):
        torch.testing.assert_close(delta.A.detach(), (a - 0.1 * a.grad).detach())
        torch.testing.assert_close(delta.B.detach(), (b - 0.4 * b.grad).detach())


def test_what_has_no_sides_is_refused():
    with pytest.raises(ValueError, match="`loraplus` cannot be combined with `mora`.*`sides`"):
        lorica.Recipe.parse("loraplus+mora")


def test_an_embeddings_factors_have_their_own_rate():
    adapters = attached("loraplus(loraplus_lr_embedding=3e-6)", target_modules=["embed_tokens"])
    (group,) = lorica.optimizer(adapters, lr=1e-3).param_groups
    assert group["lr"] == 3e-6


@pytest.mark.parametrize("argument", ["loraplus_lr_ratio=0", "loraplus_lr_embedding=-1"])
def test_a_rate_must_be_positive(argument):
    with pytest.raises(ValueError, match=f"`loraplus.{argument}.`: a (number|rate) above 0"):
        lorica.Recipe.parse(f"loraplus({argument})")


def test_the_toy_model_changes_by_its_three_terms():
    """The paper's decomposition, and its point: at one rate the terms differ in the width n."""
    for n in (16, 256):
        generator = torch.Generator().manual_seed(n)
        a, x, w = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
        a, b = a / n**0.5, 0.3
        f = float((w + b * a) @ x)
        new_a, new_b, terms = twin.toy_step(a, b, x, w, 0.7, 1e-3, 1e-2)
        assert float((w + new_b * new_a) @ x) - f == pytest.approx(sum(terms), rel=1e-9)
    shares = []
    for n in (16, 4096):
        x, a = torch.ones(n, dtype=torch.float64), torch.full((n,), n**-1.0, dtype=torch.float64)
        _, _, terms = twin.toy_step(a, 1.0, x, 0 * x, 0.0, 1 / n, 1 / n)
        shares.append(terms[1] / terms[0])
    assert shares[0] / shares[1] == pytest.approx(4096 / 16)
