"""A tiny Llama on sentences of order-1 Markov chains, pre-trained on one chain and taught another.

`shift`: from chain P1 to (P1 + P1')/2. `tags`: the first token names the chain; pre-trained on two
of them and taught a third, so that nothing forces the first ones to be forgotten.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WORDS, LENGTH, BATCH = 64, 32, 16


def build(seed: int, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 4, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


@functools.cache
def chain(seed: int) -> Tensor:
    """Probabilities (64, 64) of the next word."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return (2.5 * torch.randn(WORDS, WORDS, generator=generator)).softmax(1)


@functools.cache
def shifted(seed: int) -> Tensor:
    return (chain(seed) + chain(seed + 500)) / 2


def two_back(
    first: Tensor, second: Tensor, generator: torch.Generator, size: int
) -> dict[str, Tensor]:
    """Sentences whose next word follows from the last two, by the product of two chains: without
    attention the second is out of reach."""
    tokens = [torch.randint(0, WORDS, (size,), generator=generator) for _ in range(2)]
    while len(tokens) < LENGTH:
        chances = first[tokens[-1]] * second[tokens[-2]]
        tokens.append(torch.multinomial(chances, 1, generator=generator).flatten())
    ids = torch.stack(tokens, 1)
    return {"input_ids": ids, "labels": ids}


def batch(
    chances: Tensor, generator: torch.Generator, size: int = BATCH, tag: int | None = None
) -> dict[str, Tensor]:
    """Sentences of 32 tokens; with a tag, its token comes first."""
    tokens = [torch.randint(0, WORDS, (size,), generator=generator)]
    while len(tokens) < LENGTH - (tag is not None):
        tokens.append(torch.multinomial(chances[tokens[-1]], 1, generator=generator).flatten())
    if tag is not None:
        tokens.insert(0, torch.full((size,), WORDS + tag))
    ids = torch.stack(tokens, 1)
    return {"input_ids": ids, "labels": ids}


@functools.cache
def _trained(seed: int, layers: int, steps: int, tags: bool) -> dict[str, Tensor]:
    model = build(seed, layers)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        which = (step % 2) if tags else None
        chances = chain(seed + 100 * (which or 0))
        model(**batch(chances, generator, tag=which)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: t.clone() for name, t in model.state_dict().items()}


def pretrained(seed: int, layers: int = 2, steps: int = 250, tags: bool = False) -> Any:
    """A fresh copy of the model that has learnt the first chain, or the first two."""
    model = build(seed, layers)
    model.load_state_dict(_trained(seed, layers, steps, tags))
    return model


@torch.no_grad()
def loss(model: Any, chances: Tensor, tag: int | None = None) -> float:
    """On 128 sentences that are always the same."""
    model.eval()
    held_out = batch(chances, torch.Generator().manual_seed(10**6), 128, tag)
    value = float(model(**held_out).loss)
    model.train()
    return value


def weights(adapters: Any) -> dict[str, Tensor]:
    """Of the linear layers in the blocks, as the model computes with them."""
    modules = dict(adapters.model.named_modules())
    names = [n for n in modules if n.endswith("_proj")]
    return {
        n: (adapters.layers[n].effective()[0] if n in adapters.layers else modules[n].weight)
        .detach()
        .clone()
        for n in names
    }
