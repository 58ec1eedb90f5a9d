"""Every scale, found by walking the room."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from walk import adapt, linear, only

from lorica import Recipe
from lorica.recipe import registry

SCALES = registry.names("scales")
RANKS = (1, 2, 3, 4, 5)


@pytest.mark.parametrize("word", SCALES)
def test_the_factor_is_positive_and_alpha_inverts_it(word):
    scale = registry.build(word, {})
    for r in RANKS:
        for s in (0.3, 1.0, 2.0):
            alpha = scale.alpha_for(s, r)
            assert (alpha is not None) == scale.uses_alpha
            if alpha is not None:
                assert scale.factor(alpha, r) == pytest.approx(s)
        assert scale.factor(8, r) > 0


@pytest.mark.parametrize("word", SCALES)
def test_alpha_counts_exactly_where_it_is_said_to(word):
    scale = registry.build(word, {})
    assert (scale.factor(8, 4) != scale.factor(16, 4)) == scale.uses_alpha
    if not scale.uses_alpha:
        with pytest.raises(ValueError, match=f"`lora_alpha=8` has no effect with `{word}`"):
            Recipe.parse(word, lora_alpha=8)


@pytest.mark.parametrize("word", SCALES)
def test_the_layers_update_is_scaled_by_it(word):
    layer = only(adapt(linear(), word, r=3))
    with torch.no_grad():
        layer.update.delta.B.fill_(1.0)
    parts = Recipe.parse(word, r=3)
    s = parts.scale.factor(parts.lora_alpha, 3)
    pair = layer.update.delta.pair()
    torch.testing.assert_close(layer.update.weight(layer.store), s * pair.B @ pair.A)


@pytest.mark.parametrize("word", SCALES)
def test_peft_computes_the_same_factor_where_it_is_said_to(word):
    scale = registry.build(word, {})
    agreeing = set()
    for flag in (False, True):
        config = LoraConfig(r=3, lora_alpha=5, use_rslora=flag, target_modules=["layer"])
        theirs = get_peft_model(linear(), config).base_model.model.layer.scaling["default"]
        if theirs == pytest.approx(scale.factor(5, 3)):
            agreeing.add(flag)
    assert agreeing == (set() if scale.peft_rslora is None else {scale.peft_rslora})
