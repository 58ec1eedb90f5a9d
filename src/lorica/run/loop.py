"""The steps of a run, from its configuration on disk to its result."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import transformers.trainer
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from lorica import __version__, formats
from lorica.run import checkpoints, config, resume
from lorica.run.folder import strict
from lorica.run.layers import layers
from lorica.run.log import CONFUSION, DEGENERATE, RunLog, degenerate, measures, peak_memory
from lorica.run.plan import RunPlan
from lorica.run.token_weighting import TokenWeighted
from lorica.run.trainer import TrainerMixin
from lorica.text import clock

logger = logging.getLogger("lorica")


class RunTrainer(TrainerMixin, TokenWeighted):
    """The Trainer of every verb."""


def begin(
    plan: RunPlan[Any, Any], trainer: RunTrainer, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    """Give the Trainer the caller's callbacks, and write the run's configuration.

    Raises:
        NotSaved: the disk refuses it.
    """
    resume.regain_defaults(plan)
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    if plan.main:
        if plan.options.overwrite_output_dir:
            plan.folder.clear()
        (plan.folder / "result.json").unlink(missing_ok=True)
        with checkpoints.saving("config.yaml", plan.folder.path):
            config.write(plan)


def take_steps(plan: RunPlan[Any, Any], trainer: RunTrainer, log: RunLog) -> None:
    """Train, from the checkpoint where there is one. The weights are then those that are kept."""
    if plan.checkpoint is not None and resume.finished_before(plan):
        _restore_finished(plan, plan.checkpoint, trainer, log)  # else one more step is taken
        return
    if plan.checkpoint is not None:
        plan.arguments.training.eval_on_start = False  # it was done, and is in the log
    trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
    if not trainer.state.global_step:
        raise ValueError(
            "no optimizer step was taken, so nothing was trained and nothing is written; give more"
            " data, or a smaller `--per-device-train-batch-size`"
        )


def _restore_finished(
    plan: RunPlan[Any, Any], checkpoint: Path, trainer: RunTrainer, log: RunLog
) -> None:
    """The state of a run that had taken its last step, without another one."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer.state = state
    align = vars(transformers.trainer).get("align_special_tokens")
    if align is not None:  # as the Trainer does before its first step
        align(plan.model, plan.data.tokenizer)
    trainer.load_optimizer(checkpoint)
    log.begin(state)
    step = _kept_step(plan, state)
    formats.restore(plan.adapters, checkpoint.parent / f"checkpoint-{step}")


def _kept_step(plan: RunPlan[Any, Any], state: TrainerState) -> int:
    """The step whose weights are kept: the best evaluation's, else the last one."""
    best = state.best_global_step if plan.arguments.training.load_best_model_at_end else None
    return best or state.global_step


def _evaluation(plan: RunPlan[Any, Any], trainer: RunTrainer) -> dict[str, Any] | None:
    """What was logged of the weights that are kept; None: there is nothing to evaluate on."""
    if not plan.data.evaluates or plan.arguments.training.eval_strategy == "no":
        return None
    step = _kept_step(plan, trainer.state)

    def logged() -> dict[str, Any] | None:
        lines = reversed(trainer.state.log_history)
        return next((x for x in lines if x["step"] == step and "eval_loss" in x), None)

    found = logged()
    if found is None:
        figures = trainer.evaluate()  # logs them, under the last step
        found = logged() or figures
    return found


def measured(plan: RunPlan[Any, Any], trainer: RunTrainer, log: RunLog) -> dict[str, Any]:
    """What every verb's result.json holds of the steps and of what was trained."""
    found = _evaluation(plan, trainer)
    figures = {k: v for k, v in (found or {}).items() if k.startswith("eval_") and measures(k)}
    alike = (found or {}).get(DEGENERATE)
    adapters, state, summary = plan.adapters, trainer.state, plan.adapters.summary
    lines = [line for line in state.log_history if "loss" in line]
    training = plan.arguments.training
    best = bool(training.load_best_model_at_end and state.best_global_step)
    return {
        "method": adapters.recipe.text(),
        "recipe": adapters.recipe.to_dict(),
        "steps": state.global_step,
        "steps_left_out": trainer.steps_left_out(),
        "epochs": state.epoch,
        "loss": lines[-1]["loss"] if lines else None,
        "train_loss": mean_loss(lines),
        "learning_rate": plan.arguments.learning_rate,
        "evaluation": None if found is None else figures,
        "degenerate": None if alike is None else degenerate(alike),
        "confusion": (found or {}).get(CONFUSION),
        "best_step": state.best_global_step if best else None,
        "tokens": state.num_input_tokens_seen,
        "seconds": round(log.seconds, 3),
        "seconds_with_loading": round(time.perf_counter() - plan.began + log.before, 3),
        "tokens_per_second": round(state.num_input_tokens_seen / max(log.seconds, 1e-9), 1),
        "peak_memory": peak_memory(plan.device),
        "device": str(plan.device),
        "processes": training.world_size,
        "trainable": summary.trainable,
        "parameters": summary.total,
        "summary": summary.as_dict(),
        "layers": layers(plan.adapters),
        "adapter_sha256": adapters.fingerprint(),
    }


def unwrap(plan: RunPlan[Any, Any], trainer: RunTrainer) -> None:
    """Give the model its own precision back: with `--bf16` its forward pass was wrapped."""
    plan.model = trainer.accelerator.unwrap_model(plan.model, keep_fp32_wrapper=False)


def write_result(plan: RunPlan[Any, Any], result: dict[str, Any], log: RunLog) -> dict[str, Any]:
    """Write result.json: with it the run is done.

    Returns:
        The same in strict JSON's values: None for what is no finite number.

    Raises:
        NotSaved: the disk refuses it.
    """
    result = strict(result)
    log.check()
    if plan.main:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        with checkpoints.saving("result.json", plan.folder.path):
            plan.folder.write("result.json", text + "\n")
        left_out = f", {n} of them left out" if (n := result["steps_left_out"]) else ""
        logger.info(
            f"{result['steps']} steps in {clock(result['seconds'])}{left_out};"
            f" {result['output']} is written"
        )
    return result


def mean_loss(lines: list[dict[str, Any]]) -> float | None:
    """Mean of the logged losses, each weighed by the steps since the line before.

    Example:
        >>> mean_loss([{"step": 1, "loss": 4.0}, {"step": 4, "loss": 2.0}])
        2.5
    """
    total = last = 0.0
    for line in lines:
        total += (line["step"] - last) * (line["loss"] or 0.0)
        last = line["step"]
    return total / last if last else None


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on."""
    own = {"python": platform.python_version(), "lorica": __version__}
    names = ("torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")
    return {**own, **{name: metadata.version(name) for name in names}}
