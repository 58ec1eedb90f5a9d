"""Distillation: the adapted model's features are held to those of the original one.

    L = α·L_task + (1 − α)·(1/K) Σ_k MSE(h_k, h⁰_k)

over the K blocks' outputs h_k (batch, tokens, width), h⁰ those of the frozen model without its
adapters. An MSE is the mean over the width and over the tokens that are no padding, in at least
float32. The embeddings' output, which is no block's, is left out; in an encoder-decoder K counts
the blocks of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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
    """Blocks' outputs stay close to the original model's while the task is learned.

    For models of transformers, which return their hidden states; the original model runs once more
    on each micro-batch. A model in evaluation mode keeps no hidden states by itself, so there the
    adapted model runs once more, too.

    With accumulated gradients the features' part of a micro-batch counts by its share of the
    update, as the task's already does.

    Cost: a forward of the original model a step.
    When: outputs inside the model have to stay as they were: compression, little data.

    Args:
        alpha: weight of the task's loss, in [0, 1); default 0.2, a re-implementation's of the paper
            (another has 0.1). 1 − alpha is the features' weight.

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
    reweights: ClassVar[bool] = True
    hooks: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not 0 <= self.alpha < 1:
            raise ValueError(
                f"`distillation(alpha={self.alpha!r})` is in [0, 1), e.g. 0.2; for the task's loss"
                " alone leave the word out"
            )

    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        reference, batch = context.reference, dict(context.batch)
        own, original = _features(_student(context, batch), batch), _features(reference, batch)
        with no_autocast(task_loss.device.type):
            distances = [
                _distance(h, h0, mask).to(task_loss.device)
                for (h, mask), (h0, _) in zip(own, original, strict=True)
            ]
            feature = torch.stack(distances).mean()
        return self.alpha * task_loss + context.share * (1 - self.alpha) * feature


def _student(context: Context, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The adapted model's outputs, with hidden states."""
    model = context.adapters.model
    if any(context.outputs.get(name) is not None for name in _FEATURES):
        return context.outputs
    outputs = {} if model.training else model(**batch, output_hidden_states=True)
    if all(outputs.get(name) is None for name in _FEATURES):
        raise ValueError(
            f"`distillation`: this {type(model).__name__} returns none of {', '.join(_FEATURES)};"
            " a model of transformers does, from `model(**batch)` itself. Hand what it returns to"
            " `adapters.loss(outputs, batch)`, or leave `distillation` out"
        )
    return outputs


def _features(
    outputs: Mapping[str, Any], batch: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor | None]]:
    """(output, padding mask) of every block."""
    found = [(name, outputs.get(name) or ()) for name in _FEATURES]
    return [(h, batch.get(_FEATURES[name])) for name, states in found for h in states[1:]]


def _distance(h: Tensor, original: Tensor, mask: Tensor | None) -> Tensor:
    """Mean square over width and tokens, 0-d; both (batch, tokens, width), mask (batch, tokens)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    square = (h.to(wide) - original.to(wide)).square().mean(-1)  # (batch, tokens)
    if mask is None or mask.shape != square.shape:
        return square.mean()
    kept = mask.to(square)
    return (square * kept).sum() / kept.sum().clamp_min(1)
