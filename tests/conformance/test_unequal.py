"""Models of two and three layers, each of another shape: what one layer alone can't show.

A size taken from the wrong side or from the first layer, a state that layers share by mistake, one
draw for all of them: in a model of one layer, or of equal square layers, none of that is visible.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from walk import adapt, allowed, chain, same, state_bytes, wrapping

import lorica
from lorica.interfaces import Trained
from lorica.methods.optional import SharesTensors, StartsFromData
from lorica.model.adapters import Adapters
from lorica.recipe import registry
from models import perturb

SIZES = {"two layers": (12, 10, 18), "three layers": (12, 10, 18, 16)}
METHODS = [
    *wrapping(),
    *registry.names("combine"),
    *(w for w in registry.names("inits") if not issubclass(registry.find(w), StartsFromData)),
]


def inputs(sizes: tuple[int, ...], n: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, sizes[0], generator=generator, dtype=torch.float64)


def begin(method: str, sizes: tuple[int, ...], **fields) -> tuple[nn.Module, Adapters]:
    model = chain(sizes)
    return model, adapt(model, method, **{"r": 4, **fields})


def by_hand(adapters: Adapters, x: Tensor) -> Tensor:
    """The model's output from the effective weights, layer after layer."""
    for i, (_, layer) in enumerate(adapters):
        weight, bias = layer.effective()
        x = (torch.tanh(x) if i else x) @ weight.T + bias
    return x


def gradients(adapters: Adapters, loss: Tensor) -> dict[str, Tensor | None]:
    own: list[Trained] = adapters.trained()
    found = torch.autograd.grad(loss, [t.parameter for t in own], allow_unused=True)
    return {t.name: g for t, g in zip(own, found, strict=True)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_the_model_and_its_gradients_are_those_of_the_effective_weights(method, sizes):
    model, adapters = begin(method, sizes)
    x = inputs(sizes)
    if "weight" not in adapters.recipe.delta.gives:
        pytest.skip("it has no ΔW")
    perturb(adapters, 0.3)
    y, expected = model(x), by_hand(adapters, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    # Along a fixed direction, so that no layer's gradient is the other's scaled.
    one, two = (gradients(adapters, (z * torch.linspace(-1, 2, z.shape[1])).sum())
                for z in (y, expected))  # fmt: skip
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_trains_and_the_state_of_each_is_its_own(method, sizes):
    model, adapters = begin(method, sizes)
    own = [id(t.parameter) for t in adapters.trained()]
    assert len(own) == len(set(own)), "two layers train one parameter"
    start = state_bytes(adapters)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=4)
    x = inputs(sizes)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    end = state_bytes(adapters)
    for name, _ in adapters:
        assert any(not torch.equal(end[n], start[n]) for n in end if n.startswith(f"{name}."))
    again, fresh = begin(method, sizes, seed=1)
    fresh.load_state_dict(end)
    assert same(end, state_bytes(fresh))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    adapted = model(x)
    lorica.merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_each_layer_draws_its_own_start_and_shares_what_is_declared(method):
    """The first two layers have one shape, so equal draws would be equal tensors."""
    _, adapters = begin(method, (12, 12, 12))
    first, second = (layer for _, layer in adapters)
    shares = issubclass(type(adapters.recipe.delta), SharesTensors)
    assert bool([*adapters.shared]) == shares
    for name, t in adapters.shared:
        own = [layer.update.delta.read_shared(name) for layer in (first, second)]
        assert own[0] is own[1], "a copy per layer of what all layers share"
        assert not t.requires_grad
    for (name, one, _), (_, two, _) in zip(first.trained(), second.trained(), strict=True):
        constant = bool((one == one.flatten()[0]).all())
        assert constant == bool((two == two.flatten()[0]).all())
        assert constant or not torch.equal(one, two), f"`{name}` is the same draw in both layers"


def test_methods_that_need_another_are_found_with_it():
    assert all(map(allowed, METHODS))
