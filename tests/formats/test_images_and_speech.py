"""merge and export from the command line, of adapters saved from Python on models that read images
or speech."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lorica
from lorica.cli import main
from models import perturb

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def vit():
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3))


def whisper():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=40,
            num_mel_bins=8,
            encoder_layers=1,
            encoder_attention_heads=2,
            decoder_layers=1,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            d_model=16,
            max_source_positions=12,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )  # fmt: skip
    )


def llava():
    vision = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    text = LlamaConfig(**SMALL, vocab_size=40, num_key_value_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=39)
    )


@pytest.mark.parametrize("make", [vit, whisper, llava])
def test_merge_and_export(make, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    model = type(make()).from_pretrained(tmp_path / "base")
    perturb(lorica.attach(model, r=2, target_modules=["q_proj"], verbose=False))
    lorica.save(model, tmp_path / "adapter")
    call = ["--adapter", str(tmp_path / "adapter"), "--output-dir"]
    assert main(["merge", *call, str(tmp_path / "merged")]) == 0
    merged = type(model).from_pretrained(tmp_path / "merged")
    lorica.merge(model)
    for (name, p), q in zip(model.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert main(["export", *call, str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0


def test_a_head_of_other_classes_than_the_base(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)).save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=5)
    perturb(lorica.attach(model, r=2, verbose=False))
    lorica.save(model, tmp_path / "adapter")
    out = tmp_path / "merged"
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output-dir", str(out)]) == 0
    assert len(json.loads((out / "config.json").read_text())["id2label"]) == 5


OLD = {  # part of a path today -> before transformers 5
    llava: {"model.language_model.": "language_model.model."},
    vit: {"vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query"},
}


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("make", OLD)
def test_names_from_before_transformers_5(make, patterns, tmp_path):
    """The state of today is the oracle; the file is the same one with the keys of before."""
    torch.manual_seed(0)
    base = make()
    vision = r".*vision.*" if make is llava else None
    fields = {"r": 2, "target_modules": ["q_proj"], "exclude_modules": vision}
    adapters = lorica.attach(base, **fields, verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "a")
    (out / "lorica.json").unlink()
    tensors = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())

    def old(name):
        for now, before in OLD[make].items():
            name = name.replace(now, before)
        return name

    save_file({old(k): t for k, t in tensors.items()}, out / "adapter_model.safetensors")
    layer = old(next(iter(adapters.layers)))
    config["target_modules"] = [layer] if patterns else [layer.rsplit(".", 1)[1]]
    if patterns:
        config |= {"lora_alpha": 99, "alpha_pattern": {layer: config["lora_alpha"]}}
    (out / "adapter_config.json").write_text(json.dumps(config))
    wanted = {n: t.clone() for n, t in adapters.state_dict().items()}
    lorica.detach(base)
    again = lorica.load(base, out)
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n]) for n, t in again.state_dict().items())
    assert [x.site.scale for _, x in again] == [2.0]
