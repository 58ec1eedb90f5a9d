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
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike, Batch, Outputs
from lorica.methods.choice import Choice
from lorica.tensors.modules import evaluating


@dataclass(frozen=True)
class Context:
    """What the objectives see of one micro-batch; all of them get the same object.

    Attributes:
        outputs: what the model returned.
        batch: the model's inputs; None: `adapters.loss` was called without.
        share: this micro-batch's part of the optimizer step, by label tokens; a penalty is
            multiplied with it.
    """

    outputs: Outputs
    batch: Batch | None
    adapters: AdaptersLike
    share: float = 1.0

    @property
    def inputs(self) -> Batch:
        """The batch.

        Raises:
            ValueError: `adapters.loss` was called without the batch.
        """
        if self.batch is None:
            raise ValueError(
                "this objective compares with the original model, which needs the inputs: call"
                " `adapters.loss(outputs, batch)`"
            )
        return self.batch

    @functools.cached_property
    def reference(self) -> Outputs:
        """The original model's outputs for this batch, without gradient and dropout; computed on
        first use, once for all objectives.

        Raises:
            ValueError: `adapters.loss` was called without the batch.
        """
        model = self.adapters.model
        wanted = "hidden_states" in self.adapters.hooks.wanted
        inputs, config = dict(self.inputs), vars(model).get("config")
        if not getattr(config, "is_encoder_decoder", False):  # its decoder's inputs are the labels
            inputs.pop("labels", None)
        with evaluating(model), torch.no_grad(), self.adapters.disabled():
            return model(**inputs, **({"output_hidden_states": True} if wanted else {}))


@dataclass(frozen=True, kw_only=True)
class AbstractObjective(Choice, abc.ABC):
    axis: ClassVar[str] = "objectives"

    @abc.abstractmethod
    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        """The loss to differentiate, from the task's (0-d)."""
