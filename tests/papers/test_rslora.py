"""rsLoRA: the scale, and a first step whose size does not depend on the rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from models import llama, logits, train
from reference import rslora as twin


@pytest.mark.parametrize("r", [1, 3, 16])
def test_it_is_lora_with_another_alpha(r):
    scale = Recipe.parse("rslora").scale
    assert scale.factor(5, r) == pytest.approx(twin.scale(5, r))
    assert scale.factor(5, r) == pytest.approx(Recipe.parse("lora").scale.factor(5 * r**0.5, r))


def test_equal_runs_at_equal_scale():
    def run(method, alpha):
        adapters = lorica.attach(llama(), method, r=4, lora_alpha=alpha, verbose=False)
        train(adapters, lorica.optimizer(adapters, lr=1e-2), 4)
        return logits(adapters.model)

    assert torch.equal(run("rslora", 4), run("lora", 8)), "√4 = 2, exact"


def test_each_layer_uses_its_own_rank():
    adapters = lorica.attach(
        llama(), "rslora", r=4, lora_alpha=4, rank_pattern={"q_proj": 16}, verbose=False
    )
    for name, layer in adapters:
        assert layer.site.scale == (1.0 if name.endswith("q_proj") else 2.0)


def first_step(method: str, r: int, alpha: float = 8) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(ΔW₁ − its closed form, ..., decrease of the loss per ‖G‖²) after one step of descent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False, dtype=torch.float64))
    adapters = lorica.attach(model, method, r=r, lora_alpha=alpha, verbose=False)
    layer = adapters.layers["0"]
    G = torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pair = layer.update.delta.pair()
    (layer.effective()[0] * G).sum().backward()
    with torch.no_grad():
        for p in (pair.A, pair.B):
            p.sub_(p.grad)
        expected = twin.first_update(pair.A, G, pair.scale, 1.0)
        delta = layer.update.weight(layer.store)
    gain = float(-(delta * G).sum() / G.square().sum())
    return delta, expected, gain


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("r", [4, 64])
def test_the_first_step_has_its_closed_form(method, r):
    delta, expected, _ = first_step(method, r)
    torch.testing.assert_close(delta, expected)


def test_the_first_steps_size_is_stable_in_the_rank_where_loras_falls():
    """η s² r σ²: α²σ²/r under α/r, α²σ² under α/√r; σ² = 1/(3·in) for the uniform start."""
    expected = 64 / (3 * 128)
    for r in (4, 16, 64):
        assert first_step("rslora", r)[2] == pytest.approx(expected, rel=0.25)
        assert first_step("lora", r)[2] == pytest.approx(expected / r, rel=0.25)


def test_gradients_fall_with_the_rank_under_lora_and_less_so_here():
    """The paper's figure of gradient norms, small: 16 times the rank."""
    norms = {}
    for method in ("lora", "rslora"):
        for r in (1, 16):
            model = llama(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
            adapters = lorica.attach(
                model, method, r=r, lora_alpha=2, target_modules=["q_proj", "v_proj"], verbose=False
            )
            optimizer = lorica.optimizer(adapters, lr=1e-3)
            train(adapters, optimizer, 3)
            model(**{k: torch.arange(1, 8)[None] for k in ("input_ids", "labels")}).loss.backward()
            squares = [t.parameter.grad.square().sum() for t in adapters.trained()]
            norms[method, r] = float(torch.stack(squares).sum().sqrt())
    fall = {m: norms[m, 1] / norms[m, 16] for m in ("lora", "rslora")}
    assert fall["lora"] > 2 * fall["rslora"], fall
