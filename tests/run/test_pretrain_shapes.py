"""The table of shapes, the papers' counts, and what a configuration has to be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig

from lorica.run import model_configs, options
from lorica.run.cost import cost, dry_run

# SwitchLoRA's table, in millions: full training, and by rank.
COUNTS = {
    "llama-130m": (134.3, {128: 71.7, 256: 94.2}),
    "llama-250m": (247.5, {128: 98.9, 256: 148.4}),
    "llama-350m": (368.2, {128: 125.6, 256: 185.4}),
    "llama-1b": (1339.5, {128: 251.1, 256: 370.7, 512: 609.7}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_counts(name):
    whole, ranks = COUNTS[name]
    full = cost(name)
    assert round(full.parameters / 1e6, 1) == whole
    assert full.trainable == full.parameters and full.gradient_bytes == 4 * full.parameters
    for r, trainable in ranks.items():
        found = cost(name, "lora", r=r)
        assert round(found.trainable / 1e6, 1) == trainable
        assert found.parameters == full.parameters


def test_half_of_what_is_exchanged_is_saved_at_1b():
    full, low = cost("llama-1b"), cost("llama-1b", "lora", r=512)
    assert f"{1 - low.gradient_bytes / full.gradient_bytes:.1%}" == "54.5%"
    assert low.optimizer_bytes == 2 * low.gradient_bytes  # Adam's two moments
    assert low.weight_bytes == 4 * (full.parameters + sum(
        low.summary.trained[side]["elements"] for side in "AB"
    ))  # fmt: skip


def test_pools_are_counted_beside_what_is_exchanged():
    """min(in, out) vectors of either side a layer, at 1b about as much as a half of the model."""
    lora, switch = (cost("llama-1b", m, r=512) for m in ("lora", "switchlora"))
    s = model_configs.SHAPES["llama-1b"]
    pools = 4 * s.layers * s.width * (4 * 2 * s.width + 3 * (s.width + s.ffn))
    assert switch.schedule_bytes == pools and lora.schedule_bytes == 0
    assert f"{pools / 2**30:.1f} GiB of schedules' state" in str(switch)
    assert switch.trainable == lora.trainable and switch.gradient_bytes == lora.gradient_bytes
    assert switch.as_dict()["schedule_bytes"] == pools


def test_a_closed_form_of_the_trainable_count():
    """2·V·h + (2L+1)·h + L·(8·r·h + 3·r·(h+f)): embedding and head, norms, two factors a layer."""
    for name, r in (("llama-1m", 8), ("llama-20m", 32)):
        s = model_configs.SHAPES[name]
        linear = s.layers * (8 * r * s.width + 3 * r * (s.width + s.ffn))
        rest = 2 * s.vocabulary * s.width + (2 * s.layers + 1) * s.width
        assert cost(name, "lora", r=r).trainable == linear + rest


def test_the_table_in_the_docstring_is_what_is_built():
    rows = re.findall(r"^\| (llama-\w+) \|(.*)\|$", model_configs.__doc__ or "", re.M)
    assert [name for name, _ in rows] == list(model_configs.SHAPES)
    for name, cells in rows:
        width, ffn, heads, layers, vocabulary, parameters, _ = (
            cell.strip().replace(",", "") for cell in cells.split("|")
        )
        s = model_configs.SHAPES[name]
        assert (s.width, s.ffn, s.heads, s.layers, s.vocabulary) == tuple(
            map(int, (width, ffn, heads, layers, vocabulary))
        )
        assert f"{cost(name).parameters / 1e6:.1f} M" == parameters


def test_the_options_know_the_same_shapes():
    assert options.SHAPES == tuple(model_configs.SHAPES)


def model(config):
    torch.manual_seed(0)
    return model_configs.build(config, "config.json")


def test_whether_a_model_looks_ahead_is_found_out():
    small = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model_configs.check_causal(model(LlamaConfig(**small, intermediate_size=8)), "llama")
    model_configs.check_causal(
        model(GPT2Config(vocab_size=16, n_embd=8, n_head=2, n_layer=1)), "gpt2"
    )
    bert = {**small, "intermediate_size": 8}
    model_configs.check_causal(model(BertConfig(**bert, is_decoder=True)), "bert")
    with pytest.raises(ValueError, match='"is_decoder": true'):
        model_configs.check_causal(model(BertConfig(**bert)), "bert")


def test_the_guide_has_the_same_table():
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text(encoding="utf-8")
    rows = [
        re.findall(r"^\| llama-\w+ \|.*\|$", text, re.M) for text in (page, model_configs.__doc__)
    ]
    assert rows[0] == rows[1]


def test_code_that_a_configuration_brings_is_run_only_where_it_is_trusted(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(
        "import transformers\n\n\nclass OwnConfig(transformers.LlamaConfig):\n"
        "    model_type = 'own-kind'\n\n\nclass Own(transformers.LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 32}
    brought = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    told = {"model_type": "own-kind", "num_hidden_layers": 1, **sizes, "auto_map": brought}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="type `--trust-remote-code`"):
        cost(str(folder))
    assert not (tmp_path / "modules").exists()
    assert cost(str(folder), trust_remote_code=True).parameters > 0
    asked = options.PretrainOptions(model_config=str(folder), trust_remote_code=True)
    assert dry_run(asked).parameters > 0
