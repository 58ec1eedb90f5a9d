"""MELoRA, arXiv 2402.17263: mini adapters side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chains
import lorica
from capacity import best_of_rank, recall, targets
from lorica import Recipe
from models import llama, logits, perturb, train
from reference import lora as lora_twin
from reference import melora as twin

SHAPES = [(12, 8), (8, 12), (7, 11), (11, 7), (13, 10), (9, 9)]  # (in, out)


def one(shape: tuple[int, int], n: int, r: int = 2, method: str = "", **fields: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, dtype=torch.float64))
    adapters = lorica.attach(model, f"melora(n={n}){method}", r=r, verbose=False, **fields)
    perturb(adapters, 0.5)
    return adapters.layers["0"].update.delta, adapters


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_three_forwards_agree_with_the_twin(shape, n):
    """Mini by mini, as one block-diagonal matrix, as the factors of a plain LoRA."""
    delta, _ = one(shape, n, r=1)
    A, B = delta.A.detach(), delta.B.detach()
    dense = twin.delta(A, B, n, delta.scale)
    torch.testing.assert_close(delta.weight(None).detach(), dense)
    factors = delta.factors()
    for ours, theirs in zip((factors.A, factors.B), twin.portable(A, B, n), strict=True):
        assert torch.equal(ours.detach(), theirs)
    torch.testing.assert_close(factors.weight().detach(), dense)
    for lead in ((), (3,), (2, 5), (0,)):
        x = torch.randn(*lead, shape[0], dtype=torch.float64)
        y = delta(x, None).detach()
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-12, atol=1e-12)
        flat = twin.forward(x.reshape(-1, shape[0]), A, B, n, delta.scale)
        torch.testing.assert_close(y.reshape(flat.shape), flat)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_gradients_equal_the_twin(n):
    delta, _ = one((13, 11), n)
    x, dy = torch.randn(4, 13, dtype=torch.float64), torch.randn(4, 11, dtype=torch.float64)
    expected = twin.gradients(dy.T @ x, delta.A.detach(), delta.B.detach(), n, delta.scale)
    delta(x, None).backward(dy)
    torch.testing.assert_close((delta.A.grad, delta.B.grad), expected)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(delta, {"A": A, "B": B}, (x, None))

    leaves = (x, delta.A.detach().clone(), delta.B.detach().clone())
    assert torch.autograd.gradcheck(product, tuple(t.requires_grad_() for t in leaves))


@pytest.mark.parametrize("n", [2, 4])
def test_training_is_the_twin(n):
    chains.assert_trains_as(
        f"melora(n={n})", lambda p, W: twin.delta(p["A"], p["B"], n, 3.0), r=1, lora_alpha=3
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_n_times_the_rank_at_the_same_parameters(n):
    for shape in ((24, 24), (26, 19)):
        delta, adapters = one(shape, n, r=4)
        assert adapters.summary.trainable == 4 * sum(shape)
        assert torch.linalg.matrix_rank(delta.weight(None)) == n * 4
        assert delta.factors().A.shape == (n * 4, shape[0])


def test_no_input_reaches_an_output_of_another_block():
    delta, _ = one((13, 10), 3)
    W = delta.weight(None)
    inside = torch.zeros(10, 13, dtype=torch.bool)
    for rows, columns in zip(twin.cut(10, 3), twin.cut(13, 3), strict=True):
        inside[rows, columns] = True
    assert torch.equal(W != 0, inside)


def test_one_mini_is_lora_bit_for_bit():
    runs = []
    for method in ("melora(n=1)+reference", "lora+reference"):
        model = llama(num_hidden_layers=1)
        adapters = lorica.attach(model, method, r=4, seed=3, verbose=False)
        losses = train(adapters, lorica.optimizer(adapters, lr=1e-2), 6)
        runs.append((losses, adapters.state_dict(), logits(model)))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][2], runs[1][2])
    assert all(torch.equal(v, runs[1][1][n]) for n, v in runs[0][1].items())
    delta, _ = one((9, 8), 1)
    x = torch.randn(5, 9, dtype=torch.float64)
    expected = lora_twin.forward(x, torch.zeros(8, 9), None, delta.A, delta.B, delta.scale)
    torch.testing.assert_close(delta(x, None), expected)


def test_each_mini_starts_at_the_size_of_its_own_inputs():
    delta, _ = one((4098, 64), 4, r=8)
    delta.restart(0, torch.Generator().manual_seed(1))
    assert not delta.B.any()
    for columns in twin.cut(4098, 4):
        part, width = delta.A[:, columns].detach(), columns.stop - columns.start
        assert float(part.abs().max()) == pytest.approx(width**-0.5, rel=1e-3)
        assert float(part.std()) == pytest.approx((3 * width) ** -0.5, rel=0.02)


# -- claims ----------------------------------------------------------------------------------------


def test_the_capacity_table():
    """More rank wins on a flat spectrum and loses on a decaying one."""
    expected = {4: (0.145, 0.156, 0.234), 8: (0.113, 0.112, 0.127)}
    for column, (name, target) in enumerate(targets().items()):
        whole = float(target.square().sum())
        part = {}
        for n in expected:
            blocks = [target[s, s] for s in twin.cut(64, n)]
            part[n] = sum(best_of_rank(block, 4) for block in blocks) / whole
            assert part[n] == pytest.approx(expected[n][column], abs=0.025), (n, name)
        lora = best_of_rank(target, 4) / whole
        assert (part[4] > 2 * lora) == (name == "flat")
        assert (part[4] < lora / 3) == (name == "decaying")


def test_the_tables_number_is_what_training_reaches():
    target = targets()["flat"]
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.float64))
    nn.init.zeros_(model[0].weight)
    adapters = lorica.attach(model, "melora(n=4)", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=0.02)
    layer, best = adapters.layers["0"], sum(best_of_rank(target[s, s], 4) for s in twin.cut(64, 4))
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        (layer.effective()[0] - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    missed = (layer.effective()[0].detach() - target).square().sum()
    assert float(64 - missed) == pytest.approx(best, rel=0.01)


def test_more_rank_is_not_more_memory():
    """n = 4, r = 2 in one linear layer of 64: 64 pairs are no trouble, 128 are LoRA's alone."""
    assert recall("melora(n=4)", 64) > 0.95 and recall("lora", 64) > 0.95
    assert recall("lora", 128) > recall("melora(n=4)", 128) + 0.25


# -- company ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["melora(n=4)", "melora+dora", "melora+rslora"])
def test_peft_computes_the_same_from_its_files(method, tmp_path):
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(18, 19), nn.Tanh(), nn.Linear(19, 16))
    base, again, x = copy.deepcopy(model), copy.deepcopy(model), torch.randn(5, 18)
    adapters = lorica.attach(model, method, r=4, verbose=False)
    perturb(adapters, 0.3)
    expected = model(x)
    assert not torch.allclose(expected, base(x), atol=0.1)
    out = lorica.save(adapters, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(base, out)
    assert theirs.peft_config["default"].r == 4 * adapters.recipe.delta.n
    torch.testing.assert_close(theirs(x), expected)
    loaded = lorica.load(again, out)
    assert loaded.fingerprint() == adapters.fingerprint() and torch.equal(again(x), expected)
    lorica.merge(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("accumulate", ["factors", "base"])
def test_links_of_a_chain_are_put_away_whole(accumulate):
    adapters, optimizer = chains.one(f"melora+cola(every=4, accumulate='{accumulate}')", steps=12)
    layer = adapters.layers["0"]
    W = layer.store.weight().detach().clone()
    for u in range(4):
        before = layer.effective()[0].detach()
        chains.move(adapters, optimizer, u)
    assert not layer.update.delta.B.any() and layer.update.delta.A.any()
    assert not torch.allclose(before, W)
    total = chains.effective(adapters) - W
    assert chains.rank(total) == 4 and (layer.update.frozen_factors is None) == (
        accumulate == "base"
    )
    for u in range(4, 12):
        chains.move(adapters, optimizer, u)
    assert chains.rank(chains.effective(adapters) - W) == 5  # min(in, out)


def test_a_pair_it_is_not():
    """Starts and rules speak of the product B·A, of which ΔW has the diagonal blocks alone."""
    for other in ("pissa", "olora", "lorarite", "riemannian", "raclora"):
        with pytest.raises(ValueError, match=f"`{other}` cannot be combined with `melora`.*`pair`"):
            Recipe.parse(f"melora+{other}")
    delta, _ = one((12, 12), 2)
    product = delta.scale * delta.B @ delta.A
    assert not torch.allclose(delta.weight(None), product)


def test_a_share_below_the_rank_is_refused():
    model = nn.Sequential(nn.Linear(16, 12))
    layer = model[0]
    with pytest.raises(ValueError, match=r"'0' \(12 x 16\) 3 features, below its rank `r=4`") as e:
        lorica.attach(model, "melora(n=4)", r=4, verbose=False)
    assert "`melora(n=3)` fits" in str(e.value) and model[0] is layer
    lorica.attach(model, "melora(n=3)", r=4, verbose=False)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "2"])
def test_the_number_of_minis_is_checked(n):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Recipe.parse(f"melora(n={n!r})")
