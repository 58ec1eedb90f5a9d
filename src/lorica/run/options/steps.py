"""How it trains: rates, length, batches, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorica.run.options.checks import (
    MOST,
    check_above_zero,
    check_not_both,
    check_whole,
    refuse,
)
from lorica.run.options.kinds import HINT, NUMBER, TEXT, WHOLE


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The optimizer's steps.

    Args:
        learning_rate: peak learning rate. Default: the method's own.
        modules_learning_rate: peak learning rate of modules that train in full next to the
            adapters: modules to save, a new head; in pre-training also embeddings and norms.
            Default: the same as `learning_rate`.
        lr_scheduler_type: learning rate schedule, by its name in transformers.
        warmup_ratio: fraction of all steps in which the rate rises from 0.
        max_steps: number of optimizer steps, instead of epochs.
        per_device_train_batch_size: sequences per device and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step. Every token (or label)
            has the same weight in the loss, however the tokens are spread over the passes.
        seed: seed of every random draw: initial factors, order of the data, dropout.
        bf16: compute in bfloat16 (autocast); trained parameters stay in float32.
        gradient_checkpointing: save memory by recomputing activations in backward.
        attn_implementation: attention implementation, by its name in transformers, e.g. `sdpa`
            or `eager`. Default: transformers' choice.
    """

    learning_rate: Annotated[float | None, NUMBER, HINT] = None
    modules_learning_rate: Annotated[float | None, NUMBER, HINT] = None
    lr_scheduler_type: Annotated[str, TEXT, HINT] = "cosine"
    warmup_ratio: Annotated[float | None, NUMBER, HINT] = None
    num_train_epochs: Annotated[float | None, NUMBER, HINT] = None
    max_steps: Annotated[int | None, WHOLE, HINT] = None
    per_device_train_batch_size: Annotated[int, WHOLE, HINT] = 8
    gradient_accumulation_steps: Annotated[int, WHOLE, HINT] = 1
    seed: Annotated[int, WHOLE, HINT] = 42
    bf16: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: Annotated[str | None, TEXT, HINT] = None

    def check_steps(self) -> None:
        """Raises UsageError: a value out of range, or the length of the run given twice."""
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
            check_whole(name, getattr(self, name))
        for name in ("learning_rate", "modules_learning_rate", "num_train_epochs"):
            check_above_zero(name, getattr(self, name))
        epochs, warmup = self.num_train_epochs, self.warmup_ratio
        refuse(
            epochs is not None and epochs > MOST,
            f"`--num-train-epochs {epochs or 0:g}`: a run has {MOST:,} passes at most",
        )
        refuse(
            warmup is not None and not 0 <= warmup < 1,
            f"`--warmup-ratio {warmup}`: it is a fraction of the steps, at least 0 and below 1; a"
            " number of steps is `--warmup-steps`",
        )
        refuse(
            not 0 <= self.seed < 2**32,
            f"`--seed {self.seed}`: it is a whole number from 0 to 4294967295",
        )
        check_not_both(
            "max_steps", self.max_steps, "num_train_epochs", epochs,
            "the length of a run is given once",
        )  # fmt: skip
