"""Every distribution of ranks, found by walking the room."""

from __future__ import annotations

import pytest
from walk import adapt

from lorica import Recipe
from lorica.recipe import registry
from models import llama

RANKS = registry.names("ranks")


@pytest.mark.parametrize("word", RANKS)
def test_every_layer_gets_a_rank_that_attach_uses(word):
    adapters = adapt(llama(), word, r=4)
    names = list(adapters.layers)
    given = adapters.recipe.rank.assign(names, adapters.recipe)
    assert list(given) == names
    for name, layer in adapters:
        r, alpha = given[name]
        assert isinstance(r, int) and r >= 1
        assert layer.site.r == r
        assert layer.site.scale == adapters.recipe.scale.factor(alpha, r)
        assert layer.update.delta.pair().A.shape[0] == r


@pytest.mark.parametrize("word", RANKS)
def test_the_assignment_is_a_function_of_its_arguments(word):
    recipe = Recipe.parse(word, r=4)
    names = [f"layers.{i}.{n}" for i in range(3) for n in ("q", "v")]
    assert recipe.rank.assign(names, recipe) == recipe.rank.assign(list(names), recipe)


@pytest.mark.parametrize("word", RANKS)
def test_patterns_are_read_or_refused(word):
    rank = registry.find(word)
    if not rank.reads_patterns:
        with pytest.raises(ValueError, match=f"no effect with `{word}`"):
            Recipe.parse(word, rank_pattern={"q_proj": 2})
        return
    adapters = adapt(
        llama(), word, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 2}
    )
    for name, layer in adapters:
        assert layer.site.r == (2 if name.endswith("q_proj") else 4)
        assert layer.site.scale == (0.5 if name.endswith("v_proj") else 8 / layer.site.r)
