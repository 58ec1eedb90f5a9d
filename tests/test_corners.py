"""Corners: where autocast, half precision, shared weights, empty inputs or a second derivative meet
a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica.recipe import registry
from lorica.tensors.dtensor_ops import seeded
from lorica.training.weight_edits import merge_
from models import batch, llama, perturb

BF16 = torch.bfloat16


def one(method: str, *, bias: bool = False, dtype: torch.dtype = torch.float64, **fields: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, bias=bias, dtype=dtype))
    adapters = lorica.attach(model, method, **{"r": 3, "verbose": False, **fields})
    perturb(adapters)
    return adapters


# -- a second derivative ---------------------------------------------------------------------------


def second(adapters) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 12).requires_grad_()
    inputs = [x, *(t.parameter for t in adapters.trained())]
    first = torch.autograd.grad((adapters.model(x) ** 2).sum(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum((g**2).sum() for g in first), inputs))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "dora+pissa", "lora+materialised(keep=True)"])
def test_a_second_derivative_is_the_references(method, bias):
    plain = method.replace("+materialised(keep=True)", "") + "+reference"
    pairs = zip(second(one(method, bias=bias)), second(one(plain, bias=bias)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_what_was_kept_is_no_constant_in_a_second_derivative():
    with pytest.raises(RuntimeError, match="`.reference` to the method to differentiate twice"):
        second(one("lorafa", bias=False))


# -- half precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_a_row_of_zeros_has_finite_gradients(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, bias=False, dtype=dtype))
    with torch.no_grad():
        model[0].weight[2] = 0
    adapters = lorica.attach(model, "dora", r=3, dtype=dtype, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, eps=1e-4)
    for _ in range(3):
        model(torch.randn(5, 12, dtype=dtype)).float().square().sum().backward()
        assert all(t.parameter.grad.isfinite().all() for t in adapters.trained())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("base", [torch.float32, BF16])
def test_magnitudes_in_half_precision_start_exact(base):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=False, dtype=base))
    x = torch.randn(6, 48, dtype=base)
    before = model(x)
    lorica.attach(model, "dora", r=3, dtype=BF16, verbose=False)
    torch.testing.assert_close(model(x), before, rtol=0, atol=2e-6 if base != BF16 else 0)


def test_an_embeddings_magnitude_keeps_the_tables_dtype():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 4)).to(BF16)
    lorica.attach(
        model, "dora(dropout='authors')", r=2, lora_dropout=0.5, target_modules=["0"], verbose=False
    )
    assert model.train()(torch.arange(7)).dtype == BF16


class Wide(nn.Module):
    """Takes and gives more than one tensor, and has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.map = nn.Linear(6, 6)

    def forward(self, pair, *, shift):
        a, b = pair
        return self.norm(self.map(a)) + shift, {"b": self.map(b)}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Wide(), nn.Linear(6, 6)

    def forward(self, x):
        y, more = self.inner((x, x), shift=x)
        assert y.dtype == more["b"].dtype == x.dtype
        return self.out(y)


@pytest.mark.parametrize("training", [True, False])
def test_a_saved_module_takes_what_it_took(training):
    torch.manual_seed(0)
    model = Around().to(BF16).train(training)
    x = torch.randn(5, 6).to(BF16)
    adapters = lorica.attach(
        model, "lora", r=2, target_modules=["out"], modules_to_save=["inner"], verbose=False
    )
    y = model(x)
    y.float().sum().backward()
    assert y.dtype == BF16
    assert all(t.parameter.grad is not None for t in adapters.trained())
    merged = lorica.merge(model)
    assert {b.dtype for b in merged.buffers() if b.is_floating_point()} == {BF16}
    assert merged.eval()(x).dtype == BF16


def test_a_saved_module_without_parameters_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    with pytest.raises(ValueError, match="matches 1, where no parameter is that could train"):
        lorica.attach(model, "lora", r=2, modules_to_save=["1"], verbose=False)


# -- autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora+olora", "miss", "melora(n=3)", "bat", "tt"])
def test_merging_under_autocast_merges_in_full(method):
    ends = []
    for autocast in (False, True):
        adapters = one(method, dtype=torch.float32)
        with torch.autocast("cpu", BF16, enabled=autocast):
            ends.append(lorica.merge(adapters.model)[0].weight)
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", ["relora(every=2)", "switchlora(interval=2)", "plora(every=2)"])
def test_events_under_autocast_write_in_full(method):
    ends = []
    for autocast in (False, True):
        adapters = one(method, dtype=torch.float32)
        optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=6)
        for step in range(6):
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
            adapters.model(x).square().sum().backward()
            with torch.autocast("cpu", BF16, enabled=autocast):
                optimizer.step()
            optimizer.zero_grad()
        ends.append(adapters.fingerprint())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("method", ["lora", "dora", "lora+reference"])
def test_autocast_leaves_float64_alone(method):
    adapters = one(method)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = adapters.model(x)
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(adapters.model(x), expected)


# -- ranks that are gone ---------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["base", "factors"])
@pytest.mark.parametrize("start", ["olora", "pissa", "init.svd"])
def test_a_restart_with_masked_ranks_keeps_the_function(accumulate, start):
    adapters = one(f"svd+{start}+cola(every=2, accumulate={accumulate!r})", r=4)
    layer = adapters.layers["0"]
    with torch.no_grad():
        layer.update.delta.mask[1] = 0
    x = torch.randn(5, 12, dtype=torch.float64)
    before = adapters.model(x)
    merge_(layer, None, link=1, init=adapters.recipe.init, generator=seeded("x"),
           accumulate=accumulate)  # fmt: skip
    torch.testing.assert_close(adapters.model(x), before, rtol=0, atol=1e-12)


# -- shared weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "galore"])
@pytest.mark.parametrize(
    ("fields", "role"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "weight"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "module"),
    ],
)
def test_a_tied_weight_trains_under_either_name(method, fields, role):
    ranked = {"r": 4} if method == "galore" else {}
    adapters = lorica.attach(
        llama(tie_word_embeddings=True), method, verbose=False, **fields, **ranked
    )
    tied = adapters.model.lm_head.weight
    assert tied is adapters.model.model.embed_tokens.weight
    assert [t.role for t in adapters.trained() if t.parameter is tied] == [role]
    before = tied.detach().clone()
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    adapters.model(**batch(adapters.model)).loss.backward()
    optimizer.step()
    assert not torch.equal(tied, before)


# -- nothing, and less than nothing ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["bat", "dora+bat", "bone", "miss", "tt", "lora"])
def test_no_tokens(method):
    adapters = one(method)
    y = adapters.model(torch.zeros(0, 12, dtype=torch.float64, requires_grad=True))
    assert y.shape == (0, 9)
    y.sum().backward()


def test_bat_keeps_no_copy_of_the_base_under_autocast():
    adapters = one("bat", dtype=torch.float32)
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 12).to(BF16)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", BF16),
    ):
        adapters.model(x)
    assert (9, 12) not in {tuple(t.shape) for t in kept if t.dtype == BF16}


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}])
def test_a_rate_that_is_none(rates):
    with pytest.raises(ValueError, match="`lr=.*: a learning rate is a number from 0 to 1e18"):
        lorica.optimizer(one("lora"), **rates)


def test_a_modules_rate_that_is_none():
    adapters = lorica.attach(llama(), "lora", modules_to_save=["lm_head"], verbose=False)
    with pytest.raises(ValueError, match="`modules_lr=-1`"):
        lorica.optimizer(adapters, 1e-3, modules_lr=-1)


@pytest.mark.parametrize("combine", registry.names("combine"))
@pytest.mark.parametrize("kernel", [None, *registry.names("kernels")])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_may_change_a_layers_output_in_place(combine, kernel, bias):
    """Llama 4 scales its queries so, Gemma 3n its gates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=bias)).double()
    method = combine if kernel is None else f"{combine}+{kernel}"
    adapters = lorica.attach(model, method, r=2, verbose=False)
    perturb(adapters)
    x = torch.randn(9, 6, dtype=torch.float64)
    parameters = [t.parameter for t in adapters.trained()]
    found = []
    for change in (lambda y: y.mul_(3).add_(1), lambda y: y * 3 + 1):
        found.append(torch.autograd.grad(change(model(x)).square().sum(), parameters))
    torch.testing.assert_close(*found)
