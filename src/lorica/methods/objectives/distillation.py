"""Distillation: keeps the adapted model's features close to those of the original model.

    L = α·L_task + (1 − α)·(1/K) Σ_k MSE(h_k, h⁰_k)

over the K blocks' outputs h_k (batch, tokens, width), h⁰ those of the frozen model without its
adapters. Each MSE is the mean over the width and over the tokens that are not padding, in at least
float32. The output of the embeddings, which is not a block's, is left out; in an encoder-decoder K
counts the blocks of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Batch, Outputs
from lorica.methods.fields import number
from lorica.methods.objectives.base import AbstractObjective, Context
from lorica.methods.optional import Reweights
from lorica.tensors.matmul import no_autocast

# What a model returns -> which of its inputs marks the padding there.
_FEATURES = {
    "hidden_states": "attention_mask",
    "encoder_hidden_states": "attention_mask",
    "decoder_hidden_states": "decoder_attention_mask",
}


@dataclass(frozen=True, kw_only=True)
class Distillation(AbstractObjective, Reweights):
    """Blocks' outputs remain close to the original model's while the task is learned.

    It works with models of transformers, which return their hidden states; the original model runs
    once for each micro-batch. A model in evaluation mode doesn't return its hidden states, so the
    adapted model runs a second time there.

    With accumulated gradients the features' part of a micro-batch is weighted by its share of the
    optimizer step, as the task's loss already is.

    Cost: a forward of the original model per step.
    When: the outputs inside the model must not change much: compression, little data.

    Args:
        alpha: weight of the task's loss, in [0, 1); default 0.2, from a re-implementation of the
            paper (another has 0.1). The features have the weight 1 − alpha.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("distillation(alpha=0.5)").objectives[0].alpha
        0.5

    Reference:
        @inproceedings{hwang2024pclora,
          title = {PC-LoRA: Low-Rank Adaptation for Progressive Model Compression with Knowledge
                   Distillation},
          author = {Hwang, Injoon and Park, Haewon and Lee, Youngwan and Yang, Jooyoung and
                    Maeng, SunJae}, booktitle = {CVPR Workshop on Transformers for Vision},
          year = {2024}, eprint = {2406.09117}
        }
    """

    alpha: float = 0.2

    needs: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    experts: ClassVar[bool] = True
    reweights: ClassVar[bool] = True
    hooks: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    def __post_init__(self) -> None:
        say = "a number in [0, 1), e.g. `alpha=0.2`; for the task's loss alone leave the method out"
        number(self, "alpha", least=0, below=1, say=say)

    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        reference, batch = context.reference, context.inputs
        own, original = _features(_student(context, batch), batch), _features(reference, batch)
        with no_autocast(task_loss.device.type):
            distances = [
                _distance(h, h0, mask).to(task_loss.device)
                for (h, mask), (h0, _) in zip(own, original, strict=True)
            ]
            feature = torch.stack(distances).mean()
        return self.alpha * task_loss + context.share * (1 - self.alpha) * feature


def _student(context: Context, batch: Batch) -> Outputs:
    """The adapted model's outputs, with hidden states."""
    model = context.adapters.model
    if any(context.outputs.get(name) is not None for name in _FEATURES):
        return context.outputs
    outputs: Outputs = {} if model.training else model(**batch, output_hidden_states=True)
    if all(outputs.get(name) is None for name in _FEATURES):
        raise ValueError(
            f"`distillation`: this {type(model).__name__} returns none of {', '.join(_FEATURES)};"
            " a model of transformers does, from `model(**batch)` itself. Pass what it returns to"
            " `adapters.loss(outputs, batch)`, or leave `distillation` out"
        )
    return outputs


def _features(outputs: Outputs, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """(output, padding mask) of every block."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for name, mask in _FEATURES.items():
        states: tuple[Tensor, ...] = outputs.get(name) or ()
        found += [(h, batch.get(mask)) for h in states[1:]]
    return found


def _distance(h: Tensor, original: Tensor, mask: Tensor | None) -> Tensor:
    """Mean square over width and tokens, 0-d; both (batch, tokens, width), mask (batch, tokens)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    square = (h.to(wide) - original.to(wide)).square().mean(-1)  # (batch, tokens)
    if mask is None or mask.shape != square.shape:
        return square.mean()
    kept = mask.to(square)
    return (square * kept).sum() / kept.sum().clamp_min(1)
