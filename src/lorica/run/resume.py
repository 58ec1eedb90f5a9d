"""A resumed run is the same run: the same options, the same rows, as many processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.run import checkpoints, config
from lorica.run.config import absolute, plain
from lorica.run.options import UsageError
from lorica.run.options.checks import flag
from lorica.run.plan import RunPlan
from lorica.run.recipe import curved

logger = logging.getLogger("lorica")

# What may differ between a run and its resumption: it changes neither weights nor their order.
_FREE = {
    "output_dir", "report_to", "report_html", "logging_steps", "logging_strategy",
    "logging_first_step", "disable_tqdm", "save_total_limit", "run_name", "dataloader_num_workers",
    "dataloader_pin_memory", "log_level", "use_cpu",
}  # fmt: skip


_LENGTHS = {"max_steps": "steps", "max_tokens": "tokens"}  # options that may grow


def check_given(plan: RunPlan[Any, Any]) -> None:
    """Check the options that were typed, before any data is read.

    Raises:
        UsageError: one differs from the run's, its defaults.json was changed, or another number of
            processes would train, which read other rows at a step.
    """
    options = plan.options
    now = {k: plain(v) for k, v in vars(options).items()}
    now |= {k: plain(absolute(now[k], but)) for k, but in options.paths.items()}
    fields = dataclasses.fields(options)
    given = {f.name for f in fields if getattr(options, f.name) != f.default}
    if plan.recipe is not None:
        own = plan.recipe.to_dict()
        now |= {name: plain(own[name]) for name in ("method", *options.recipe_names)}
    _refuse_changed(plan, now, given - {"further", *config.OF_A_CALL})
    if (folder := _folder_before(plan)) is not None:
        config.read_defaults(folder)  # a changed file is refused now, not after the model is loaded
    _refuse_other_processes(plan)


def check_same_run(plan: RunPlan[Any, Any]) -> None:
    """Check everything that is known once the arguments are made, and fill in `plan.earlier`.

    Raises:
        UsageError: an option differs from the run's, or its best checkpoint is damaged.
        ValueError: the rows are other ones.
    """
    plan.earlier = {}
    now, before = config.resolved(plan), config_before(plan)
    _refuse_changed(plan, now, {*now, *(before or {})})
    if plan.checkpoint is None:
        return
    state = _state(plan.checkpoint)
    plan.earlier = state.get("stateful_callbacks", {})
    for name, value in _facts(state).items():
        if plan.data.facts.get(name) != value:
            raise ValueError(
                f"the rows of `{plan.data.source}` are not those that {plan.checkpoint.name} was"
                f" trained on ({name} differs): a file has changed, or the tokenizer has. Put the"
                " old one back, or start a run of its own with another `--output-dir`"
            )
    _check_best(plan, plan.checkpoint, state.get("best_global_step"))


def regain_defaults(plan: RunPlan[Any, Any]) -> None:
    """Note in the adapters' summary which options were not given when the run first began; of a
    resumed run every option is."""
    folder = _folder_before(plan)
    if folder is None:
        return
    now, defaults = config.resolved(plan), plan.adapters.summary.defaults
    for name, default in config.read_defaults(folder).items():
        if now.get(name) == default["value"]:
            defaults[name] = dict(default)


def config_before(plan: RunPlan[Any, Any]) -> dict[str, Any] | None:
    """config.yaml of the run that this one goes on with, if any.

    Raises:
        UsageError: it is no mapping any more.
    """
    folder = _folder_before(plan)
    return None if folder is None else config.read(folder)


def _folder_before(plan: RunPlan[Any, Any]) -> Path | None:
    if plan.options.resume is None:
        return None
    return plan.folder.path if plan.checkpoint is None else plan.checkpoint.parent


def _refuse_changed(plan: RunPlan[Any, Any], now: Mapping[str, Any], names: set[str]) -> None:
    """Of `names`, none has another value than it had."""
    folder, before = _folder_before(plan), config_before(plan)
    if folder is None or before is None:
        return
    changed = {k for k in names - _FREE if before.get(k) != now.get(k)}
    if _method(before) == _method(now):
        changed.discard("method")
    for length in changed & _LENGTHS.keys():
        if not (longer := _lengthened(plan, length, before, now)):
            continue
        changed.discard(length)
        if not changed and plan.main and names >= before.keys():
            logger.info(longer)
    if changed:
        name = min(changed)
        raise UsageError(
            f"`--resume` goes on with the run of {folder / 'config.yaml'}, where `{name}` is"
            f" {before.get(name)!r}, not {now.get(name)!r}: leave that option out, or start a run"
            " of its own with another `--output-dir`"
        )


def _lengthened(
    plan: RunPlan[Any, Any], length: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> str:
    """What to say of a run that is to be longer than it was; "" where it is not.

    Args:
        length: the option that says how long it is.

    Raises:
        UsageError: something is fitted to the number of steps.
    """
    old, new, unit = before.get(length), now.get(length), _LENGTHS[length]
    if not (isinstance(old, int) and isinstance(new, int) and old < new):
        return ""
    from lorica.training.horizon import fitted_curve, fitted_method

    curve = str(before.get("lr_scheduler_type", plan.options.lr_scheduler_type))
    warmup = float(before.get("warmup_steps", before.get("warmup_ratio", 0.0)))
    fitted = "" if plan.recipe is None else fitted_method(plan.recipe)
    if fitted := fitted or fitted_curve(curve, warmup):
        raise UsageError(
            f"`{flag(length)} {new}`: the run had {old} {unit}, and {fitted} is fitted to that"
            " length, so a longer run is another one from its first step on. Leave"
            f" `{flag(length)}` out, or start a run of its own with another `--output-dir`; a run"
            " that is to be lengthened later takes `--lr-scheduler-type constant` and a method"
            " without a schedule"
        )
    return (
        f"the run is lengthened from {old} to {new} {unit}; nothing before that would have been"
        " different, and how often it evaluates, saves and logs stays as it was"
    )


def finished_before(plan: RunPlan[Any, Any]) -> bool:
    """Whether the checkpoint is the end of a run that is no longer than it was."""
    if plan.checkpoint is None:
        return False
    state = _state(plan.checkpoint)
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    steps = plan.arguments.training.max_steps
    longer = state["global_step"] >= state["max_steps"] and steps > state["max_steps"]
    return bool(control.get("should_training_stop")) and not longer


def _method(options: Mapping[str, Any]) -> Any:
    """The method of a config.yaml, or of what was typed, to compare them: with the curve that
    `lr_scheduler_type` writes into it, but for its warm-up, which follows from other options."""
    from lorica.recipe.recipe import Recipe

    text = options.get("method")
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            return curved(Recipe.parse(text), str(options.get("lr_scheduler_type")), 0).text()
    return text


def _refuse_other_processes(plan: RunPlan[Any, Any]) -> None:
    if plan.checkpoint is None:
        return
    now = plan.processes
    before = _facts(_state(plan.checkpoint)).get("processes", now)
    if before != now:
        raise UsageError(
            f"`--resume`: {plan.checkpoint} was trained by {before}"
            f" process{'' if before == 1 else 'es'}, not {now}, which would read other rows; go on"
            f" with `torchrun --nproc-per-node {before} -m lorica {plan.verb} ...`, or start a run"
            " of its own with another `--output-dir`"
        )


def _check_best(plan: RunPlan[Any, Any], checkpoint: Path, step: int | None) -> None:
    """The checkpoint whose weights would be kept is there, before more is trained."""
    if not (plan.arguments.training.load_best_model_at_end and step):
        return
    best = checkpoint.with_name(f"checkpoint-{step}")
    if best != checkpoint and (why := checkpoints.damage(best)) is not None:
        raise UsageError(
            f"`--resume`: the best weights so far are those of {best}, which is damaged: {why}."
            " Put its files back, or start anew with `--overwrite-output-dir`"
        )


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of the data and the processes."""
    callbacks = state.get("stateful_callbacks", {})
    return callbacks.get("RunLog", {}).get("attributes", {}).get("facts", {})
