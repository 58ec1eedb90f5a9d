"""Tiny random transformers, made from configurations: nothing is downloaded.

Weights are drawn ten times wider than transformers draws them and biases are not zero, so that a
wrong term shows in the logits instead of drowning in their smallness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorica.tensors import dropout

VOCAB = 61
LENGTH = 7


def _finish(model: nn.Module, seed: int) -> Any:
    """Biases and norms away from 0 and 1, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                p.add_(0.1 * noise.to(p.dtype))
            assert not p.isnan().any(), name
    return model.eval()


def _make(cls: Callable[..., nn.Module], config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return _finish(cls(config), seed)


def llama(seed: int = 0, **over: Any) -> LlamaForCausalLM:
    config = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    return _make(LlamaForCausalLM, LlamaConfig(**{**config, **over}), seed)


def qwen2(seed: int = 0, **over: Any) -> Qwen2ForCausalLM:
    """Like Llama, with biases on query, key and value, and a tied head."""
    config = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    return _make(Qwen2ForCausalLM, Qwen2Config(**{**config, **over}), seed)


def gpt2(seed: int = 0, **over: Any) -> GPT2LMHeadModel:
    """Conv1D: weights stored as (in, out)."""
    config = {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return _make(GPT2LMHeadModel, GPT2Config(**{**config, **over}), seed)


_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip


def bert(seed: int = 0, **over: Any) -> BertForSequenceClassification:
    config = BertConfig(**{**_BERT, "num_labels": 3, **over})
    return _make(BertForSequenceClassification, config, seed)


def bert_masked(seed: int = 0, **over: Any) -> BertForMaskedLM:
    """Tied head, and a bias that the head's parent owns as well."""
    return _make(BertForMaskedLM, BertConfig(**{**_BERT, **over}), seed)


def t5(seed: int = 0, **over: Any) -> T5ForConditionalGeneration:
    config = {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "initializer_factor": 1.0,
    }  # fmt: skip
    return _make(T5ForConditionalGeneration, T5Config(**{**config, **over}), seed)


MODELS: dict[str, Callable[..., Any]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "qwen2": qwen2,
}  # fmt: skip


def batch(model: nn.Module, seed: int = 0, size: int = 2, length: int = LENGTH) -> dict[str, Any]:
    """Random inputs with labels, as this model takes them; (size, length) token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (size, length), generator=generator)
    if isinstance(model, BertForSequenceClassification):
        return {"input_ids": ids, "labels": torch.randint(0, 3, (size,), generator=generator)}
    labels = torch.randint(1, VOCAB, (size, length), generator=generator)
    encoder = isinstance(model, (T5ForConditionalGeneration, BertForMaskedLM))
    return {"input_ids": ids, "labels": labels if encoder else ids}


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits on `batch(model, seed)` in evaluation mode."""
    training = model.training
    model.eval()
    out = model(**batch(model, seed)).logits
    model.train(training)
    return out


@torch.no_grad()
def perturb(adapters: Any, size: float = 0.1, seed: int = 5) -> None:
    """Move everything that trains away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for t in adapters.trained():
        noise = torch.randn(t.parameter.shape, generator=generator, dtype=torch.float32)
        t.parameter.add_(size * noise.to(t.parameter.dtype))
    for _, layer in adapters:  # training never moves the padding's column
        pair = layer.update.delta.pair()
        if pair is not None and layer.store.padding is not None:
            pair.A[:, layer.store.padding] = 0


def train(
    adapters: Any, optimizer: torch.optim.Optimizer, steps: int, first: int = 0
) -> list[float]:
    """A plain loop over seeded batches; the loss of each step."""
    model, losses = adapters.model, []
    for step in range(first, first + steps):
        inputs = batch(model, seed=100 + step)
        loss = adapters.loss(model(**inputs), inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def masked(monkeypatch: Any, x: Tensor) -> Tensor:
    """A mask of 0 and 1 like x, which every dropout takes from now on."""
    keep = torch.randint(0, 2, x.shape, dtype=x.dtype)
    gone = (keep == 0).flatten().nonzero().squeeze(1)
    monkeypatch.setattr(dropout, "_positions", lambda count, p, seed: gone)
    return keep
