"""The embedded base model: small, loadable, sure of the old tasks and ignorant of the new ones."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lorica import embedded

LIMIT = 3_000_000  # bytes that the wheel may spend on the folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.base_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.base_path()).eval()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def score(model, tokenizer, kind: str, n: int) -> dict[str, float]:
    """Exact match of greedy generation on `n` prompts a task of the test side."""
    examples = embedded.generate(kind, n * len(embedded.tasks(kind)), seed=17, side="test")
    prompts = [example["prompt"] for example in examples]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    texts = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    hits = defaultdict(list)
    for example, text in zip(examples, texts, strict=True):
        hits[example["task"]].append(text == example["completion"])
    return {task: sum(marks) / len(marks) for task, marks in hits.items()}


def test_the_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in embedded.base_path().iterdir()}
    assert sum(sizes.values()) <= LIMIT
    assert {
        "PROVENANCE.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(sizes)


def test_it_reads_as_a_single_precision_llama(model):
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_400_000


def test_a_token_is_a_byte(tokenizer, model):
    text = "größe: naïve\n\t日本 </x>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode())
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert len(tokenizer) == model.config.vocab_size
    specials = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(specials) == 3
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_it_knows_the_old_tasks(model, tokenizer):
    scores = score(model, tokenizer, "old", 14)
    assert sum(scores.values()) / len(scores) >= 0.9, scores


def test_it_has_never_seen_the_new_tasks(model, tokenizer):
    scores = score(model, tokenizer, "new", 40)
    assert sum(scores.values()) / len(scores) <= 0.1, scores
