"""Riemannian Preconditioned LoRA, arXiv 2402.02347: what the paper claims, and PEFT's optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from reference import riemannian

pytestmark = pytest.mark.usefixtures("float64")


def draw(*shape):
    return torch.randn(*shape)


def optimizer(method, A, B, *, lr, decay=0.0, **options):
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    group = {
        "params": [A, B], "pair": True, "site": "", "scale": 1.0, "ratios": [1.0, 1.0],
        "diagonal": None, "lr": lr, "weight_decay": decay,
    }  # fmt: skip
    return Recipe.parse(method).rule.build([group], options), A, B  # type: ignore[union-attr]


@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_ten_steps_equal_pefts(inner):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    net = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7))
    ours = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7))
    ours.load_state_dict(net.state_dict())
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    theirs = get_peft_model(net, config, autocast_adapter_dtype=False)
    adapters = lorica.attach(
        ours, f"riemannian(delta=1e-3, inner={inner!r})", r=3, lora_alpha=6, verbose=False
    )
    for name, pair in adapters.pairs():
        module = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            pair.A.copy_(module.lora_A["default"].weight)
            pair.B.copy_(module.lora_B["default"].weight)
    made = lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1)
    cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[inner]
    peer = create_riemannian_optimizer(theirs, cls, lr=1e-2, reg=1e-3, weight_decay=0.1)
    for _ in range(10):
        x, y = draw(5, 9), draw(5, 7)
        for model, rule in ((ours, made), (theirs, peer)):
            rule.zero_grad()
            (model(x) - y).square().mean().backward()
            rule.step()
    for name, pair in adapters.pairs():
        module = theirs.base_model.model.get_submodule(name)
        for mine, other in (
            (pair.A, module.lora_A["default"].weight),
            (pair.B, module.lora_B["default"].weight),
        ):
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("inner", ["sgd", "adamw"])
@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-2, 100.0])
def test_it_equals_its_equations(inner, delta):
    method = f"riemannian(delta={delta}, inner={inner!r})"
    made, A, B = optimizer(method, draw(3, 8), draw(6, 3), lr=0.02, decay=0.1)
    a, b, state = A.detach().clone(), B.detach().clone(), {}
    extra = {"momentum": 0.0} if inner == "sgd" else {}
    for _ in range(20):
        A.grad, B.grad = draw(3, 8), draw(6, 3)
        a, b = riemannian.pair_step(
            a, b, A.grad, B.grad, state, lr=0.02, decay=0.1, delta=delta, inner=inner, **extra
        )
        made.step()
        torch.testing.assert_close(A.detach(), a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(B.detach(), b, rtol=1e-9, atol=1e-11)


def test_to_first_order_the_step_is_the_projected_full_gradient():
    """δ(ΔW) = −η s² (P_B G + G P_A)."""
    s, eta = 2.0, 1e-7
    made, A, B = optimizer("riemannian(delta=0, inner='sgd')", draw(3, 8), draw(6, 3), lr=eta)
    G, start = draw(6, 8), s * (B @ A).detach()
    A.grad, B.grad = s * B.detach().T @ G, s * G @ A.detach().T
    a, b = A.detach().clone(), B.detach().clone()
    made.step()
    P_B, P_A = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    moved = (s * (B @ A).detach() - start) / eta
    torch.testing.assert_close(moved, -(s**2) * (P_B @ G + G @ P_A), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("relative", [False, True])
def test_undamped_descent_is_the_same_for_every_factorisation(momentum, relative):
    target = draw(6, 8)

    def path(method, A, B, **options):
        made, A, B = optimizer(method, A, B, lr=0.05, decay=0.1, **options)
        out = []
        for _ in range(50):
            made.zero_grad()
            (B @ A - target).square().mean().backward()
            made.step()
            out.append((B @ A).detach())
        return torch.stack(out)

    method = f"riemannian(delta=0, inner='sgd', relative={relative})"
    A, B, M = draw(3, 8), draw(6, 3), draw(3, 3)
    other = M @ A, B @ torch.linalg.inv(M)
    one = path(method, A, B, momentum=momentum)
    torch.testing.assert_close(one, path(method, *other, momentum=momentum), rtol=1e-8, atol=1e-8)
    # Adam looks at single numbers, so with it only the gradient is free of the factorisation.
    for word in ("riemannian(delta=0)", "vectoradamw"):
        assert (path(word, A, B) - path(word, *other)).norm() > 1e-2 * one.norm()


def test_a_relative_delta_means_the_same_at_every_size():
    target = draw(6, 8)

    def path(relative, size):
        method = f"riemannian(delta=0.1, inner='sgd', relative={relative})"
        made, A, B = optimizer(method, size * draw_A, draw_B / size, lr=0.05)
        for _ in range(20):
            made.zero_grad()
            (B @ A - target).square().mean().backward()
            made.step()
        return (B @ A).detach()

    draw_A, draw_B = draw(3, 8), draw(6, 3)
    torch.testing.assert_close(path(True, 1.0), path(True, 10.0), rtol=1e-8, atol=1e-9)
    assert (path(False, 1.0) - path(False, 10.0)).norm() > 1e-3


@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_between_orthonormal_factors_it_is_the_inner_rule(inner):
    A, B = torch.linalg.qr(draw(8, 3)).Q.T, torch.linalg.qr(draw(6, 3)).Q
    made, a, b = optimizer(f"riemannian(delta=0, inner={inner!r})", A, B, lr=0.1)
    own = [nn.Parameter(A.clone()), nn.Parameter(B.clone())]
    base = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[inner]
    base = base(own, lr=0.1, weight_decay=0.0)
    for p, q in zip((a, b), own, strict=True):
        p.grad = q.grad = draw(*p.shape)
    made.step()
    base.step()
    torch.testing.assert_close(a, own[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(b, own[1], rtol=1e-9, atol=1e-10)


def steps_to_fit(method, kappa, lr, limit):
    """Steps until a rank-4 matrix of condition number κ is met to 1e-3, from B = 0."""
    torch.manual_seed(1)
    left, right = torch.linalg.qr(draw(40, 4)).Q, torch.linalg.qr(draw(40, 4)).Q
    spectrum = torch.logspace(0, -torch.tensor(float(kappa)).log10().item(), 4)
    target = left @ torch.diag(spectrum) @ right.T
    made, A, B = optimizer(method, draw(4, 40) / 40**0.5, torch.zeros(40, 4), lr=lr)
    for step in range(limit):
        off = B @ A - target
        if off.norm() < 1e-3 * target.norm():
            return step
        made.zero_grad()
        (off.square().sum() / 2).backward()
        try:
            made.step()
        except ValueError as error:
            assert "diverged" in str(error)
            return limit
    return limit


def test_the_condition_number_plays_no_part():
    scaled = [
        min(steps_to_fit("riemannian(delta=1e-12, inner='sgd')", k, lr, 60) for lr in (0.5, 0.9))
        for k in (1, 10, 100)
    ]
    assert max(scaled) <= 20
    plain = [
        min(steps_to_fit("riemannian(delta=1e9, inner='sgd')", k, lr * 1e9, 400)
            for lr in (0.2, 0.5, 1.0))
        for k in (1, 100)
    ]  # fmt: skip
    assert plain[0] < plain[1] == 400, "a huge δ is plain descent, and that is slow"


def test_with_a_frozen_half_the_other_stands_alone():
    """s·B̄A = G P_A: what PEFT's LoRA-FA optimizer computes, up to s²."""
    G = draw(6, 8)
    A, B = nn.Parameter(draw(3, 8), requires_grad=False), nn.Parameter(draw(6, 3))
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    adapters = lorica.attach(
        model, "lorafa+riemannian(delta=0, inner='sgd')", r=3, lora_alpha=3, verbose=False
    )
    _, pair = next(adapters.pairs())
    with torch.no_grad():
        pair.A.copy_(A), pair.B.copy_(B)
    made = lorica.optimizer(adapters, lr=1.0)
    pair.B.grad = G @ pair.A.detach().T
    made.step()
    step = (B - pair.B).detach() @ A
    torch.testing.assert_close(step, G @ torch.linalg.pinv(A) @ A)
    assert torch.equal(pair.A, A) and pair.A not in made.state
