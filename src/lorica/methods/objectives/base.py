"""Objectives: how the task's loss is changed: a penalty, a distillation, a re-weighting.

`loss(task_loss, context)` returns the new loss; `context` holds the outputs, the batch and the
adapters of one micro-batch. Penalties are multiplied with `context.share`, so that they count once
per optimizer step under gradient accumulation. They apply in training, never in evaluation.

To add one: copy `orthogonality.py`.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.methods.choice import Choice


@dataclass(frozen=True)
class Context:
    """What the objectives see of one micro-batch; they share it."""

    outputs: Any
    batch: Any
    adapters: Any
    share: float = 1.0  # of the update, by label tokens: what a penalty is multiplied with

    @functools.cached_property
    def reference(self) -> Any:
        """What the original model says to this batch, without a gradient and without dropout: run
        on first use, once for all objectives.

        Raises:
            ValueError: `adapters.loss` was called without the batch.
        """
        if self.batch is None:
            raise ValueError(
                "this objective compares with the original model, which needs the inputs: call"
                " `adapters.loss(outputs, batch)`"
            )
        model: Any = self.adapters.model
        wanted = "hidden_states" in self.adapters.hooks.wanted
        inputs, config = dict(self.batch), vars(model).get("config")
        if not getattr(config, "is_encoder_decoder", False):  # its decoder's inputs are the labels
            inputs.pop("labels", None)
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad(), self.adapters.disabled():
                return model(**inputs, **({"output_hidden_states": True} if wanted else {}))
        finally:
            for module, mode in modes.items():
                module.training = mode


@dataclass(frozen=True, kw_only=True)
class AbstractObjective(Choice, abc.ABC):
    axis: ClassVar[str] = "objectives"

    @abc.abstractmethod
    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        """The loss to differentiate, from the task's (0-d)."""
