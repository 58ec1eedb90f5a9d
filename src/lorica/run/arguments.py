"""The TrainingArguments of a run: what the user gave, and what follows from the run's length.

transformers is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any

from lorica.run.effects import check_curve, refuse_unread, refuse_without_effect, warms_up
from lorica.run.options import UsageError
from lorica.run.options.checks import MOST, flag, refuse
from lorica.run.plan import RunArguments, RunPlan
from lorica.run.recipe import curved, curves
from lorica.text import parse_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger("lorica")

LOG_LINES = 50  # a run's log has about this many lines, ...
LOG_STEPS = 50  # ... and there are at most this many steps between two of them
EVALUATIONS = 5  # in a run whose length is given in steps


def cadence(plan: RunPlan[Any, Any], steps: int, *, by_epoch: bool) -> dict[str, Any]:
    """How often the run logs, evaluates and saves, and its optimizer's name: arguments that are the
    user's where they were given.

    Args:
        steps: of the whole run.
        by_epoch: evaluate and save after every epoch.
    """
    further = dict(plan.options.further)
    every = max(1, math.ceil(steps / EVALUATIONS))
    saves: dict[str, Any] = {"save_strategy": "epoch" if by_epoch else "steps"}
    if "save_steps" in further:
        saves["save_strategy"] = "steps"
    elif not by_epoch:
        saves["save_steps"] = every
    evaluates: dict[str, Any] = {}
    if plan.data.evaluates:
        evaluates["eval_strategy"] = saves["save_strategy"]
        if "eval_steps" in further:
            evaluates["eval_strategy"] = "steps"
        elif "eval_strategy" not in further and saves["save_strategy"] == "steps":
            evaluates["eval_steps"] = further.get("save_steps", every)
    values: dict[str, Any] = {
        "logging_steps": max(1, min(LOG_STEPS, steps // LOG_LINES)),
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,  # a loss that is no number is told, not averaged away
        "log_level": "error",
        **saves,
        **evaluates,
        **further,
    }
    for what in ("logging", "save", "eval"):  # no step where it does not go by steps
        if values.get(f"{what}_strategy", "steps") != "steps" and f"{what}_steps" not in further:
            values.pop(f"{what}_steps", None)
    if values["save_strategy"] == "no" and "save_total_limit" not in further:
        del values["save_total_limit"]
    if plan.recipe is not None and "optim" not in further:
        from transformers import TrainingArguments

        names = plan.recipe.rule.trainer_names
        default = TrainingArguments.__dataclass_fields__["optim"].default
        if names and getattr(default, "value", default) not in names:
            values["optim"] = min(names)
    return values


def training_arguments(
    plan: RunPlan[Any, Any],
    values: dict[str, Any],
    *,
    learning_rate: float,
    steps: int,
    max_steps: int | None,
    epochs: float,
    warmup_ratio: float,
    gathers: bool,
    **fixed: Any,
) -> RunArguments:
    """The arguments of this run. Where a schedule of the method brings the curve that
    `--lr-scheduler-type` names, `plan.recipe` becomes the recipe with that curve.

    Args:
        values: see `cadence`.
        learning_rate: peak rate.
        steps: of the whole run.
        max_steps: the same where the run's length is given in steps, else None.
        epochs: the run's length, where it is not.
        warmup_ratio: fraction of the steps, where the user said nothing.
        gathers: whether what the run writes at its end can be gathered from shards.
        fixed: arguments that the verb decides.

    Raises:
        UsageError: transformers refuses them, or they do not go together.
    """
    from transformers import TrainingArguments

    options, values = plan.options, dict(values)
    refuse(
        steps > MOST,
        f"this run would take {steps:,} steps, and {MOST:,} is the most; give a smaller"
        " `--max-steps`, or fewer tokens or passes",
    )
    warmup = warmup_ratio if options.warmup_ratio is None else options.warmup_ratio
    warming = math.ceil(warmup * steps)
    # The first step of a warm-up has rate 0: a warm-up of one step would only waste it, and a run
    # that is all warm-up would move nothing.
    if warming <= 1 or (options.warmup_ratio is None and warming >= steps):
        warmup = 0.0
    curve = _curve(plan, options.lr_scheduler_type, steps, warmup)
    if curve == options.lr_scheduler_type and not warms_up(curve):
        warmup = 0.0
    kept = dict(values)
    fixed = {
        "output_dir": str(plan.folder.path),
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "num_train_epochs": epochs,
        "max_steps": max_steps or -1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": curve,
        "seed": options.seed,
        "bf16": options.bf16,
        "report_to": list(options.report_to),
        "disable_tqdm": True,
        "remove_unused_columns": False,  # the rows hold what the model takes, and nothing else
        **fixed,
    }
    if "warmup_steps" not in options.further:
        fixed["warmup_steps"] = warmup
    if plan.device.type == "cpu":
        fixed["use_cpu"] = True
    if options.gradient_checkpointing:
        fields = TrainingArguments.__dataclass_fields__
        newer = "activation_checkpointing" in fields
        name = "activation_checkpointing" if newer else "gradient_checkpointing"
        fixed[name], values[f"{name}_kwargs"] = True, _recomputing(values)
    refuse_without_effect(plan, values)
    try:
        training = TrainingArguments(**{**values, **fixed})
    except (
        ValueError, TypeError, OSError, KeyError, AttributeError, RuntimeError, ImportError,
    ) as error:  # fmt: skip
        raise UsageError(
            f"transformers refuses these options: {' '.join(str(error).split()).rstrip('.')}."
            " Leave out or correct the one that it names"
        ) from None
    check_curve(plan, training, steps)
    if plan.recipe is not None:  # else the adapter brings it
        refuse_unread(plan, plan.recipe, training)
    refuse_best_without_checkpoint(training)
    refuse_sharding(plan, training, gathers=gathers)
    if training.n_gpu > 1:
        training._n_gpu = 1  # copies of one process would lose the adapters' bookkeeping
        logger.info(
            f"one process trains on one GPU; `torchrun -m lorica {plan.verb}` takes several"
        )
    return RunArguments(training=training, learning_rate=learning_rate, values=kept)


def _recomputing(values: dict[str, Any]) -> dict[str, Any]:
    """How activations are recomputed: as the user says, and without reentrant segments otherwise.

    Args:
        values: of which the two names of this option are taken out.

    Raises:
        UsageError: both were given, or it is no mapping.
    """
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    given = {flag(name): values.pop(name) for name in names if name in values}
    refuse(len(given) > 1, f"`{'` and `'.join(given)}` are two names of one option; give one")
    for name, value in given.items():
        own: Any = None
        with contextlib.suppress(ValueError):
            own = parse_json(value) if isinstance(value, str) else value
        refuse(
            not isinstance(own, dict),
            f"""`{name} {value}`: a JSON mapping is wanted, e.g. '{{"use_reentrant": true}}'""",
        )
        return {"use_reentrant": False, **own}
    return {"use_reentrant": False}


def _curve(plan: RunPlan[Any, Any], name: str, steps: int, warmup: float) -> str:
    """What transformers is to do with the rate: `name`, or nothing where a schedule of the method
    brings that curve.

    Raises:
        UsageError: neither knows it.
    """
    from transformers import SchedulerType

    known = [kind.value for kind in SchedulerType]
    if name in known:
        return name
    brought = curves(plan.recipe)
    if plan.recipe is None or name not in brought:
        raise UsageError(
            f"`--lr-scheduler-type {name}`: neither transformers nor a schedule of the method knows"
            f" it; allowed here: {', '.join([*brought, *known])}"
        )
    count = plan.options.further.get("warmup_steps", warmup)
    count = math.ceil(count * steps) if count < 1 else int(count)
    plan.recipe = curved(plan.recipe, name, count)
    return SchedulerType.CONSTANT.value


def refuse_sharding(plan: RunPlan[Any, Any], training: TrainingArguments, *, gathers: bool) -> None:
    """Refuse FSDP where it is impossible, or would have no effect.

    Raises:
        UsageError: it is asked for.
    """
    if not training.fsdp:
        return
    plugin: Any = training.fsdp_plugin_args
    refuse(
        plugin["fsdp_version"] != 2,
        "`--fsdp-config` asks for version 1 of FSDP, which flattens parameters, so that updates"
        ' cannot reach theirs; type `"version": 2` there, or leave it out',
    )
    refuse(
        not gathers,
        "`--fsdp`: this run writes a whole model at its end, into which a sharded one cannot be"
        " merged; leave it out, and each process holds the model (DDP)",
    )
    refuse(
        plan.device.type == "cpu",
        "`--fsdp` shards over accelerators only: on the CPU Accelerate passes over it; leave it"
        " out, and each process holds the model (DDP)",
    )


def refuse_best_without_checkpoint(training: TrainingArguments) -> None:
    """Refuse to keep the best weights where the best evaluation may have no checkpoint.

    Raises:
        UsageError: evaluations and checkpoints do not fall together.
    """
    by_steps = training.load_best_model_at_end and training.save_strategy == "steps"
    evals, saves = training.eval_steps or 0, training.save_steps
    refuse(
        by_steps and evals != saves,
        "`--load-best-model-at-end` keeps the weights of the best evaluation, and with"
        f" `--eval-steps {evals:g}` and `--save-steps {saves:g}` not every evaluation has a"
        " checkpoint; give both the same number",
    )
