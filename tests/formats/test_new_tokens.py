"""Rows of new tokens: trained, saved, merged, and exchanged with PEFT."""

from __future__ import annotations

import pytest
import torch
from files import close, peft_logits, peft_made, there_and_back

import lorica
import models
from models import logits, perturb

PEFT = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
BOTH = {"embed_tokens": [5, 1], "lm_head": [5, 1]}
MADE = {
    "list": ("llama", {"trainable_token_indices": [5, 1]}),
    "two tables": ("llama", {"trainable_token_indices": BOTH}),
    "other rows": ("llama", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [6, 2]}}),
    "head": ("llama", {"trainable_token_indices": {"lm_head": [3]}}),
    "tied": ("qwen2", {"trainable_token_indices": [5, 1]}),
    "tied by name": ("qwen2", {"trainable_token_indices": BOTH}),
    "tied apart": ("qwen2", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [6]}}),
    "tied head": ("qwen2", {"trainable_token_indices": {"lm_head": [6]}}),
    "ensured": ("qwen2", {"trainable_token_indices": [5, 1], "ensure_weight_tying": True}),
    "in full": ("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "adapted": ("qwen2", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "shared": ("t5", {"target_modules": ["q"], "trainable_token_indices": [5, 1]}),
    "conv": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_files_of_peft_compute_the_same(case, tmp_path):
    family, fields = MADE[case]
    base = models.MODELS[family]()
    theirs, _ = peft_made(base, tmp_path / "theirs", **{**PEFT, **fields})
    there_and_back(base, theirs, tmp_path)


def resized(family, folder, seed):
    """A checkpoint loaded, and with a seed resized in Python: its seven new rows are random."""
    model = type(models.MODELS[family]()).from_pretrained(folder)
    if seed is not None:
        torch.manual_seed(seed)
        model.resize_token_embeddings(models.VOCAB + 7)
    return model


@pytest.fixture(params=["llama", "qwen2"])
def checkpoint(request, tmp_path):
    models.MODELS[request.param]().save_pretrained(tmp_path / "base")
    return lambda seed: resized(request.param, tmp_path / "base", seed)


@pytest.mark.parametrize("fields", [{}, {"trainable_token_indices": [62, 61]}])
def test_whole_tables_of_a_resized_model_are_read(fields, checkpoint, tmp_path):
    theirs, _ = peft_made(checkpoint(1), tmp_path / "theirs", **PEFT, **fields)
    model = checkpoint(2)
    before = logits(model)
    adapters = lorica.load(model, tmp_path / "theirs")
    close(theirs, logits(model))
    assert {n for n, t in adapters.tables.items() if t.indices.tolist() == [*range(61, 68)]} == {
        "model.embed_tokens", "lm_head",
    }  # fmt: skip
    lorica.merge(model)
    close(theirs, logits(model))
    model = checkpoint(2)
    lorica.load(model, tmp_path / "theirs")
    assert torch.equal(before, logits(lorica.detach(model)))


ADAPTED = [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ADAPTED)
def test_a_resized_table_may_have_an_adapter_of_its_own(targets, dora, checkpoint, tmp_path):
    """What differs from the model's own table is frozen beside it, so the base keeps its bytes."""
    fields = {"r": 4, "target_modules": targets, "use_dora": dora}
    peft_made(checkpoint(1), tmp_path / "theirs", **fields)
    other = checkpoint(2)
    if other.config.tie_word_embeddings and targets == ["lm_head"]:
        with pytest.raises(
            ValueError, match="an adapter of 'lm_head' alone. Load it on a model wh"
        ):
            lorica.load(other, tmp_path / "theirs")
        return
    there_and_back(other, peft_logits(other, tmp_path / "theirs"), tmp_path)
    with pytest.raises(ValueError, match=r"model\.resize_token_embeddings\(68\)"):
        lorica.load(checkpoint(None), tmp_path / "theirs")


def test_a_table_of_another_size_says_what_to_type(checkpoint, tmp_path):
    peft_made(checkpoint(1), tmp_path / "theirs", **PEFT)
    model = checkpoint(None)
    with pytest.raises(ValueError, match=r"model\.resize_token_embeddings\(68\)"):
        lorica.load(model, tmp_path / "theirs")


def test_saved_rows_fit_a_model_whose_new_rows_were_drawn_otherwise(checkpoint, tmp_path):
    """The base's hash leaves the rows out, so it is the one of the checkpoint itself."""
    model = checkpoint(1)
    adapters = lorica.attach(
        model, r=2, trainable_token_indices=range(61, 68), target_modules=["q_proj"], verbose=False
    )
    perturb(adapters, 0.1)
    wanted = logits(model)
    out = lorica.save(adapters, tmp_path / "ours")
    other = checkpoint(2)
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    again = lorica.load(other, out)
    assert torch.equal(logits(other), wanted)
    assert again.fingerprint() == adapters.fingerprint()
    close(wanted, peft_logits(checkpoint(3), out))
    base = lorica.attach(checkpoint(None), r=2, target_modules=["q_proj"], verbose=False)
    assert adapters.hash_base() == base.hash_base()
