"""merge and export from the command line, of adapters saved from Python on models that read images
or speech."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto

import lorica
from lorica.cli import main
from lorica.formats.peft.renamed import on_model
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
    llava: {
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    vit: {"vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query"},
}


def with_old_names(make, folder):
    """An adapter's folder as PEFT wrote it before transformers 5: the same one, other keys. Returns
    what changes a name."""

    def old(name):
        for now, before in OLD[make].items():
            name = name.replace(now, before)
        return name

    (folder / "lorica.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({old(k): t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return old


FORMS = {  # method and fields; of the configuration: the names that PEFT wrote
    "names": ("lora", {}, lambda layer, own: {"target_modules": [layer.rsplit(".", 1)[1]]}),
    "patterns": (
        "dora",
        {},
        lambda layer, own: {
            "target_modules": [layer],
            "lora_alpha": 99,
            "alpha_pattern": {layer: own["lora_alpha"]},
        },
    ),
    "of its own type": ("bone", {}, lambda layer, own: {"target_modules": [layer]}),
    "of vectors": ("vera", {"r": 8}, lambda layer, own: {"target_modules": [layer]}),
    "a part in full": (
        "lora",
        {"modules_to_save": ["multi_modal_projector"]},
        lambda layer, own: {"target_modules": [layer], "modules_to_save": ["_modal_projector"]},
    ),
    "rows": (
        "lora",
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
        lambda layer, own: {
            "target_modules": [layer],
            "trainable_token_indices": {"language_model.model.embed_tokens": [3, 5]},
        },
    ),
}


@pytest.mark.parametrize(
    ("make", "form"), [*((llava, form) for form in FORMS), (vit, "names"), (vit, "patterns")]
)
def test_names_from_before_transformers_5(make, form, tmp_path):
    """The state of today is the oracle."""
    torch.manual_seed(0)
    base = make()
    vision = r".*vision.*" if make is llava else None
    method, more, names = FORMS[form]
    fields = {"r": 2, "target_modules": ["q_proj"], "exclude_modules": vision, **more}
    adapters = lorica.attach(base, method, **fields, verbose=False)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "a")
    old = with_old_names(make, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config |= names(old(next(iter(adapters.layers))), config)
    (out / "adapter_config.json").write_text(json.dumps(config))
    wanted = {n: t.clone() for n, t in adapters.state_dict().items()}
    scales = [x.site.scale for _, x in adapters]
    lorica.detach(base)
    again = lorica.load(base, out)
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n]) for n, t in again.state_dict().items())
    assert [x.site.scale for _, x in again] == scales


FAMILIES = [
    "clip", "gemma3", "gpt_neox", "internvl", "llava", "mistral3", "paligemma", "qwen2_vl",
    "siglip", "vit",
]  # fmt: skip


def shrunk(config):
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrunk(value)
        elif name in ("num_hidden_layers", "encoder_layers", "depth") and isinstance(value, int):
            setattr(config, name, 1)
        elif name == "layer_types" and value:
            config.layer_types = value[:1]
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_renamed_families_is_found(family):
    """transformers' own way back to the names of its checkpoints is the oracle."""
    known = [
        getattr(modeling_auto, f"MODEL_{kind}MAPPING_NAMES").get(family)
        for kind in ("FOR_IMAGE_TEXT_TO_TEXT_", "FOR_CAUSAL_LM_", "FOR_IMAGE_CLASSIFICATION_", "")
    ]
    config = shrunk(CONFIG_MAPPING[family]())
    with torch.device("meta"):
        model = getattr(transformers, next(name for name in known if name))(config)
    back = [
        renaming.reverse_transform()
        for renaming in reversed(get_model_conversion_mapping(model))
        if isinstance(renaming, WeightRenaming)
    ]
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    old = {rename_source_key(f"{n}.weight", back, [], reverse=True)[0][:-7]: n for n in paths}
    tensors = {f"base_model.model.{n}.lora_A.weight": torch.ones(1) for n in old}
    data = {"peft_type": "LORA", "target_modules": [n.rsplit(".", 1)[-1] for n in old]}
    data, renamed = on_model(model, data, tensors)
    assert [*renamed] == [f"base_model.model.{n}.lora_A.weight" for n in old.values()]
    assert [*old] != paths
    ends = tuple(data["target_modules"])
    assert all(n.endswith(ends) for n in paths)
