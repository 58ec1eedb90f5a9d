"""Gradients through blocks that are checkpointed with `use_reentrant=True`.

Such a block gives gradients only where an input of its own requires one. The first block of a stack
gets the output of frozen layers (embeddings, convolutions over pixels or sound), which requires
none, so nothing in it would train. transformers' `enable_input_require_grads` helps where the input
is a token embedding; here the block's own input requires a gradient, whatever it was made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer


def let_gradients_in(model: nn.Module) -> list[RemovableHandle]:
    """Hooks on the blocks of a transformers model; they act while such checkpointing is on."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [block.register_forward_pre_hook(_require) for block in blocks]


def _require(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # Any: of a block's forward
    if not (vars(block).get("gradient_checkpointing") and block.training):
        return None
    options: dict[str, Any] = getattr(block._gradient_checkpointing_func, "keywords", {})
    first = args[0] if args else None
    if not (options.get("use_reentrant") and torch.is_grad_enabled()):
        return None
    if not isinstance(first, Tensor) or first.requires_grad or not first.is_floating_point():
        return None
    return (first.detach().requires_grad_(), *args[1:])
