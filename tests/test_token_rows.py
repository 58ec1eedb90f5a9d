"""`trainable_token_indices`: rows of the embedding and the head that train."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import GPT2LMHeadModel

import lorica
import models
from models import MODELS, batch, gpt2, llama, logits, perturb, qwen2, train

IDS = (1, 5, 7)
ONE = {"target_modules": "all-linear", "verbose": False}


def attached(make=llama, method="lora", **fields):
    return lorica.attach(
        make(), method, **{"r": 2, "trainable_token_indices": [7, 1, 5], **ONE, **fields}
    )


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_adapted_and_detached_is_the_base(name):
    model = MODELS[name]().double()
    base, before = copy.deepcopy(model), logits(model)
    adapters = lorica.attach(model, "dora", r=2, trainable_token_indices=IDS, verbose=False)
    torch.testing.assert_close(logits(model), before)
    perturb(adapters, 0.3)
    adapted = logits(model)
    with adapters.disabled():
        assert torch.equal(logits(model), before)
    other = copy.deepcopy(base)
    again = lorica.attach(other, "dora", r=2, trainable_token_indices=IDS, verbose=False)
    with torch.no_grad():  # what the base holds there takes no part
        for table in again.tables.values():
            table.base.weight[[*IDS]] = 1e4
    again.load_state_dict(adapters.state_dict())
    assert torch.equal(logits(other), adapted)
    assert again.hash_base() == adapters.hash_base()
    lorica.merge(other)
    torch.testing.assert_close(logits(other), adapted, rtol=1e-9, atol=1e-9)
    lorica.detach(model)
    for (n, p), q in zip(base.named_parameters(), model.named_parameters(), strict=True):
        assert n == q[0] and torch.equal(p, q[1])


def table_gradients(model) -> dict:
    """Gradients of the tables of a model whose tables train in full."""
    model.requires_grad_(False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.requires_grad_(True)
    model(**batch(model)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_gradients_are_the_rows_of_the_whole_tables(make):
    wanted = table_gradients(make())
    adapters = attached(make)
    adapters.model(**batch(adapters.model)).loss.backward()
    rows = {n: t.rows.grad for n, t in adapters.tables.items() if t.owner}
    assert len(rows) == len(wanted)
    for name, grad in rows.items():
        torch.testing.assert_close(grad, wanted[f"{name}.weight"][[*IDS]])


def test_a_padding_row_has_no_gradient():
    model = llama(pad_token_id=5)
    adapters = lorica.attach(model, r=2, trainable_token_indices={"embed_tokens": IDS}, **ONE)
    model(**batch(model)).loss.backward()
    grad = adapters.tables["model.embed_tokens"].rows.grad
    assert not grad[1].any() and grad[[0, 2]].any()


@pytest.mark.parametrize(
    ("make", "method"),
    [(llama, "relora(every=2)+dora"), (qwen2, "olora+lorarite"), (qwen2, "adalora")],
)
def test_resumed_is_the_straight_run(make, method, tmp_path):
    def begin():
        adapters = attached(make, method)
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=6)

    adapters, optimizer = begin()
    train(adapters, optimizer, 3)
    saved, state = adapters.state_dict(), copy.deepcopy(optimizer.state_dict())
    saved = {n: t.clone() for n, t in saved.items()}
    straight = train(adapters, optimizer, 3, first=3)
    again, second = begin()
    with torch.no_grad():  # another process draws the new rows otherwise
        for table in again.tables.values():
            table.base.weight[[*IDS]] = torch.randn(3, 32)
    again.load_state_dict(saved)
    second.load_state_dict(state)
    assert train(again, second, 3, first=3) == straight
    assert again.fingerprint() == adapters.fingerprint()


def test_tied_tables_are_one():
    adapters = attached(qwen2)
    names = [t.name for t in adapters.trained() if t.name.endswith("rows")]
    assert names == ["model.embed_tokens.rows"]
    assert adapters.tables["lm_head"].rows is adapters.tables["model.embed_tokens"].rows
    perturb(adapters)
    model = lorica.merge(adapters.model)
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    )


def test_a_head_apart_is_untied_by_merging():
    model = qwen2()
    adapters = lorica.attach(model, r=2, trainable_token_indices={"lm_head": IDS}, **ONE)
    table = model.model.embed_tokens.weight.clone()
    perturb(adapters, 0.3)
    adapted = logits(model)
    lorica.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert not model.config.tie_word_embeddings


def test_a_subclass_computes_with_its_own_forward():
    class Scaled(torch.nn.Embedding):
        def forward(self, x):
            return 3 * super().forward(x)

    model = torch.nn.Sequential(Scaled(9, 4), torch.nn.Linear(4, 4))
    adapters = lorica.attach(model, r=2, trainable_token_indices={"0": [8]}, verbose=False)
    with torch.no_grad():
        adapters.tables["0"].rows.fill_(2)
    assert (model[0](torch.tensor([8])) == 6).all()


def test_the_summary_lists_them_and_counts_them():
    adapters = attached(qwen2)
    summary = adapters.summary
    assert summary.tokens == {"model.embed_tokens = lm_head": [1, 5, 7]}
    assert "tokens       model.embed_tokens = lm_head: 3 rows train (1, 5, 7)" in str(summary)
    counted = sum(t.parameter.numel() for t in adapters.trained())
    assert (
        summary.trainable
        == counted
        == attached(qwen2, trainable_token_indices=None).summary.trainable + 96
    )
    groups = adapters.param_groups(1e-3, modules_lr=1e-4)
    assert {g["lr"] for g in groups} == {1e-3, 1e-4}


REFUSED = {
    "no list": (llama, {"trainable_token_indices": "5"}, "a list of different token ids"),
    "empty": (llama, {"trainable_token_indices": []}, "left out, no rows train"),
    "twice": (llama, {"trainable_token_indices": [1, 1]}, "different token ids"),
    "beyond": (llama, {"trainable_token_indices": [61]}, r"model\.resize_token_embeddings\(62\)"),
    "unknown": (
        llama, {"trainable_token_indices": {"emb": [1]}}, "'model.embed_tokens' and 'lm_head'",
    ),
    "no table": (llama, {"trainable_token_indices": {"norm": [1]}}, "allowed: nn.Embedding"),
    "target": (
        llama, {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "would train",
    ),
    "in full": (
        llama,
        {"modules_to_save": ["lm_head"], "trainable_token_indices": {"lm_head": [1]}},
        "would train twice",
    ),
    "both in full": (
        llama,
        {"modules_to_save": ["lm_head", "embed_tokens"], "trainable_token_indices": [1]},
        "has no effect",
    ),
    "tied target": (
        qwen2, {"target_modules": ["lm_head"], "trainable_token_indices": [1]}, "shares its weight",
    ),
    "full": (llama, {"method": "full", "trainable_token_indices": [1]}, "every row of every table"),
    "train_rest": (
        llama, {"method": "relora", "train_rest": True, "trainable_token_indices": [1]},
        "has no effect",
    ),
    "no transformer": (
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)),
        {"trainable_token_indices": [1]}, "name it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, given, words = REFUSED[case]
    fields = {"method": "lora", **given}
    model = make()
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        lorica.attach(
            model, fields.pop("method", "lora") if "method" in fields else "lora", **fields
        )
    assert before == {n: id(m) for n, m in model.named_modules()}


def test_a_list_spares_a_head_that_trains_otherwise():
    assert [*attached(modules_to_save=["lm_head"]).tables] == ["model.embed_tokens"]
    assert [*attached(target_modules=["lm_head"]).tables] == ["model.embed_tokens"]


def test_new_rows_that_stay_untrained_are_said(tmp_path, caplog):
    gpt2().save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    model.resize_token_embeddings(models.VOCAB + 3)
    with caplog.at_level(logging.WARNING, "lorica"):
        lorica.attach(model, r=2, verbose=False)
    assert "transformer.wte has 64 rows, 3 more than its checkpoint" in caplog.text
    assert "trainable_token_indices=list(range(61, 64))" in caplog.text
    caplog.clear()
    lorica.detach(model)
    lorica.attach(model, r=2, trainable_token_indices=range(61, 64), verbose=False)
    assert not caplog.text


def test_tokens_that_do_not_occur_are_no_error():
    """The first steps may hold none of the new tokens."""
    model = llama()
    never = {"embed_tokens": [0]}  # `batch` draws no 0
    adapters = lorica.attach(model, r=2, trainable_token_indices=never, **ONE)
    train(adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=20), 11)


@pytest.mark.parametrize("fields", [
    {"trainable_token_indices": IDS}, {"target_modules": ["lm_head", "q_proj"]},
    {"modules_to_save": ["embed_tokens"]},
])  # fmt: skip
def test_tables_with_adapters_are_resized_before(fields):
    model = llama()
    adapters = lorica.attach(model, r=2, verbose=False, **fields)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        with pytest.raises(ValueError, match=r"embeddings\(70\).*Resize first and attach then"):
            one.resize_token_embeddings(70)
    assert adapters.model is model
    lorica.detach(model).resize_token_embeddings(70, mean_resizing=False)
    assert lorica.merge(copied).resize_token_embeddings(70, mean_resizing=False) is not None
