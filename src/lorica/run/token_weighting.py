"""Every label token weighs the same, however the tokens fall into micro-batches, processes and
evaluation batches.

transformers leaves that to each model's own loss: language models divide by the count it hands
them, BERT's and the generic classification heads take the argument and ignore it (their gradients
then grow with the number of accumulation steps), and evaluation averages the means of batches. Here
the model is only ever asked for the mean over its own micro-batch, and weighing it is one
multiplication.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional


def counted_labels(trainer: Any, inputs: Any) -> Tensor:
    """How many labels of a micro-batch the Trainer's loss averages over; 0-d, int64."""
    labels = inputs["labels"]
    shifted = vars(trainer).get("_loss_shifts_labels", False)  # older Trainers shift none
    return (labels[..., 1:] if shifted else labels).ne(-100).sum()


def share_of_update(trainer: Any, count: Tensor, items: Any) -> Tensor:
    """A micro-batch's part of its update, by label tokens; 0-d.

    Args:
        trainer: whose processes share the update.
        count: labels of the micro-batch.
        items: labels of the update, as the Trainer counts them.
    """
    averages = trainer.args.average_tokens_across_devices
    return count / items * (trainer.accelerator.num_processes if averages else 1)


class TokenWeighted(transformers.Trainer):
    """A Trainer whose losses are means over label tokens (over labels, for sequence
    classification).

    It is right for every model whose loss is a mean over the labels that are not -100. Evaluation
    adds `eval_perplexity` for language models.
    """

    perplexity = False  # to be set where the loss is a log-likelihood of tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Asks for the count and takes the loss as scaled; the model itself is never handed it.
        self.model_accepts_loss_kwargs = True
        self._seen: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def _mean_alone(self) -> Iterator[None]:
        """Within this context no count is made, nor handed to the model."""
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        try:
            yield
        finally:
            self.model_accepts_loss_kwargs = accepts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        count = counted_labels(self, inputs)
        with self._mean_alone():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            loss = loss * share_of_update(self, count.to(loss.device), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        labels = inputs["labels"]
        kept = self._kept(len(labels))
        figures = labels.is_floating_point()
        if kept < len(labels) and not figures:
            labels = labels.clone()
            labels[kept:] = -100
            inputs = {**inputs, "labels": labels}
        count = labels.new_tensor(kept) if figures else counted_labels(self, inputs)
        with self._mean_alone():
            loss, logits, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
        if loss is not None:
            if kept < len(inputs["labels"]) and figures:
                first: Any = logits[0] if isinstance(logits, tuple) else logits
                figure: Any = labels
                loss = functional.mse_loss(first[:kept].reshape(-1), figure[:kept].reshape(-1))
            count = count.to(loss.device)
            total = torch.where(count > 0, loss.detach().double() * count, 0.0)
            self._seen.append((total, count))
        return loss, logits, labels

    def _kept(self, rows: int) -> int:
        """How many rows of this process's batch count: the last one is filled up with rows seen
        before, so that every process has one."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader:
            return rows
        if state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._seen = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._seen and output.metrics is not None:
            sums = torch.stack([torch.stack([a, b.to(a)]) for a, b in self._seen]).sum(0)
            sums = self.accelerator.gather(sums.reshape(1, 2))
            total, count = sums.sum(0).tolist()  # type: ignore[union-attr]
            loss = total / count if count else float("nan")
            output.metrics[f"{prefix}_loss"] = loss
            if self.perplexity:
                output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
        return output
