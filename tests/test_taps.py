"""What schedules and objectives see of a forward."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import lorica
from lorica import Recipe
from lorica.methods.objectives.base import AbstractObjective, Context
from models import VOCAB, batch, gpt2, llama, logits, perturb


@dataclass(frozen=True, kw_only=True)
class Looks(AbstractObjective):
    """Sees everything there is to see."""

    hooks: ClassVar[frozenset[str]] = frozenset({"hidden_states", "input_squares"})

    def loss(self, task_loss: torch.Tensor, context: Context) -> torch.Tensor:
        SEEN.append(context)
        return task_loss + 0 * context.reference.logits.sum()


SEEN: list[Context] = []


def adapted(model: Any = None, **fields: Any):
    SEEN.clear()
    model = llama() if model is None else model
    recipe = Recipe.parse("lora", r=4, objectives=(Looks(), Looks()), **fields)
    adapters = lorica.attach(model, recipe, verbose=False)
    perturb(adapters)
    return adapters


def by_hand(model: Any, inputs: dict[str, Any], mask: torch.Tensor | None = None):
    """{path: Σ x² (in,)} of every linear layer that has an adapter, by plain hooks."""
    out, hooks = {}, []
    for name, layer in lorica.Adapters.of(model):

        def note(_: Any, args: tuple, name: str = name) -> None:
            x = args[0].detach()
            out[name] = (x if mask is None else x[mask.bool()]).flatten(0, -2).square().sum(0)

        hooks.append(layer.register_forward_pre_hook(note))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_the_squares_of_the_inputs_leave_padding_out(padded):
    adapters = adapted()
    model, inputs = adapters.model.train(), batch(adapters.model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 4:] = 0
    if padded:
        inputs["attention_mask"] = mask
    expected = by_hand(model, inputs, mask if padded else None)
    torch.testing.assert_close(adapters.hooks.input_squares, expected)
    model(**inputs)
    doubled = {name: 2 * value for name, value in expected.items()}
    torch.testing.assert_close(adapters.hooks.input_squares, doubled)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_token_once(reentrant):
    plain, checked = adapted(), adapted()
    checked.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checked.model.enable_input_require_grads()
    for adapters in (plain, checked):
        adapters.model.train()
        adapters.model(**batch(adapters.model)).loss.backward()
    torch.testing.assert_close(plain.hooks.input_squares, checked.hooks.input_squares)


def test_of_an_embedding_the_ids_are_counted():
    model = gpt2()
    adapters = adapted(model, target_modules=["wte"])
    inputs = batch(model.train())
    model(**inputs)
    counts = torch.bincount(inputs["input_ids"].flatten(), minlength=VOCAB).float()
    torch.testing.assert_close(adapters.hooks.input_squares["transformer.wte"], counts)


def test_an_evaluation_is_not_looked_at():
    adapters = adapted()
    assert adapters.model.eval()(**batch(adapters.model)).hidden_states is None
    assert not adapters.hooks.input_squares


def test_the_reference_is_the_original_model_once_for_all():
    model = llama()
    original = logits(model)
    adapters = adapted(model)
    model.train()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    inputs = batch(model)
    outputs = model(**inputs)
    assert len(outputs.hidden_states) == 3
    adapters.loss(outputs, inputs).backward()
    assert SEEN[0] is SEEN[1] and calls == [True, False] and model.training
    torch.testing.assert_close(SEEN[0].reference.logits, original)
    assert not SEEN[0].reference.logits.requires_grad
    assert len(SEEN[0].reference.hidden_states) == 3
    seen = dict(adapters.hooks.input_squares)
    adapters.hooks.input_squares.clear()
    torch.testing.assert_close(seen, by_hand(model, inputs))  # nothing of the reference's forward


def test_without_the_batch_there_is_no_reference():
    adapters = adapted()
    outputs = adapters.model.train()(**batch(adapters.model))
    with pytest.raises(ValueError, match=r"adapters.loss\(outputs, batch\)"):
        adapters.loss(outputs)


def test_detaching_takes_the_hooks_out():
    adapters = adapted()
    model = lorica.detach(adapters.model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert model.train()(**batch(model)).hidden_states is None


def test_a_copied_model_looks_with_its_own_taps():
    adapters = adapted()
    twin = copy.deepcopy(adapters.model).train()
    twin(**batch(twin))
    assert set(lorica.Adapters.of(twin).hooks.input_squares) == set(adapters.layers)
    assert not adapters.hooks.input_squares
