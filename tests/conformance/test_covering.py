"""Every two words that may stand together do so in one of these recipes, from attach to merge."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from covering import covering, lawful, pairs, spelt
from walk import attach, every, recipe, same, state_bytes

import lorica
from lorica.model.adapters import Adapters
from models import llama, logits, train

STEPS, CUT, PARTS, MOST = 6, 3, 8, 250
TRIPLES = (
    "relora(every=2)+dora+olora", "adalora(deltaT=2)+dora", "balora+dora",
    "cola(every=2)+pissa+rslora", "switchlora(interval=2)+dora+rslora", "relora(every=2)+mora+dora",
    "prilora(every=2)+dora+olora", "rmlora+dora+pissa", "sora+dora+lorarite",
    "xgblora(every=2)+dora+loraplus", "plora(every=2)+dora+riemannian",
)  # fmt: skip
FIXED = frozenset(word for _, word in every())


@functools.cache
def recipes() -> list[frozenset[str]]:
    return covering()


def test_the_recipes_cover_every_lawful_pair():
    held = set().union(*map(pairs, recipes()))
    missing = [p for p in pairs(FIXED) - held if lawful(p)]
    assert not missing and len(recipes()) <= MOST


def model() -> Any:
    return llama(attention_bias=True, mlp_bias=True).double().train()


def begin(method: str) -> tuple[Adapters, torch.optim.Optimizer]:
    made = recipe(method, r=4)
    adapters = attach(model(), made, dtype=torch.float64)
    return adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=2 * STEPS, seed=3)


def lives(method: str, folder: Any) -> None:
    """Attach, train, save and load, go on from the middle, merge."""
    adapters, optimizer = begin(method)
    train(adapters, optimizer, CUT)
    middle = copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))
    train(adapters, optimizer, STEPS - CUT, first=CUT)
    end, said = state_bytes(adapters), logits(adapters.model)
    assert torch.isfinite(said).all()

    resumed, again = begin(method)
    resumed.load_state_dict(middle[0])
    again.load_state_dict(middle[1])
    train(resumed, again, STEPS - CUT, first=CUT)
    assert same(state_bytes(resumed), end), "a resumed run is another one"

    lorica.save(adapters, folder)
    if adapters.layers:
        fresh = model()
        lorica.load(fresh, folder)
        torch.testing.assert_close(logits(fresh), said, rtol=1e-6, atol=1e-6)
    if all(layer.update.delta.weight(layer.store) is not None for _, layer in adapters):
        merged = lorica.merge(adapters.model)
        torch.testing.assert_close(logits(merged), said, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_full_recipe_lives(part, tmp_path):
    for i, words in enumerate(recipes()[part::PARTS]):
        method = "+".join(map(spelt, sorted(words)))
        try:
            lives(method, tmp_path / str(i))
        except Exception as error:
            raise AssertionError(f"`{method}`: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("method", TRIPLES)
def test_a_named_combination_lives(method, tmp_path):
    lives(method, tmp_path / "out")


@functools.cache
def alone() -> list[tuple[str, ...]]:
    """Every lawful pair of words with nothing else beside it."""
    return sorted(tuple(sorted(p)) for p in pairs(FIXED) if lawful(p))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_lawful_pair_lives_by_itself(part, tmp_path):
    """What a larger recipe might hide: there a third word may stand in for what two lack."""
    for i, words in enumerate(alone()[part::PARTS]):
        method = "+".join(map(spelt, words))
        try:
            lives(method, tmp_path / str(i))
        except Exception as error:
            raise AssertionError(f"`{method}`: {type(error).__name__}: {error}") from error
