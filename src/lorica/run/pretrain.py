"""A pre-training run: a model from random weights learns running text.

`pretrain` reads as the run goes: data → arguments → model → train, over one `Pretraining` plan.
Every method starts from the same weights under the same seed, sees the same rows in the same order,
and leaves an ordinary transformers model. What the method has no update for trains in place.

What is heavy (torch, transformers) is imported inside the functions, so that wrong options are
refused at once.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.run import checkpoints, model_configs, resume
from lorica.run.arguments import cadence, training_arguments
from lorica.run.config import absolute
from lorica.run.from_scratch import scratch_rate, scratch_recipe
from lorica.run.options import PretrainOptions
from lorica.run.plan import RunPlan
from lorica.run.pretrain_data import PretrainingData, read_text
from lorica.run.start import started

if TYPE_CHECKING:
    import numpy as np
    from torch.optim import Optimizer
    from transformers import TrainerCallback

    from lorica.run.log import RunLog
    from lorica.run.loop import RunTrainer
    from lorica.run.report.samples import Samples

logger = logging.getLogger("lorica")

WARMUP_RATIO = 0.05  # between SwitchLoRA's 100 of 40,000 steps and GaLore's tenth
EPOCHS = 1.0


@dataclass(kw_only=True)
class Pretraining(RunPlan[PretrainOptions, PretrainingData]):
    """The plan of `lorica pretrain`.

    Attributes:
        rate_from: what chose the learning rate where none was given; filled in with the arguments.
        parameters: elements of the model's parameters; filled in with the model.
        pad_token_id: of the model's configuration, before the Trainer sets it; with the model.
    """

    verb: ClassVar[str] = "pretrain"
    writes: ClassVar[tuple[str, ...]] = ("model", "tokenizer")

    rate_from: str = dataclasses.field(init=False)
    parameters: int = dataclasses.field(init=False)
    pad_token_id: int | None = dataclasses.field(init=False)


def pretrain(
    options: PretrainOptions,
    *,
    then: Callable[[Any, Any], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Pre-train as the options say; returns what result.json holds.

    Args:
        options: see `PretrainOptions`; `further` holds fields of transformers' TrainingArguments.
        then: called with the trained model and its tokenizer once everything is written.
        callbacks: of the Trainer's kind, e.g. `lorica.run.signals.SaveOnSignal()`.

    Raises:
        UsageError: options that cannot be run, before anything is loaded or written.
        ValueError: data, a configuration or a tokenizer that don't fit, a run that diverges. What
            is complete in the folder stays.
    """
    options.check()
    options = options.placed()
    with started(Pretraining, options, scratch_recipe(options)) as plan:
        plan.data = read_text(options, plan.checkpoint, plan.processes)
        plan_steps(plan)
        resume.check_same_run(plan)
        build_model(plan)
        result = train_model(plan, callbacks)
        if then is not None:
            then(plan.model, plan.data.tokenizer)
        return result


def plan_steps(plan: Pretraining) -> None:
    """Work out how long the run is, and fill in `plan.arguments` and `plan.rate_from`.

    Raises:
        UsageError: options that contradict each other.
    """
    options, data = plan.options, plan.data
    epochs = options.num_train_epochs or EPOCHS
    max_steps = options.max_steps
    if options.max_tokens is not None:
        max_steps = math.ceil(options.max_tokens / data.tokens_per_step)
    rows = 0 if data.rows is None else len(data.rows)  # a stream has a number of steps
    steps = max_steps or math.ceil(epochs * (rows // data.rows_per_step))
    assert plan.recipe is not None
    default_rate, plan.rate_from = scratch_rate(plan.recipe)
    plan.arguments = training_arguments(
        plan,
        cadence(plan, steps, by_epoch=False),
        learning_rate=options.learning_rate or default_rate,
        steps=steps,
        max_steps=max_steps,
        epochs=epochs,
        warmup_ratio=WARMUP_RATIO,
        gathers=False,
        include_num_input_tokens_seen="no",  # they are known; counting would wait for a GPU
        ignore_data_skip=options.streaming,  # it finds its place by itself
    )


def build_model(plan: Pretraining) -> None:
    """Make the model and attach the adapters; fill in `plan.model`, `adapters` and `collator`.

    Raises:
        ValueError: the configuration makes no causal language model.
    """
    import torch
    from transformers import set_seed

    import lorica
    from lorica.data.stream import collate
    from lorica.run.cost import count
    from lorica.run.start_from_data import attach_options

    options = plan.options
    trust = options.trust_remote_code
    how: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust}
    if options.attn_implementation is not None:
        how["attn_implementation"] = options.attn_implementation
    set_seed(options.seed)  # whatever was drawn before, every method starts from these weights
    model = model_configs.build(plan.data.config, options.model_config, **how)
    model.name_or_path = absolute(options.model_config, options.paths["model_config"])
    model_configs.check_causal(model, options.model_config)
    assert plan.recipe is not None
    plan.model, plan.collator = model, collate
    plan.pad_token_id, plan.parameters = model.config.pad_token_id, count(model)
    start = attach_options(plan, lambda count: _pool(plan.data, count))
    plan.adapters = lorica.attach(model, plan.recipe, verbose=False, **start)
    defaults = plan.adapters.summary.defaults
    defaults.pop("learning_rate", None)  # of its parts some are for fine-tuning
    if options.learning_rate is None:
        rate = plan.arguments.learning_rate
        defaults["learning_rate"] = {"value": rate, "from": plan.rate_from}
    _describe(plan)


def _pool(data: PretrainingData, count: int) -> np.ndarray:
    """Rows to draw a few batches from: all, or of a stream the first."""
    if data.streamed is not None:
        return data.streamed.head(count)
    assert data.rows is not None
    return data.rows


def _describe(plan: Pretraining) -> None:
    from lorica.model.summary import say

    if not plan.main:
        return
    data = plan.data
    summary = plan.adapters.summary
    say(summary.details() if plan.options.verbose else str(summary))
    if data.text is None or data.rows is None:
        logger.info(f"{data.source}, streamed; {data.tokens_per_step:,} tokens a step")
    else:
        logger.info(
            f"{data.text.documents:,} documents, {len(data.text.ids):,} tokens ->"
            f" {len(data.rows):,} rows of {data.max_length} ({data.rows.size:,} tokens);"
            f" {data.tokens_per_step:,} tokens a step"
        )
    vocabulary: Any = data.config.get_text_config()
    logger.info(
        f"tokenizer: {len(data.tokenizer):,} tokens of a vocabulary of"
        f" {vocabulary.vocab_size:,}; {plan.parameters:,} parameters"
    )
    if data.held is not None:
        logger.info(f"evaluation: {len(data.held):,} rows, {data.held.size:,} tokens")


def train_model(plan: Pretraining, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """Take the steps, and write what was trained; returns what result.json holds.

    Raises:
        ValueError: the run diverges.
        OSError: the disk refuses a file.
    """
    from lorica.run import loop
    from lorica.run.log import RunLog
    from lorica.run.report import reported
    from lorica.run.train_tokenizer import write

    log = RunLog(
        plan.folder,
        plan.device,
        plan.data.facts,
        plan.main,
        tokens_per_step=plan.data.tokens_per_step,
    )
    trainer = _trainer(plan, log)
    loop.begin(plan, trainer, callbacks)
    if plan.main and plan.options.tokenizer is None:  # trained once; a resumed run reads it
        with checkpoints.saving("tokenizer", plan.folder.path):
            write(plan.data.tokenizer, plan.folder / "tokenizer")
    with reported(plan):
        asked = _samples(plan)
        loop.take_steps(plan, trainer, log)
        result = loop.measured(plan, trainer, log) | _figures(plan, trainer)
        result["versions"] = loop.versions()
        loop.unwrap(plan, trainer)
        with checkpoints.saving("what was trained", plan.folder.path):
            result["output"] = str(save(plan))
        asked.finish()
        return loop.write_result(plan, result, log)


def _samples(plan: Pretraining) -> Samples:
    """The examples of the run's page, asked before the first step."""
    from lorica.run.report import samples

    data = plan.data
    held = data.held is not None
    rows: Any = data.held if held else data.rows
    few = [] if rows is None else rows  # a stream is read once
    return samples.Samples(
        plan,
        lambda: samples.from_ids(data.tokenizer, few),
        "evaluation text" if held else "training text",
    )


def _trainer(plan: Pretraining, log: RunLog) -> RunTrainer:
    from lorica.data.stream import Rows
    from lorica.run.log import StreamPlace
    from lorica.run.loop import RunTrainer

    data = plan.data
    callbacks: list[TrainerCallback] = [log]
    if data.streamed is not None:
        callbacks.append(StreamPlace(data.streamed, data.rows_per_step))
        if plan.checkpoint is not None:
            kept = plan.earlier["StreamPlace"]["attributes"]
            data.streamed.resume(kept["place"], kept["consumed"])
    trainer = RunTrainer(
        adapters=plan.adapters,
        modules_learning_rate=plan.options.modules_learning_rate,
        model=plan.model,
        args=plan.arguments.training,
        train_dataset=data.streamed if data.rows is None else Rows(data.rows),
        eval_dataset=None if data.held is None else Rows(data.held),
        data_collator=plan.collator,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )
    trainer.perplexity = True
    return trainer


def save(plan: Pretraining) -> Path:
    """Write `model/`: an ordinary model of transformers, with its tokenizer."""
    from lorica import formats
    from lorica.formats.save import check_state
    from lorica.formats.stored_state import full_state

    check_state(plan.adapters, full_state(plan.adapters))
    out = plan.folder / "model"
    config: Any = plan.model.config
    config.use_cache, config.pad_token_id = True, plan.pad_token_id  # before the Trainer set them
    formats.merge_to(plan.adapters, out, tokenizer=plan.data.tokenizer, overwrite=True)
    return out


def _figures(plan: Pretraining, trainer: RunTrainer) -> dict[str, Any]:
    """What this verb adds to result.json."""
    data, adapters = plan.data, plan.adapters
    found: dict[str, Any] = {
        "task": "pretraining",
        "model_config": plan.model.name_or_path,
        "parameters": plan.parameters,
        "tokens_per_step": data.tokens_per_step,
        "tokens_per_second": pace(plan.folder.lines()),
        "gradient_bytes": sum(
            t.parameter.numel() * t.parameter.element_size() for t in adapters.trained()
        ),
        "optimizer_bytes": state_bytes(trainer.optimizer),
        "schedule_bytes": adapters.summary.memory.get("schedules", 0),
        "model": {
            "class": type(plan.model).__name__,
            "dtype": str(plan.model.dtype).removeprefix("torch."),
            "initial_sha256": adapters.hash_base(),
        },
        "tokenizer": {"name": plan.options.tokenizer, "tokens": len(data.tokenizer)},
        "data": {
            "name": ", ".join(absolute(data.sources)),
            "sha256": data.facts.get("data_sha256"),  # of a stream there is none
            "streaming": plan.options.streaming,
            "max_length": data.max_length,
        },
    }
    if data.text is not None and data.rows is not None:
        found["data"] |= {
            "documents": data.text.documents,
            "tokens": len(data.text.ids),
            "rows": len(data.rows),
        }
    if data.held is not None:
        found["eval_data"] = {
            "sha256": data.facts["eval_data_sha256"],
            "rows": len(data.held),
            "tokens": int(data.held.size),
        }
    return found


def pace(lines: list[dict[str, Any]]) -> float | None:
    """Tokens a second over a run's log: of training alone, whatever the evaluations took.

    Example:
        >>> pace([{"tokens": 100, "tokens_per_second": 50.0},
        ...       {"eval_loss": 1.0}, {"tokens": 200, "tokens_per_second": 100.0}])
        66.7
    """
    seconds = last = 0.0
    for line in lines:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - last) / line["tokens_per_second"]
            last = line["tokens"]
    return round(last / seconds, 1) if seconds else None


def state_bytes(optimizer: Optimizer | None) -> int | None:
    """What an optimizer keeps of its parameters; None: it has taken no step."""
    if optimizer is None:
        return None
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import Tensor

    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    tensors = [v for state in inner.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor) and t.ndim)
