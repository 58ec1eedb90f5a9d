"""LoRA-RITE, arXiv 2410.20625: what the paper and its code's behaviour claim."""

from __future__ import annotations

import logging

import pytest
import torch

from lorica import Recipe
from lorica.methods.rules._spectral import inverse_root, largest_fall
from reference import lorarite

pytestmark = pytest.mark.usefixtures("float64")
OUT, IN, R = 12, 10, 3


def draw(*shape):
    return torch.randn(*shape)


def optimizer(method, pairs, *, lr=1e-2, decay=0.0):
    """The rule over bare pairs: a group each, as the adapters would hand them out."""
    groups = [
        {
            "params": [torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())], "pair": True,
            "site": str(i), "scale": 1.0, "ratios": [1.0, 1.0], "diagonal": None, "lr": lr,
            "weight_decay": decay,
        }
        for i, (A, B) in enumerate(pairs)
    ]  # fmt: skip
    made = Recipe.parse(method).rule.build(groups, {})  # type: ignore[union-attr]
    return made, [g["params"] for g in made.param_groups]


def follow(method, start, steps, *, target, decay=0.0, lr=1e-2, scale=1.0):
    """ΔW of each step on ½‖ΔW x − target x‖², the data of step t the same in every run."""
    made, pairs = optimizer(method, start, lr=lr, decay=decay)
    path = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = 0
        for i, (A, B) in enumerate(pairs):
            x = torch.randn(7, A.shape[1], generator=generator)
            loss = loss + scale * (x @ (B @ A - target[i]).T).square().mean()
        made.zero_grad()
        loss.backward()
        made.step()
        path.append(torch.stack([(B @ A).detach() for A, B in pairs]))
    return torch.stack(path)


def problem(count=2, rank=2):
    start = [(draw(R, IN), draw(OUT, R) * 0.3) for _ in range(count)]
    target = [draw(OUT, rank) @ draw(rank, IN) for _ in range(count)]
    return start, target


def recombined(start, seed=5):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for A, B in start:
        M = torch.randn(R, R, generator=generator)
        out.append((M @ A, B @ torch.linalg.inv(M)))
    return out


def scaled(start):
    return [(10 * A, B / 10) for A, B in start]


def apart(one, other):
    return ((one - other).norm() / one.norm()).item()


SETTINGS = {
    "plain": ("lorarite(clip=0)", 0.0, 1.0),
    "clip": ("lorarite(clip=0.1)", 0.0, 1.0),
    "skip": ("lorarite(skip=0.9)", 0.0, 1.0),
    "decay": ("lorarite", 0.1, 1.0),
    "escape": ("lorarite(escape=True)", 0.0, 1.0),
    "all": ("lorarite(clip=0.5, skip=0.9, escape=True)", 0.1, 2.0),
}


@pytest.mark.parametrize("other", [recombined, scaled])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_factorisation_takes_the_same_path(setting, other):
    method, decay, scale = SETTINGS[setting]
    start, target = problem()
    one = follow(method, start, 50, target=target, decay=decay, scale=scale)
    two = follow(method, other(start), 50, target=target, decay=decay, scale=scale)
    assert apart(one, two) < 1e-9
    assert apart(one[:1].expand_as(one), one) > 1e-2, "it moved"


def test_adam_does_not():
    start, target = problem()
    one = follow("vectoradamw", start, 50, target=target)
    assert apart(one, follow("vectoradamw", scaled(start), 50, target=target)) > 0.05
    assert apart(one, follow("vectoradamw", recombined(start), 50, target=target)) > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {}, {"escape": True}, {"clip": 0.0}, {"clip": 3.0, "skip": 1.1}, {"eps": 1e-3},
        {"betas": (0.7, 0.8), "escape": True},
    ],
)  # fmt: skip
def test_fifty_random_steps_equal_the_equations(options):
    start, _ = problem(count=3)
    text = ", ".join(f"{k}={v!r}" for k, v in options.items())
    made, pairs = optimizer(f"lorarite({text})", start, decay=0.1)
    twin, state = start, {}
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        gradients = []
        for A, B in pairs:
            for p in (A, B):
                p.grad = torch.randn(p.shape, generator=generator)
            gradients.append((A.grad, B.grad))
        twin = lorarite.step(twin, gradients, state, lr=1e-2, decay=0.1, **options)
        made.step()
        for (A, B), (a, b) in zip(pairs, twin, strict=True):
            torch.testing.assert_close(A.detach(), a, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(B.detach(), b, rtol=1e-9, atol=1e-9)


def test_the_twin_holds_from_a_zero_start_too():
    start, target = [(draw(R, IN), torch.zeros(OUT, R))], draw(OUT, IN)
    made, [(A, B)] = optimizer("lorarite", start)
    twin, state = start, {}
    for _ in range(50):
        made.zero_grad()
        (B @ A - target).square().mean().backward()
        gradients = [(A.grad, B.grad)]
        twin = lorarite.step(twin, gradients, state, lr=1e-2)
        made.step()
        torch.testing.assert_close((B @ A).detach(), twin[0][1] @ twin[0][0], rtol=1e-6, atol=1e-8)


def first_step(gradient_rank):
    """B at the first step, divided by −η, in A's orthonormal basis: S = M of a fresh state."""
    A = torch.linalg.qr(draw(IN, R)).Q.T.contiguous()
    made, [(a, b)] = optimizer("lorarite(clip=0, eps=0)", [(A, torch.zeros(OUT, R))], lr=1.0)
    a.grad = torch.zeros_like(a)
    b.grad = 1e-3 * draw(OUT, gradient_rank) @ draw(gradient_rank, R)
    made.step()
    assert torch.equal(a, A), "B = 0 gives A no direction"
    return -b.detach()


def test_the_first_step_is_orthogonal_whatever_the_gradients_size():
    S = first_step(R)
    torch.testing.assert_close(S.T @ S / OUT, torch.eye(R), rtol=1e-6, atol=1e-6)
    assert S.square().mean().item() == pytest.approx(1)


def test_a_gradient_of_lower_rank_moves_what_it_can():
    """Without the clamp one eigenvalue of −1e-18 would drop the whole update."""
    A, B = torch.linalg.qr(draw(IN, R)).Q.T.contiguous(), torch.zeros(OUT, R)
    made, [(a, b)] = optimizer("lorarite(clip=0)", [(A, B)], lr=1.0)
    a.grad, b.grad = torch.zeros_like(a), 1e-2 * draw(OUT, 2) @ draw(2, R)
    made.step()
    values = torch.linalg.eigvalsh(b.detach().T @ b.detach() / OUT)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0, 1.0]), rtol=1e-3, atol=1e-6)


def test_an_eigenvalue_below_zero_counts_as_zero():
    V = torch.diag(torch.tensor([-1e-18, 1.0, 4.0]))[None]
    root = inverse_root(V, 0.0, 1e-3).diagonal(dim1=1, dim2=2)[0]
    torch.testing.assert_close(root, torch.tensor([1e3, 1 / 1.001, 1 / 2.001]))


def test_rank_one_is_adam_with_one_second_moment_a_factor():
    A, B = draw(1, IN), draw(OUT, 1)
    made, [(a, b)] = optimizer("lorarite(clip=0, eps=0)", [(A, B)], lr=1e-2)
    m = v = torch.zeros(())
    for k in range(5):
        norm = a.detach().norm()
        a.grad, b.grad = torch.zeros_like(a), draw(OUT, 1)
        before, g = b.detach().clone(), b.grad / norm
        made.step()
        b1, b2 = (lorarite.decay_of(beta, k) for beta in (0.9, 0.999))
        v = (1 - b2) * g.square().mean() + b2 * v
        m = (1 - b1) * g / v.sqrt() + b1 * m
        torch.testing.assert_close(b.detach(), before - 1e-2 * m / norm)


def test_a_rotation_of_the_basis_loses_no_mass():
    g = draw(4, R, 20)
    V = g @ g.mT
    rotation = torch.linalg.qr(draw(4, R, R)).Q
    assert largest_fall(V, rotation @ V @ rotation.mT).abs().max() < 1e-12
    shrunk = 0.5 * rotation @ V @ rotation.mT
    expected = torch.linalg.eigvalsh(V).amax(-1) / 2
    torch.testing.assert_close(largest_fall(V, shrunk).flatten(), expected)


def test_escaped_mass_slows_the_steps():
    """It is added to the second moment, so at equal states no direction moves further."""
    start, target = problem()
    paths = [
        follow(f"lorarite(escape={on})", start, 30, target=target, lr=3e-2) for on in (False, True)
    ]
    lengths = [(p[1:] - p[:-1]).norm().item() for p in paths]
    assert lengths[1] < lengths[0]


def test_a_skipped_matrix_is_counted_and_logged(caplog):
    made, [(A, B)] = optimizer("lorarite(skip=1)", [(draw(R, IN), draw(OUT, R))])
    before = B.detach().clone()
    with caplog.at_level(logging.WARNING, logger="lorica"):
        for _ in range(12):
            A.grad, B.grad = torch.zeros_like(A), 1e4 * torch.ones_like(B)
            made.step()
    assert torch.equal(B, before) and made.state[B]["skipped"] == 12
    assert [r.getMessage() for r in caplog.records] == [
        f"0, B: the gradient is above the rule's limit, so it has no part in this step ({n} such"
        " steps so far)"
        for n in (1, 10)
    ]
    assert made.state[A]["skipped"] == 0


def test_the_clip_is_over_all_pairs():
    """One large gradient shortens what every pair remembers of this step."""
    start = [(draw(R, IN), draw(OUT, R)) for _ in range(2)]

    def second(clip, size):
        made, pairs = optimizer(f"lorarite(clip={clip})", start)
        for (A, B), by in zip(pairs, (1.0, size), strict=True):
            A.grad, B.grad = by * torch.ones_like(A), by * torch.ones_like(B)
        made.step()
        return made.state[pairs[0][0]]["second"]

    assert torch.equal(second(0, 1.0), second(0, 1e3))
    assert second(0.5, 1e3).norm() < 1e-4 * second(0.5, 1.0).norm()


def test_the_trained_model_does_not_depend_on_the_balance_of_its_factors():
    """A tiny regression: Adam's final loss depends on how the same ΔW was split, RITE's not."""
    start, target = problem(count=1)
    target = [0.1 * t for t in target]

    def final(method, factor):
        given = [(A / factor, B * factor) for A, B in start]
        path = follow(method, given, 150, target=target, lr=1e-2)
        return (path[-1][0] - target[0]).square().mean().item()

    rite = [final("lorarite", f) for f in (0.1, 1.0, 10.0)]
    adam = [final("vectoradamw", f) for f in (0.1, 1.0, 10.0)]
    assert max(rite) == pytest.approx(min(rite), rel=1e-6)
    assert max(adam) > 1.5 * min(adam)
