"""Bone: block sums, the form that the paper's last version calls MiSS_e."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import chains
import lorica
from models import MODELS, llama, logits, perturb, train
from reference import bone as twin

# (out, in, r): r divides in or doesn't, is in itself, is 1
SHAPES = [(5, 7, 3), (6, 8, 4), (4, 9, 4), (7, 5, 5), (3, 3, 1), (8, 11, 2)]


def layer(method="bone", shape=(5, 7, 3), moved=True, seed=0, **fields):
    torch.manual_seed(seed)
    out, features, r = shape
    model = nn.Sequential(nn.Linear(features, out, dtype=torch.float64))
    adapters = lorica.attach(model, method, r=r, verbose=False, **fields)
    if moved:
        perturb(adapters, 0.7)
    return model, adapters.layers["0"]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_twin(shape):
    model, one = layer(shape=shape)
    delta, x = one.update.delta, torch.randn(4, shape[1], dtype=torch.float64)
    assert delta.D.shape == (shape[2], shape[0])
    expected = twin.forward(x, delta.D)
    torch.testing.assert_close(delta(x, one.store), expected)
    torch.testing.assert_close(one.update(x, one.store), expected)
    torch.testing.assert_close(delta.weight(one.store), twin.weight(delta.D, shape[1]))
    torch.testing.assert_close(model(x), one.base(x) + expected)


def test_layers_train_as_the_twin():
    chains.assert_trains_as("bone", lambda p, W: twin.weight(p["D"], W.shape[1]), lora_alpha=None)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_low_rank_update_with_a_fixed_factor(shape):
    """ΔW = Dᵀ [I … I]: rank at most r, columns with period r."""
    _, one = layer(shape=shape)
    delta, (_, features, r) = one.update.delta, shape
    factors, weight = delta.factors(), delta.weight(one.store).detach()
    assert torch.equal(factors.A, twin.fixed(r, features))
    assert torch.equal(factors.B, delta.D.T)
    torch.testing.assert_close(factors.weight(), weight)
    assert torch.linalg.matrix_rank(weight) <= r
    assert torch.equal(weight[:, r:], weight[:, : features - r])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_gradient_is_the_weights_summed_over_blocks(shape):
    model, one = layer(shape=shape, moved=False)
    x = torch.randn(6, shape[1], dtype=torch.float64)
    y = model(x)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    torch.testing.assert_close(one.update.delta.D.grad, twin.gradient(dy.T @ x, shape[2]))


def test_gradients_pass_gradcheck():
    _, one = layer(shape=(4, 7, 3))
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def forward(x, D):
        return torch.func.functional_call(one.update.delta, {"D": D}, (x, one.store))

    assert torch.autograd.gradcheck(forward, (x, one.update.delta.D))


def test_a_token_id_is_a_one_hot():
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(7, 5, dtype=torch.float64)})
    adapters = lorica.attach(model, "bone", r=3, target_modules=["table"], verbose=False)
    perturb(adapters, 0.7)
    delta, ids = adapters.layers["table"].update.delta, torch.tensor([[0, 3, 6], [5, 1, 2]])
    expected = nn.functional.one_hot(ids, 7).double() @ delta.weight(None).T
    torch.testing.assert_close(delta(ids, None), expected)
    torch.testing.assert_close(model["table"](ids), model["table"].base(ids) + expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_to_the_bit(name):
    model = MODELS[name]()
    before = logits(model)
    adapters = lorica.attach(model, "bone", r=4, verbose=False)
    assert torch.equal(logits(model), before)
    assert adapters.recipe.learning_rate == (2e-5, "bone")
    sizes = {(t.parameter.shape, t.role) for t in adapters.trained() if t.role != "module"}
    assert sizes == {((4, one.out_features), "core") for _, one in adapters}


def test_there_is_no_scale_and_no_start_to_choose():
    with pytest.raises(ValueError, match="`lora_alpha=8` has no effect"):
        lorica.Recipe.parse("bone", lora_alpha=8)
    for word in ("rslora", "constant(s=2.0)"):
        with pytest.raises(ValueError, match="`bone` fills the axis `scale`"):
            lorica.Recipe.parse(f"bone+{word}")
    with pytest.raises(ValueError, match="`pissa` needs `pair`"):
        lorica.Recipe.parse("bone+pissa")
    recipe = lorica.Recipe.parse("bone", r=4)
    assert recipe.init is None and recipe.text() == "bone"


def test_merging_is_exact_and_a_chain_of_restarts_never_leaves_its_subspace():
    """Two links of rank r add up to rank r, where two links of LoRA have rank 2r."""
    from lorica.training.weight_edits import merge_

    ranks = {}
    for method in ("lora", "bone"):
        model, one = layer(method, (9, 8, 2))
        start, x = one.base.weight.detach().clone(), torch.randn(4, 8, dtype=torch.float64)
        init = lorica.Recipe.parse(method).init
        for link in (1, 2):
            before = model(x)
            merge_(one, None, link=link, init=init, generator=torch.Generator().manual_seed(link))
            torch.testing.assert_close(model(x), before)
            with torch.no_grad():
                for p in one.update.delta.parameters():
                    p.add_(torch.randn_like(p))
        ranks[method] = int(torch.linalg.matrix_rank(one.effective()[0].detach() - start))
    assert ranks == {"lora": 6, "bone": 2}


class Widths(TorchDispatchMode):
    """Elements of the largest float32 tensor that is made within."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.dtype is torch.float32:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("method", ["bone", "miss", "miss(mini_r=4)"])
def test_no_wide_copy_of_an_activation_is_made(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 16)).bfloat16()
    one = lorica.attach(model, method, r=4, verbose=False).layers["0"]
    x = torch.randn(500, 33).bfloat16()
    with Widths() as seen:
        one.update.delta(x, one.store).sum().backward()
    assert 0 < seen.largest <= one.update.delta.D.numel()


def test_the_first_product_is_a_sum_and_backward_keeps_only_its_result():
    """N·r·out multiplies where LoRA of the same rank takes N·r·(in + out); kept is (N, r)."""
    flops, kept = {}, {}
    for method in ("bone", "lora"):
        _, one = layer(method, (32, 48, 4))
        x = torch.randn(100, 48, dtype=torch.float64)
        own, sizes = {p.data_ptr() for p in one.update.delta.parameters()}, {}

        def keep(t, own=own, sizes=sizes):
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with FlopCounterMode(display=False) as counted:
                one.update.delta(x, one.store)
        flops[method], kept[method] = counted.get_total_flops() // 2, sum(sizes.values())
    assert flops == {"bone": 100 * 4 * 32, "lora": 100 * 4 * (48 + 32)}
    assert kept["bone"] == 100 * 4 and kept["lora"] >= 100 * (48 + 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_gradient_is_larger_than_loras(seed):
    """A_fix A_fixᵀ = (in/r) I, and Kaiming's A Aᵀ about ⅓ I: the paper's small network, fitted to
    sin 2πx and to be adapted to more, at equal parameters. (Which of the two then ends lower at the
    paper's rate depends on the seed and the activation: nothing is claimed.)"""
    norms = {m: first_gradient(m, r, seed) for m, r in (("lora", 2), ("bone", 4), ("miss", 4))}
    assert norms["bone"] > 2 * norms["lora"] and norms["miss"] > 2 * norms["lora"], norms


def first_gradient(method: str, r: int, seed: int) -> float:
    """Norm over all that trains."""
    torch.manual_seed(seed)
    x = torch.rand(50, 1) * 2 - 1
    first = torch.sin(2 * torch.pi * x)
    second = first + 0.3 * torch.cos(3 * torch.pi * x) + 0.05 * torch.randn(50, 1)
    model = nn.Sequential(
        nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - first).square().mean().backward()
        optimizer.step()
    fields = {"lora_alpha": r} if method == "lora" else {}  # s = 1, as the others have
    adapters = lorica.attach(model, method, r=r, target_modules=["2"], verbose=False, **fields)
    own = [t.parameter for t in adapters.trained()]
    assert sum(p.numel() for p in own) == 256
    (model(x) - second).square().mean().backward()
    return sum(float(p.grad.square().sum()) for p in own) ** 0.5


def test_training_lowers_the_loss():
    model = llama()
    adapters = lorica.attach(model, "bone", r=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=2e-3)
    train(adapters, optimizer, 1)
    losses = train(adapters, optimizer, 12, first=0)
    again = train(adapters, optimizer, 1, first=0)
    assert again[0] < losses[0]
