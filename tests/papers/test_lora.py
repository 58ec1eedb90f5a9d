"""LoRA: what its paper says of the start, the gradients, the scale and the merged weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from models import MODELS, batch, llama, logits, perturb
from reference import lora as twin


def layer(r: int = 3, bias: bool = True, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias, dtype=torch.float64))
    adapters = lorica.attach(model, "lora", r=r, verbose=False, **fields)
    return model, adapters, adapters.layers["0"]


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_bit_for_bit(name):
    """B = 0 adds an exact 0, in float32 too, whatever the order of the products."""
    model = MODELS[name]()
    before = logits(model)
    lorica.attach(model, "lora", r=4, verbose=False)
    assert torch.equal(logits(model), before)


def test_forward_and_merge_equal_the_twin():
    model, adapters, one = layer()
    perturb(adapters, 1.0)
    pair, x = one.update.delta.pair(), torch.randn(4, 7, dtype=torch.float64)
    W, b = one.base.weight, one.base.bias
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin.forward(x, W, b, pair.A, pair.B, pair.scale))
        expected = twin.merged(W, pair.A, pair.B, pair.scale)
    lorica.merge(model)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_both_gradients_equal_the_formula_and_as_is_zero_at_the_start():
    model, adapters, one = layer()
    pair, x = one.update.delta.pair(), torch.randn(6, 7, dtype=torch.float64)
    for start in (True, False):
        if not start:
            perturb(adapters, 1.0)
        y = model(x)
        weight = torch.randn_like(y)
        G = weight.T @ x  # of L = Σ y ∘ weight
        adapters.model.zero_grad()
        (y * weight).sum().backward()
        with torch.no_grad():
            dA, dB = twin.gradients(G, pair.A, pair.B, pair.scale)
        torch.testing.assert_close(pair.A.grad, dA)
        torch.testing.assert_close(pair.B.grad, dB)
        assert (float(pair.A.grad.abs().max()) == 0) == start
        assert float(pair.B.grad.abs().max()) > 0


def test_the_function_depends_on_scale_times_b():
    x = torch.randn(3, 7, dtype=torch.float64)
    outputs = []
    for alpha, factor in ((6, 1.0), (12, 0.5), (3, 2.0)):
        model, adapters, one = layer(lora_alpha=alpha)
        perturb(adapters, 1.0)
        with torch.no_grad():
            one.update.delta.B.mul_(factor)
        outputs.append(model(x))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


def test_two_layers_of_unequal_ranks_are_the_twins_with_s_from_alpha_and_r():
    """s = α/r of each layer's own r; the pair's word for its scale is not asked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    adapters = lorica.attach(model, "lora", r=2, lora_alpha=6, rank_pattern={"1": 4}, verbose=False)
    perturb(adapters, 1.0)
    expected = x
    for (_, layer), s in zip(adapters, (6 / 2, 6 / 4), strict=True):
        pair, base = layer.update.delta.pair(), layer.base
        with torch.no_grad():
            expected = twin.forward(expected, base.weight, base.bias, pair.A, pair.B, s)
    torch.testing.assert_close(model(x).detach(), expected)


@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_update_has_at_most_rank_r(r):
    model, adapters, one = layer(r=r)
    perturb(adapters, 1.0)
    before = one.base.weight.detach().clone()
    lorica.merge(model)
    assert torch.linalg.matrix_rank(model[0].weight.detach() - before) == r


def test_parameters_per_matrix():
    adapters = lorica.attach(llama(), "lora", r=4, verbose=False)
    expected = sum(4 * (x.in_features + x.out_features) for _, x in adapters)
    assert adapters.summary.trainable == expected
    assert sum(p.numel() for p in adapters.model.parameters() if p.requires_grad) == expected


def test_merged_and_unmerged_agree_in_single_precision():
    for make in MODELS.values():
        model = make()
        perturb(lorica.attach(model, "lora", r=4, verbose=False), 0.05)
        adapted = logits(model)
        lorica.merge(model)
        torch.testing.assert_close(logits(model), adapted, rtol=2e-5, atol=2e-5)


def test_an_embedding_starts_with_a_zero_a():
    """So that the rows of tokens never seen stay as they are."""
    model = llama()
    ids = batch(model)["input_ids"]
    adapters = lorica.attach(model, "lora", r=4, target_modules=["embed_tokens"], verbose=False)
    one = adapters.layers["model.embed_tokens"]
    assert not one.update.delta.A.any() and one.update.delta.B.std() > 0.5
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    model(**batch(model)).loss.backward()
    optimizer.step()
    moved = (one.update.weight(one.store).detach().abs().sum(0) > 0).nonzero().flatten()
    seen = ids[:, :-1]  # no loss depends on the last position
    assert set(moved.tolist()) == set(seen.flatten().tolist())


def test_subspace_similarity_is_a_share():
    torch.manual_seed(0)
    A, C = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    for i, j in ((1, 1), (2, 4), (4, 4)):
        assert 0 <= twin.similarity(A, C, i, j) <= 1
        assert twin.similarity(A, A, i, i) == pytest.approx(1)
