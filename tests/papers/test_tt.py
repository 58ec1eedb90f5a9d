"""TT-LoRA, arXiv 2408.01008: the update as a tensor train."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import chains
import lorica
from lorica import Recipe
from lorica.methods.deltas.tt import trains
from models import llama, logits, perturb, train
from reference import adamw
from reference import tt as twin

# shape -> how many of its modes are the inputs'
SHAPES = {(3, 2, 2, 5): 2, (2, 3, 2, 2, 3): 3, (7, 4, 2): 1, (4, 3, 11): 2, (5, 7): 1}


def one(shape: tuple[int, ...], p: int, r: int = 2, start: str = "direct", **fields: Any):
    torch.manual_seed(0)
    sizes = math.prod(shape[:p]), math.prod(shape[p:])
    model = nn.Sequential(nn.Linear(*sizes, dtype=torch.float64))
    method = f"tt(shape={list(shape)}, start='{start}')"
    adapters = lorica.attach(model, method, r=r, verbose=False, **fields)
    return adapters.layers["0"].update.delta, adapters


def random(shape: tuple[int, ...], p: int, r: int = 2, start: str = "zero"):
    """The same with cores of ordinary size, so that a wrong term shows."""
    delta, adapters = one(shape, p, r, start)
    perturb(adapters, 0.7)
    return delta, [c.detach() for c in delta.cores]


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "p"), SHAPES.items())
def test_the_matrix_and_both_orders_are_the_twin(shape, p):
    delta, cores = random(shape, p)
    T = twin.matrix(cores, p)
    torch.testing.assert_close(delta.weight(None).detach(), 16 * T)
    A, B = trains.factors(cores, p)
    torch.testing.assert_close(B @ A, T)
    x = torch.randn(6, T.shape[1], dtype=torch.float64)
    torch.testing.assert_close(twin.contraction(x, cores, p), x @ T.T)
    torch.testing.assert_close(trains.through(x, cores, p), x @ T.T)
    for few in (0, math.inf):  # A and B, the cores
        delta.few = few
        for lead in ((6,), (2, 3)):
            y = delta(x.view(*lead, -1), None).detach()
            torch.testing.assert_close(y.flatten(0, -2), 16 * x @ T.T)
        assert delta(x[:0], None).shape == (0, T.shape[0])
        torch.testing.assert_close(delta(x[0], None).detach(), 16 * T @ x[0])


@pytest.mark.parametrize(("shape", "q"), SHAPES.items())
def test_leading_outputs_are_the_authors_earlier_code(shape, q):
    torch.manual_seed(0)
    out, features = math.prod(shape[:q]), math.prod(shape[q:])
    model = nn.Sequential(nn.Linear(features, out, dtype=torch.float64))
    text = f"tt(shape={list(shape)}, start='direct', leading='outputs')"
    adapters = lorica.attach(model, text, r=2, verbose=False)
    delta = adapters.layers["0"].update.delta
    first = twin.reshaped([c.detach() for c in delta.cores], q)
    perturb(adapters, 0.7)
    T = twin.reshaped([c.detach() for c in delta.cores], q)
    torch.testing.assert_close(delta.weight(None).detach(), 16 * (T - first))
    x = torch.randn(6, features, dtype=torch.float64)
    for few in (0, math.inf):  # A and B, the cores
        delta.few = few
        torch.testing.assert_close(delta(x, None).detach(), 16 * x @ (T - first).T)
    if q > 1:  # the leading digits are in another order
        other = twin.matrix([c.detach() for c in delta.cores], q)
        assert (other.T - T).abs().max() > 0.1


def test_leading_outputs_choose_their_shape_and_are_saved(tmp_path):
    base = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6))
    model, x = copy.deepcopy(base), torch.randn(3, 12)
    adapters = lorica.attach(model, "tt(leading=outputs)", r=2, verbose=False)
    perturb(adapters, 0.7)
    wanted = model(x)
    lorica.load(base, lorica.save(adapters, tmp_path / "out"))
    assert torch.equal(base(x), wanted)
    torch.testing.assert_close(lorica.merge(model)(x), wanted, rtol=1e-4, atol=1e-5)
    text = "tt(leading=outputs, shape=[4, 3, 10])"
    with pytest.raises(ValueError, match="leading sizes must multiply to 10 and the others to 12"):
        lorica.attach(lorica.detach(base), text, r=2, verbose=False)


@pytest.mark.parametrize("few", [0, math.inf])
@pytest.mark.parametrize("start", ["direct", "zero"])
def test_gradcheck(start, few):
    delta, _ = random((3, 2, 2, 5), 2, start=start)
    delta.few = few
    names = [n for n, q in delta.named_parameters() if q.requires_grad]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, *cores: Tensor) -> Tensor:
        return torch.func.functional_call(delta, dict(zip(names, cores, strict=True)), (x, None))

    assert torch.autograd.gradcheck(product, (x, *delta.cores))


@pytest.mark.parametrize(
    ("method", "sizes"), [("tt(shape=[5, 3, 2])", ((5, 6), (5, 6))), ("tt", chains.SIZES)]
)
def test_training_is_the_twin(method, sizes):
    """Adam on the cores of α·(T − T₀) of several layers, gradients from the entries of T."""
    adapters, optimizer = chains.several(method, sizes, r=2, lora_alpha=3)
    weights = [layer.store.weight().detach() for _, layer in adapters]
    deltas = [layer.update.delta for _, layer in adapters]
    cores = [[c.detach().clone() for c in delta.cores] for delta in deltas]
    first = [twin.matrix(c, d.inputs) for c, d in zip(cores, deltas, strict=True)]
    states = [[{} for _ in own] for own in cores]
    for u in range(8):
        for i, (W, delta) in enumerate(zip(weights, deltas, strict=True)):
            leaves = [c.clone().requires_grad_() for c in cores[i]]
            effective = W + 3 * (twin.matrix(leaves, delta.inputs) - first[i])
            G = chains.gradient(effective.detach(), u)[2]
            grads = torch.autograd.grad(effective, leaves, G)
            each = zip(cores[i], grads, states[i], strict=True)
            cores[i] = [adamw.step(c, g, state, lr=0.02) for c, g, state in each]
        chains.move(adapters, optimizer, u)
        for delta, own in zip(deltas, cores, strict=True):
            for ours, theirs in zip(delta.cores, own, strict=True):
                torch.testing.assert_close(ours.detach(), theirs, rtol=1e-7, atol=1e-10)


def test_two_cores_are_lora():
    """G_1 = Aᵀ and G_2 = Bᵀ."""
    delta, cores = random((9, 7), 1, r=3)
    A, B = cores[0][0].T, cores[1][..., 0].T
    torch.testing.assert_close(delta.weight(None).detach(), 16 * B @ A)


def test_a_train_of_full_rank_is_any_matrix():
    for shape, p in SHAPES.items():
        T = torch.randn(math.prod(shape[p:]), math.prod(shape[:p]), dtype=torch.float64)
        r = min(T.shape)
        delta, _ = one(shape, p, r, "zero")
        for core, value in zip(delta.cores, twin.decompose(T, shape, p, r), strict=True):
            core.data.copy_(value)
        torch.testing.assert_close(delta.weight(None).detach(), 16 * T)


@pytest.mark.parametrize(("start", "times"), [("zero", 1), ("direct", 2)])
def test_its_rank_is_that_of_the_bond(start, times):
    delta, _ = random((6, 4, 3, 8), 2, r=5, start=start)
    assert torch.linalg.matrix_rank(delta.weight(None)) == times * 5
    assert delta.factors().A.shape == (times * 5, 24)


# -- shapes ----------------------------------------------------------------------------------------


def trainable(out: int, features: int, r: int, shape: list[int] | None = None) -> int:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(features, out, bias=False))
    method = "tt" if shape is None else f"tt(shape={shape})"
    return lorica.attach(model, method, r=r, verbose=False).summary.trainable


def test_the_published_parameter_counts():
    """Llama-3.2-1B at r = 5, q and v of 16 layers: 33,920."""
    q, v = [16, 8, 4, 4, 4, 4, 8, 16], [16, 16, 4, 2, 2, 16, 16]
    assert trainable(2048, 2048, 5, q) == twin.count(q, 5) == 960
    assert trainable(512, 2048, 5, v) == twin.count(v, 5) == 1160
    assert 16 * (960 + 1160) == 33_920
    assert trainable(2048, 2048, 5) < 960 and trainable(512, 2048, 5) < 1160, "fewer, left out"


@pytest.mark.parametrize("r", [1, 2, 5, 16])
def test_a_shape_left_out_is_the_one_with_the_fewest_parameters(r):
    for size in (*range(1, 41), 96, 128, 210):
        best = min(c[0] * r + sum(c[1:]) * r * r for c in twin.choices(size))
        modes = trains.modes(size, r)
        assert math.prod(modes) == size and modes == sorted(modes, reverse=True)
        assert modes[0] * r + sum(modes[1:]) * r * r == best
    for out, features in ((1, 1), (1, 6), (31, 17), (13, 1024)):  # exact, primes too
        assert trainable(out, features, 1) == sum(trains.modes(out, 1) + trains.modes(features, 1))


def test_a_shape_that_does_not_fit_is_refused():
    """[64, 16, 9, 64] for 768 x 768, from the authors' search, has no bond between in and out."""
    for shape in ([64, 16, 9, 64], [16, 16]):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(768, 768))
        with pytest.raises(ValueError, match=r"does not fit '0' \(768 x 768\).*Leave `shape` out"):
            lorica.attach(model, f"tt(shape={shape})", verbose=False)
    for argument in ("shape=[]", "shape=[4]", "shape=7", "shape='4'", "shape=[4, 2.0]",
                     "shape=[4, 0]", "shape=[True, 4]", f"shape={[2] * 65}"):  # fmt: skip
        with pytest.raises(ValueError, match="2 to 64 whole numbers"):
            Recipe.parse(f"tt({argument})")
    with pytest.raises(ValueError, match="allowed: 'direct', 'zero'"):
        Recipe.parse("tt(start='random')")


def test_a_shape_is_written_and_read():
    recipe = Recipe.parse("tt(shape=[4, 2, 4, 2])+dora")
    assert recipe.delta.shape == (4, 2, 4, 2)
    assert Recipe.parse(recipe.text()) == recipe == Recipe.from_dict(recipe.to_dict())
    assert Recipe.parse({"tt": {"shape": [4, 2, 4, 2]}, "dora": {}}) == recipe


# -- the order -------------------------------------------------------------------------------------


def multiplies(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("shape", "p"), [((16, 8, 4, 4, 4, 4, 8, 16), 4), ((16, 16, 4, 8, 16), 3)])
def test_the_order_with_fewer_multiplies_is_taken(shape, p):
    """Counted as torch counts them; few tokens go through the cores, many meet A and B."""
    delta, _ = one(shape, p, r=5, start="zero")
    cores, features = list(delta.cores), math.prod(shape[:p])
    once, each, way = trains.multiplies(cores, p)
    assert multiplies(lambda: trains.factors(cores, p)) == once
    taken = set()
    for tokens in (1, 2, 4, 8, 64, int(delta.few), int(delta.few) + 1):
        x = torch.randn(tokens, features, dtype=torch.float64)
        through = multiplies(lambda x=x: trains.through(x, cores, p))
        assert through == tokens * way
        own = multiplies(lambda x=x: delta(x, None))
        assert own == min(through, once + tokens * each)
        taken.add(own == through)
    assert taken == {True, False} and 1 < delta.few < 20


# -- the start -------------------------------------------------------------------------------------


def test_the_start_has_the_size_of_the_paper():
    """α·‖T‖ on 2048 x 2048 at r = 5 and α = 16: 0.063 measured, 16·5^(−7/2) = 0.057 predicted."""
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    method = "tt(shape=[16, 8, 4, 4, 4, 4, 8, 16])"
    delta = lorica.attach(model, method, verbose=False).layers["0"].update.delta
    assert (delta.site.r, delta.scale) == (5, 16)
    sizes = []
    for seed in range(20):
        delta.restart(seed, torch.Generator().manual_seed(seed))
        assert all(float(core.detach().norm()) == pytest.approx(1) for core in delta.cores)
        A, B = trains.factors([c.detach() for c in delta.cores], delta.inputs)
        sizes.append(16 * float(((B.T @ B) * (A @ A.T)).sum().sqrt()))
    assert sum(sizes) / 20 == pytest.approx(16 * 5**-3.5, rel=0.15)


@pytest.mark.parametrize("start", ["direct", "zero"])
def test_the_function_is_kept_and_every_layer_differs(start):
    model = llama(num_hidden_layers=2)
    before = logits(model)
    adapters = lorica.attach(model, f"tt(start='{start}')", r=4, verbose=False)
    assert torch.equal(logits(model), before), "to the last bit: no rounding in T − T₀"
    first = {n: layer.update.delta.cores[0].detach() for n, layer in adapters}
    q = [t for n, t in first.items() if n.endswith("q_proj")]
    assert not torch.equal(*q), "the authors seed every layer alike"
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    moving = [[bool(c.grad.any()) for c in layer.update.delta.cores] for _, layer in adapters]
    assert all(
        all(m) if start == "direct" else m == [*[False] * (len(m) - 1), True] for m in moving
    )


def test_the_anchor_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 16))
    base, again, x = copy.deepcopy(model), copy.deepcopy(model), torch.randn(5, 24)
    adapters = lorica.attach(model, "tt+dora", r=3, verbose=False)
    perturb(adapters, 0.4)
    expected = model(x)
    assert not torch.allclose(expected, base(x), atol=0.1)
    out = lorica.save(adapters, tmp_path / "out")
    loaded = lorica.load(again, out)
    assert loaded.fingerprint() == adapters.fingerprint() and torch.equal(again(x), expected)
    peft: Any = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(base, out)
    assert theirs.peft_config["default"].r == 6, "a plain LoRA of rank 2r"
    torch.testing.assert_close(theirs(x), expected)
    lorica.merge(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("start", ["direct", "zero"])
def test_a_chain_of_trains(start):
    method = f"tt(start='{start}')+cola(every=4)"
    adapters, optimizer = chains.one(method, steps=12, r=1, lora_alpha=None, lr=0.05)
    layer = adapters.layers["0"]
    W, seen = layer.store.weight().detach().clone(), []
    for u in range(12):
        if u % 4 == 0:
            seen.append(layer.update.delta.cores[0].detach().clone())
            assert not layer.update.delta.weight(None).any()
        chains.move(adapters, optimizer, u)
    assert torch.equal(layer.store.weight(), W), "carried, in the base nothing"
    assert chains.rank(layer.update.frozen_factors.weight()) == (4 if start == "direct" else 2)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# -- claims ----------------------------------------------------------------------------------------


def fit(method: str, target: Tensor, r: int, lr: float, steps: int = 300) -> tuple[float, int]:
    """(‖ΔW − target‖²/‖target‖² after training on it with Adam, parameters)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    nn.init.zeros_(model[0].weight)
    adapters = lorica.attach(model, method, r=r, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=lr)
    layer, loss = adapters.layers["0"], torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = (layer.effective()[0] - target).square().sum() / target.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), adapters.summary.trainable


def test_a_planted_train_is_found_and_a_general_matrix_is_not():
    """With fewer parameters than LoRA of rank 1 on what is a train; worse than LoRA of the same
    rank on what is not."""
    torch.manual_seed(2)
    shape, p = (8, 8, 4, 4, 8, 8), 3
    A, B = trains.factors([torch.randn(s) for s in trains.ranks(shape, 4)], p)
    planted = B @ A / (B @ A).norm() * 16
    general = torch.randn(256, 4) @ torch.randn(4, 256)
    general *= 16 / general.norm()
    train_fit, few = fit(f"tt(shape={list(shape)})", planted, 4, 0.02)
    lora_fit, many = fit("lora", planted, 1, 0.05)
    assert (few, many) == (448, 512)
    assert train_fit < 0.1 < 0.4 < lora_fit
    assert fit(f"tt(shape={list(shape)})", general, 4, 0.02)[0] > 0.5
    assert fit("lora", general, 4, 0.05)[0] < 0.01


def test_it_trains_on_an_embedding():
    targets = {"target_modules": ["embed_tokens", "q_proj"]}
    adapters = lorica.attach(llama(num_hidden_layers=1), "tt", r=3, verbose=False, **targets)
    losses = [train(adapters, lorica.optimizer(adapters, lr=5e-3), 6)]
    layer = adapters.layers["model.embed_tokens"]
    ids = torch.arange(61)
    with torch.no_grad():
        own = layer.update.delta(ids, layer.store)
        torch.testing.assert_close(own, layer.update.delta.weight(None).T)
    assert own.abs().max() > 1e-3 and all(math.isfinite(v) for v in losses[0])


def test_alpha_multiplies_as_it_is():
    for r in (1, 4):
        delta, _ = one((3, 2, 2, 5), 2, r, lora_alpha=7)
        assert delta.scale == 7
    assert Recipe.parse("tt").lora_alpha == 16 and Recipe.parse("tt").learning_rate == (5e-3, "tt")
    with pytest.raises(ValueError, match="leave one of the two out"):
        Recipe.parse("tt+rslora")
