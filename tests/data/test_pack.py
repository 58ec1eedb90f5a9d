"""Packing: rows are full, nothing is lost, and no example sees another (proved by logits)."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset

from lorica.data import PackedCollator, check_isolation, prepare
from lorica.data.pack import PACKINGS, best_fit, wrapped

TEXTS = ["once upon a time", "the little red fox", "two", "what is two plus two", "a red house"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def model_of(kind, attention, words=500):
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    made = {
        "llama": lambda: (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=words,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            ),
        ),
        "gpt2": lambda: (
            GPT2LMHeadModel,
            GPT2Config(
                vocab_size=words,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        "opt": lambda: (
            OPTForCausalLM,
            OPTConfig(
                vocab_size=words,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            ),
        ),
    }
    cls, config = made[kind]()
    return cls._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("name", PACKINGS)
def test_plans_keep_every_token_once_and_fit(name):
    rng = random.Random(0)
    lengths = [rng.randint(1, 40) for _ in range(200)]
    rows = PACKINGS[name].plan(lengths, 32)
    spans = sorted(span for row in rows for span in row)
    covered = [(i, t) for i, a, b in spans for t in range(a, b)]
    assert covered == [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    assert all(sum(b - a for _, a, b in row) <= 32 for row in rows)
    assert rows == PACKINGS[name].plan(lengths, 32)


def test_best_fit_is_whole_and_tight():
    rng = random.Random(1)
    lengths = [rng.randint(5, 100) for _ in range(2000)]
    rows = best_fit(lengths, 256)
    assert all(a == 0 and b == lengths[i] for row in rows for i, a, b in row)
    assert sum(lengths) / (len(rows) * 256) > 0.98
    assert best_fit([], 8) == []


def test_best_fit_takes_the_tightest_row():
    # 6 leaves 4, 7 leaves 3: the 3 belongs with the 7 though the other row has room too.
    assert best_fit([6, 7, 3, 4], 10) == [[(0, 0, 6), (3, 0, 4)], [(1, 0, 7), (2, 0, 3)]]


def test_wrapped_rows_are_full():
    rows = wrapped([5, 9, 3], 6)
    assert [sum(b - a for _, a, b in row) for row in rows] == [6, 6, 5]


def test_wrapped_is_for_running_text(tokenizer):
    data = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    with pytest.raises(ValueError, match="`packing='wrapped'` cuts.*`prompt-completion`.*best_fit"):
        prepare(data, tokenizer, max_length=8, packing="wrapped")
    made = prepare(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=7, packing="wrapped")
    alone = prepare(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=64)
    lengths = list(map(len, made.dataset["input_ids"]))
    # A part of one token has nothing to predict, so it isn't kept.
    assert all(length >= 6 for length in lengths[:-1])
    assert alone.report.tokens - sum(lengths) < len(lengths)


@pytest.mark.parametrize("packing", ["best_fit", "wrapped"])
def test_positions_and_first_labels(tokenizer, packing):
    made = prepare(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=24, packing=packing)
    assert any(row["position_ids"].count(0) > 1 for row in made.dataset)
    for row in made.dataset:
        assert row["position_ids"][0] == 0
        for before, here, label in zip(
            [-1, *row["position_ids"]], row["position_ids"], row["labels"], strict=False
        ):
            assert here in (0, before + 1)
            assert here or label == -100


def test_packing_trains_on_the_same_tokens(tokenizer):
    data = Dataset.from_dict({"prompt": TEXTS, "completion": TEXTS[::-1]})
    alone = prepare(data, tokenizer, max_length=48)
    packed = prepare(data, tokenizer, max_length=48, packing="best_fit")
    assert packed.report.label_tokens == alone.report.label_tokens
    assert packed.report.tokens == alone.report.tokens
    assert packed.report.rows < alone.report.rows
    assert packed.report.fill > alone.report.fill


def compare(model, tokenizer, **how):
    """The largest difference of logits, and of summed losses, between packed rows and examples."""
    data = Dataset.from_dict({"text": TEXTS})
    alone = prepare(data, tokenizer, max_length=24)
    packed = prepare(data, tokenizer, max_length=24, packing="best_fit")
    assert len({len(row) for row in packed.dataset["input_ids"]}) > 1  # so that one is padded
    batch = packed.collator(**how)(packed.dataset.to_list())
    with torch.no_grad():
        out = model(**batch)
        expected = {}
        losses = []
        for row in alone.dataset:
            one = alone.collator()([row])
            result = model(**one)
            expected[tuple(row["input_ids"])] = result.logits[0]
            losses.append(result.loss * (one["labels"] != -100).sum())
    worst = 0.0
    for r, row in enumerate(packed.dataset):
        starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
        for a, b in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            want = expected.pop(tuple(row["input_ids"][a:b]))
            worst = max(worst, float((out.logits[r, a:b] - want).abs().max()))
    assert not expected
    total = out.loss * (batch["labels"] != -100).sum()
    return worst, float((total - sum(losses)).abs())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_logits_are_those_of_each_example_alone(kind, attention, tokenizer):
    model = model_of(kind, attention)
    model.config.use_cache = False  # as transformers' Trainer sets it
    logits, loss = compare(model, tokenizer)
    assert logits < 1e-5 and loss < 1e-4
    check_isolation(model)
    by_mask, _ = compare(model, tokenizer, block_mask=torch.float32)
    assert by_mask < 1e-5
    model.train()
    check_isolation(model)
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_leak_is_found_and_named(kind, tokenizer):
    model = model_of(kind, "sdpa")  # with a cache, as a model is by default
    assert compare(model, tokenizer)[0] > 1e-3
    with pytest.raises(ValueError, match="use_cache = False"):
        check_isolation(model)
    check_isolation(model, PackedCollator(block_mask=torch.float32))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_ignores_positions_needs_the_written_mask(attention, tokenizer):
    model = model_of("opt", attention)
    model.config.use_cache = False
    with pytest.raises(ValueError, match="block_mask=torch.float32"):
        check_isolation(model)
    check_isolation(model, PackedCollator(block_mask=torch.float32))
    assert compare(model, tokenizer, block_mask=torch.float32)[0] < 1e-5


def test_collators_pad_and_count(tokenizer):
    data = Dataset.from_dict({"text": TEXTS})
    for packing in ("none", "best_fit"):
        made = prepare(data, tokenizer, max_length=24, packing=packing)
        batch = made.collator(pad_to_multiple_of=8)(made.dataset.to_list())
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].shape[1] % 8 == 0
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert ("attention_mask" in batch) == (packing == "none")
        # The Trainer's num_items_in_batch, by its older and its newer rule.
        assert (batch["labels"] != -100).sum() == made.report.label_tokens
        assert (batch["labels"][:, 1:] != -100).sum() == made.report.label_tokens


def test_the_trainer_takes_packed_rows(tokenizer, tmp_path):
    """It keeps the columns, counts the tokens, and its loss is that of the examples alone."""
    from transformers import Trainer, TrainingArguments

    losses = {}
    for packing in ("none", "best_fit"):
        made = prepare(
            Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=24, packing=packing
        )
        torch.manual_seed(0)
        trainer = Trainer(
            model=model_of("llama", "sdpa"),
            args=TrainingArguments(
                output_dir=str(tmp_path / packing),
                max_steps=1,
                per_device_train_batch_size=len(made.dataset),
                logging_steps=1,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=made.dataset,
            data_collator=made.collator(),
        )
        losses[packing] = trainer.train().training_loss
    assert losses["none"] == pytest.approx(losses["best_fit"], abs=1e-4)
