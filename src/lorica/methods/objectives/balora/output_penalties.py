"""Penalties on a matrix of logits Z (N, D), one row for each label of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from lorica.methods.objectives.base import Context
from lorica.tensors import dtensor_ops
from lorica.tensors.linalg import qr, svdvals, vector_norm

SPARE, ROUNDS, WIDE = 5, 2, 4096  # of the sketch: spare directions, power iterations, least width


def labelled(method: str, context: Context) -> tuple[Tensor, Tensor]:
    """The logits (..., D) of a micro-batch, and a mask (...) of those that a label belongs to.

    In a causal language model the logits of a position are for the next position's label, so the
    last position has none; encoder-decoders and other models do not shift.

    Raises:
        ValueError: no logits or labels, of shapes that do not match, or a single class.
    """
    logits: Tensor | None = context.outputs.get("logits")
    labels: Tensor | None = (context.batch or {}).get("labels")
    if logits is None or labels is None:
        raise ValueError(
            f"`{method}` reads the {'logits' if logits is None else 'labels'}, which the"
            f" {'model did not return' if logits is None else 'batch does not have'}: call"
            " `adapters.loss(outputs, batch)`, without a fused loss and without label smoothing"
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"`{method}` compares classes, and the logits {tuple(logits.shape)} are of one; for"
            " regression leave the method out"
        )
    if labels.shape == logits.shape:  # one label per class: every row has labels
        return logits, torch.ones_like(logits[..., 0], dtype=torch.bool)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"`{method}`: the logits {tuple(logits.shape)} and the labels {tuple(labels.shape)} do"
            f" not match; labels of shape {tuple(logits.shape[:-1])} are read"
        )
    wanted = labels != -100
    return logits, F.pad(wanted[..., 1:], (0, 1)) if shifts(context.adapters.model) else wanted


def shifts(model: nn.Module) -> bool:
    """Whether a model's loss compares the logits of a position with the next position's label."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    losses: Any = loss_utils  # Any: transformers leaves it half typed
    # As transformers chooses a model's loss: one that names none has that of a causal model.
    loss = losses.LOSS_MAPPING.get(str(vars(model).get("loss_type")), losses.ForCausalLMLoss)
    return loss is losses.ForCausalLMLoss


def divergence(z: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·mean over the rows of KL(softmax(teacher/T) ‖ softmax(z/T))."""
    own, other = (F.log_softmax(x / temperature, -1) for x in (z, teacher))
    return F.kl_div(own, other, log_target=True, reduction="batchmean") * temperature**2


def correlation(z: Tensor) -> Tensor:
    """(1/D)·Σ_{i≠j} C_ij² of the columns' covariance C (D, D); 0 for a single row."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / max(len(z) - 1, 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def certainty(z: Tensor, top: int) -> Tensor:
    """Minus the mean entropy of softmax over each row's `top` largest logits."""
    log_p = F.log_softmax(z.topk(min(top, z.shape[1]), -1).values, -1)
    return (log_p.exp() * log_p).sum(-1).mean()


def share_of_all(z: Tensor, k: int) -> Tensor:
    """Σ_{i≤k} σ_i / Σ σ_i."""
    values = svdvals(z)
    return values[:k].sum() / values.sum().clamp_min(torch.finfo(z.dtype).tiny)


def share_of_norm(z: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Σ_{i≤k} σ_i / ‖Z‖_F, in (0, √k]; from a sketch where Z is wide."""
    exact = z.shape[1] <= WIDE or k >= min(z.shape)
    values = svdvals(z if exact else sketch(z, k + SPARE, generator))
    return values[:k].sum() / vector_norm(z).clamp_min(torch.finfo(z.dtype).tiny)


def sketch(z: Tensor, q: int, generator: torch.Generator) -> Tensor:
    """Z in an orthonormal basis (D, q) close to its leading right singular vectors: (N, q).

    The basis is a constant in backward: to first order, moving the leading vectors does not change
    the sum of singular values.
    """
    with torch.no_grad():
        probe = dtensor_ops.draw((len(z), min(q, *z.shape)), generator)
        basis, _ = qr(z.T @ probe.to(z))
        for _ in range(ROUNDS):
            basis, _ = qr(z.T @ qr(z @ basis)[0])
    return z @ basis
