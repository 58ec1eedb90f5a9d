"""What `all-linear` leaves out, and what is refused where it is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

import lorica
from lorica.cli import targets
from lorica.model.left_out import _uses, language_model
from lorica.run.options import TrainOptions
from models import bert, gpt2, llama, t5

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2}  # fmt: skip
VISION = {**TINY, "image_size": 8, "patch_size": 4}


@pytest.fixture
def llava():
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=61, num_key_value_heads=2, **TINY)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text)
    return LlavaForConditionalGeneration(config)


def test_the_language_model_is_adapted_and_towers_on_request(llava):
    adapters = lorica.attach(llava, "lora", r=2, verbose=False)
    assert all(name.startswith("model.language_model.") for name in adapters.layers)
    assert "left out     model.vision_tower." in adapters.summary.details()
    assert "`adapt_towers=True` (`--adapt-towers`) adapts" in str(adapters.summary)
    only = set(adapters.layers)
    lorica.detach(llava)
    adapters = lorica.attach(llava, "lora", r=2, adapt_towers=True, verbose=False)
    more = set(adapters.layers) - only
    assert {name.split(".")[1] for name in more} == {"vision_tower", "multi_modal_projector"}
    lorica.detach(llava)
    fields = {"adapt_towers": True, "exclude_modules": ["vision_tower"]}
    adapters = lorica.attach(llava, "lora", r=2, **fields, verbose=False)
    assert not any("vision_tower" in name for name in adapters.layers)
    lorica.detach(llava)
    fields = {"exclude_modules": ["vision_tower"]}  # as PEFT's users type it
    adapters = lorica.attach(llava, "lora", r=2, **fields, verbose=False)
    assert set(adapters.layers) == only


def test_towers_train_although_their_last_layer_is_not_used(caplog):
    text = LlamaConfig(vocab_size=61, num_key_value_heads=2, **TINY)
    vision = CLIPVisionConfig(**{**VISION, "num_hidden_layers": 2})
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    )
    adapters = lorica.attach(model, "lora", r=2, adapt_towers=True, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    ids = torch.tensor([[1, 60, 60, 60, 60, 2]])
    inputs = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    with caplog.at_level("WARNING", logger="lorica"):
        for _ in range(12):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert caplog.text.count("no gradient for the output of 6 adapted layer(s)") == 1
    assert "encoder.layers.1.mlp.fc2" in caplog.text and "encoder.layers.0" not in caplog.text


def test_the_command_line_takes_towers_in(llava, tmp_path):
    llava.config.architectures = ["LlavaForConditionalGeneration"]
    llava.config.save_pretrained(tmp_path)
    plain = targets.run(targets.Options(model=str(tmp_path)))
    adapted = {g["pattern"] for g in plain.data["layers"] if g["adapted"]}
    assert adapted and not any("vision_tower" in pattern for pattern in adapted)
    line = next(line for line in plain.shown if "leaves out" in str(line))
    assert f"{len(plain.data['left_out'])} layer(s): outside the language model" in line
    more = targets.run(targets.Options(model=str(tmp_path), adapt_towers=True))
    assert any(g["adapted"] for g in more.data["layers"] if "vision_tower" in g["pattern"])
    assert TrainOptions(adapt_towers=True).recipe_fields() == {"adapt_towers": True}
    assert TrainOptions().recipe_fields() == {}


def test_models_without_towers_or_without_a_language_model_are_adapted_whole():
    clip = CLIPModel(CLIPConfig(text_config=TINY, vision_config=VISION))
    for model in (llama(), gpt2(), t5(), bert(), clip):
        assert language_model(model) is None
    with pytest.raises(ValueError, match="has no towers"):
        lorica.attach(llama(), "lora", r=2, adapt_towers=True, verbose=False)
    with pytest.raises(ValueError, match="adapt_towers"):
        lorica.Recipe.parse("lora", target_modules=["q_proj"], adapt_towers=True)


class PastIt(nn.Module):
    """A block whose fused product never calls the layer."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.up(x), self.out.weight) if self.up.weight.dtype else x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = PastIt()

    def forward(self, x):
        return self.inner.up(x) @ self.inner.out.weight.T


class ByName(Outer):
    """Other names for modules: a method's own first argument, a local one."""

    def forward(s, x):  # noqa: N805
        block = s.inner
        return F.linear(block.up(x), block.out.weight)


class InALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([PastIt()])

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = F.linear(self.blocks[i].up(x), block.out.weight)
        return x


@pytest.mark.parametrize(
    ("make", "name"),
    [(PastIt, "out"), (Outer, "inner.out"), (ByName, "inner.out"), (InALoop, "blocks.0.out")],
)
def test_a_weight_that_is_read_past_its_layer_is_left_out_or_refused(make, name):
    adapters = lorica.attach(make(), "lora", r=2, verbose=False)
    assert list(adapters.layers) == [name.replace("out", "up")]
    assert adapters.summary.left_out == {name: "its weight is read past the layer"}
    with pytest.raises(ValueError, match=f"'{name}' cannot be adapted.*never calls the layer"):
        lorica.attach(make(), "lora", r=2, target_modules=["out"], verbose=False)


def test_what_transformers_reads_past_its_layers():
    assert _uses(MambaMixer)[0] >= {("dt_proj",), ("x_proj",), ("out_proj",)}
    assert ("dt_proj",) not in _uses(MambaMixer)[1]
    assert ("q_proj",) in _uses(WavLMAttention)[0]
    assert ("dense",) not in _uses(BloomAttention)[0], "a slice, under a parallelism of its own"


def test_mamba_trains_what_acts():
    config = {"vocab_size": 61, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(**config, time_step_rank=4))
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    assert [name.rsplit(".", 1)[1] for name in adapters.layers] == ["in_proj"]
    lorica.detach(model)
    adapters = lorica.attach(model, "lora", r=2, target_modules=["x_proj"], verbose=False)
    lorica.detach(model)
    with pytest.raises(ValueError, match="MambaMixer multiplies with its weight itself"):
        lorica.attach(model, "lora", r=2, target_modules=["x_proj", "dt_proj"], verbose=False)
