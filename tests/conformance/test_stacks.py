"""What holds for every word on a stack of matrices, an expert tensor: what it declares."""

from __future__ import annotations

import pytest
import torch
from walk import every, recipe

import lorica
from test_experts import IDS, adapted, build, stacks

WORDS = [word for _, word in every()]


@pytest.mark.parametrize("word", WORDS)
def test_a_stack_trains_and_is_kept_or_is_refused(word, tmp_path):
    made = recipe(word, r=3)
    names = {"target_modules": (), "target_parameters": ("gate_up_proj", "down_proj")}
    if (why := made.no_experts()) is not None or not made.delta.wraps:
        with pytest.raises(ValueError, match="target_parameters") as error:
            lorica.attach(build("qwen3_moe"), recipe(word, r=3, **names), verbose=False)
        assert not made.delta.wraps or why in str(error.value)
        return
    adapters = adapted("qwen3_moe", recipe(word, r=3, **names))
    assert len(stacks(adapters)) == len(adapters) == 4
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=2)
    before = {t.name: t.parameter.detach().clone() for t in adapters.trained()}
    adapters.model.train()
    for _ in range(2):
        outputs = adapters.model(IDS, labels=IDS, output_hidden_states=True)
        adapters.loss(outputs, {"input_ids": IDS, "labels": IDS}).backward()
        optimizer.step()
        optimizer.zero_grad()
    for t in adapters.trained():
        assert not torch.equal(t.parameter, before[t.name]), t.name
    adapters.model.eval()
    live = adapters.model(IDS).logits
    again = build("qwen3_moe")
    lorica.load(again, lorica.save(adapters, tmp_path / "out"))
    assert torch.equal(again(IDS).logits, live)
    lorica.merge(adapters.model)
    torch.testing.assert_close(adapters.model(IDS).logits, live, rtol=1e-4, atol=1e-5)
