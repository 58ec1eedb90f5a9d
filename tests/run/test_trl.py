"""The mixin over TRL's trainers, through the examples that the documentation shows."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorica
from lorica.embedded import base_path
from lorica.run import Reference

pytest.importorskip("trl", reason="TRL is not installed: pip install lorica[trl]")
# TRL still calls what transformers has deprecated, and asks for pinned memory without a device.
pytestmark = [
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default:.*pin_memory.*"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def embedded() -> Any:
    return AutoModelForCausalLM.from_pretrained(base_path())


def test_sft_example_trains_and_saves(tmp_path: Path) -> None:
    trainer = example("sft").main(["--max-steps", "12", "--output-dir", str(tmp_path)])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 12 and all(map(math.isfinite, losses))
    assert trainer.optimizer.optimizer.param_groups[0]["lorica"]["step"] == 12
    again = lorica.load(embedded(), tmp_path / "adapter")
    assert again.fingerprint() == trainer.adapters.fingerprint()


def test_dpo_example_starts_at_the_reference_and_moves_away(tmp_path: Path) -> None:
    trainer = example("dpo").main(["--max-steps", "8", "--output-dir", str(tmp_path)])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Before the first step policy and reference are one function: the loss is log 2.
    assert float(losses[0]) == pytest.approx(math.log(2), abs=1e-4)
    assert float(losses[-1]) < float(losses[0])
    assert isinstance(trainer.ref_model, Reference)
    base = embedded()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        reference, plain = trainer.ref_model(input_ids=ids).logits, base(input_ids=ids).logits
        policy = trainer.model(input_ids=ids).logits
    assert torch.equal(reference, plain) and not torch.equal(policy, plain)


def test_an_adapted_head_that_is_computed_past_is_an_error(tmp_path: Path) -> None:
    module = example("sft")

    def attach(model: Any, method: str) -> Any:
        return attach_(model, method, target_modules=["lm_head", "q_proj"])

    attach_ = lorica.attach
    module.lorica = type("Stub", (), {"attach": staticmethod(attach)})
    with pytest.raises(ValueError, match=r"1 adapter\(s\) had no gradient.*lm_head"):
        module.main(["--max-steps", "11", "--method", "lora", "--output-dir", str(tmp_path)])
