"""What each field of transformers' TrainingArguments does in a run of Lorica.

A field is in one of four tables. `ACTS`: it has its effect in every run. `CONDITIONS`: in some runs
only; given where it has none, it is refused. `REFUSED`: in no run, or not the one it promises; the
message says what to type instead. `DECIDED`: the run decides it, so it is no option at all. The
tests walk the fields of the installed transformers, so that a new one is put into one of the
tables.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorica.run.options.checks import UsageError, flag, json_option
from lorica.run.plan import RunPlan

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lorica.recipe.recipe import Recipe

Values = Mapping[str, Any]
Condition = tuple[Callable[[RunPlan[Any, Any], Values], bool], str]

DECIDED = frozenset(
    {
        "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank",
        "disable_tqdm", "remove_unused_columns", "include_num_input_tokens_seen",
        "activation_checkpointing", "label_names",
    }
)  # fmt: skip

ACTS = frozenset(
    {
        # the rate and the optimizer; what a rule does not read is found by `refuse_unread`
        "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
        "adam_epsilon", "max_grad_norm",
        # the loss and the model
        "label_smoothing_factor", "neftune_noise_alpha", "torch_compile", "torch_compile_backend",
        "torch_compile_mode", "use_liger_kernel", "full_determinism", "use_cpu", "deepspeed",
        "fsdp",
        # the log
        "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level",
        # evaluations (without data for them `NEED_EVALUATION` refuses these) and checkpoints
        "eval_strategy", "eval_on_start", "per_device_eval_batch_size", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "save_strategy",
        # the rows
        "dataloader_num_workers",
    }
)  # fmt: skip


def _given(name: str) -> Callable[[RunPlan[Any, Any], Values], bool]:
    return lambda plan, values: bool(values.get(name))


def _by_steps(what: str) -> Condition:
    name = f"{what}_strategy"
    return (
        lambda plan, values: values.get(name, "steps") == "steps",
        f"with a `{flag(name)}` that does not go by steps",
    )


def _evaluates(plan: RunPlan[Any, Any], values: Values) -> bool:
    return plan.data.evaluates and values.get("eval_strategy", "no") != "no"


def _accelerates(plan: RunPlan[Any, Any], values: Values) -> bool:
    """Whether a key of `accelerator_config` acts: most are about several processes."""
    config: Any = values["accelerator_config"]
    if isinstance(config, str):
        config = json_option("accelerator_config", config)
    keys = set(config) & {"use_seedable_sampler", "mixed_precision"}
    return plan.processes > 1 or bool(keys) or plan.device.type != "cpu"


_ACCELERATOR: Condition = (lambda plan, values: plan.device.type != "cpu", "on a CPU")
_PROCESSES: Condition = (lambda plan, values: plan.processes > 1, "in a single process")
_WORKERS: Condition = (_given("dataloader_num_workers"), "without `--dataloader-num-workers`")
_EVALUATION: Condition = (_evaluates, "without evaluations")
_CHECKPOINTS: Condition = (
    lambda plan, values: values.get("save_strategy") != "no", "without checkpoints"
)  # fmt: skip
_TRACKIO: Condition = (
    lambda plan, values: "trackio" in plan.options.report_to, "without `--report-to trackio`"
)  # fmt: skip

CONDITIONS: dict[str, Condition] = {
    **dict.fromkeys(
        ("tf32", "fp16", "fp16_full_eval", "torch_empty_cache_steps", "dataloader_pin_memory"),
        _ACCELERATOR,
    ),
    **dict.fromkeys(
        (
            "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
            "ddp_timeout", "ddp_find_unused_parameters", "average_tokens_across_devices",
            "eval_use_gather_object", "log_on_each_node", "log_level_replica", "save_on_each_node",
        ),
        _PROCESSES,
    ),
    **dict.fromkeys(
        (
            "dataloader_prefetch_factor", "dataloader_persistent_workers",
            "dataloader_multiprocessing_context", "dataloader_in_order",
        ),
        _WORKERS,
    ),
    **dict.fromkeys(("eval_delay", "bf16_full_eval"), _EVALUATION),
    "eval_accumulation_steps": (
        lambda plan, values: _evaluates(plan, values) and plan.data.measured,
        "where evaluations keep no predictions (their only figures are means of the loss)",
    ),
    "eval_steps": _by_steps("eval"),
    "save_steps": _by_steps("save"),
    "logging_steps": _by_steps("logging"),
    **dict.fromkeys(("save_total_limit", "save_only_model"), _CHECKPOINTS),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKIO
    ),
    "run_name": (
        lambda plan, values: bool({*plan.options.report_to} - {"none", "tensorboard"}),
        "without a tracker in `--report-to` that names runs, such as `wandb`",
    ),
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        (
            lambda plan, values: plan.options.gradient_checkpointing,
            "without `--gradient-checkpointing`",
        ),
    ),
    "liger_kernel_config": (_given("use_liger_kernel"), "without `--use-liger-kernel`"),
    "fsdp_config": (_given("fsdp"), "without `--fsdp`"),
    "accelerator_config": (_accelerates, "in a single process on a CPU"),
    "debug": (
        lambda plan, values: "underflow_overflow" in values["debug"],
        "here, but for `--debug underflow_overflow`",
    ),
    "data_seed": (
        lambda plan, values: plan.data.shuffled, "with `--streaming`, which reads in order"
    ),
    "train_sampling_strategy": (
        lambda plan, values: plan.data.shuffled
        and (not plan.data.uniform or "length" not in values["train_sampling_strategy"])
        and (not plan.data.uniform or "balance" not in values["train_sampling_strategy"]),
        "on rows that are read in order, or all of one length",
    ),
    "dataloader_drop_last": (
        lambda plan, values: not plan.data.uniform, "in `pretrain`, where every batch is full"
    ),
}  # fmt: skip

_UPLOAD = "a run writes to its folder alone; upload what it made: `lorica push OUT OWNER/NAME`"
_FIGURES = "what an evaluation measures follows from the task; leave it out"

REFUSED: dict[str, str] = {
    "optim_target_modules": (
        "the method brings its own optimizer; what trains is named by `--target-modules`"
    ),
    "optim_args": (
        "arguments of an optimizer are written in the method, e.g. `--method"
        " 'lora+sgd(momentum=0.9)'`"
    ),
    "use_cache": "training has no use for a cache of keys and values; leave it out",
    "auto_find_batch_size": (
        "a second attempt would begin with the weights and the schedules of the first; type a"
        " smaller `--per-device-train-batch-size`, and with as many more"
        " `--gradient-accumulation-steps` the step stays the same"
    ),
    "enable_jit_checkpoint": "a run saves at SIGTERM by itself; leave it out",
    "ignore_data_skip": (
        "a resumed run continues with the row after the last one that it has trained on; leave it"
        " out, or start a run with another `--seed`"
    ),
    "restore_callback_states_from_checkpoint": "a resumed run does that by itself; leave it out",
    "skip_memory_metrics": "every line of metrics.jsonl has the peak memory; leave it out",
    "length_column_name": "rows have the length that the model sees; leave it out",
    "parallelism_config": (
        "it is an object of Accelerate, which no text names; `--fsdp` shards a model"
    ),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
            "hub_always_push", "hub_revision",
        ),
        _UPLOAD,
    ),
    **dict.fromkeys(
        (
            "prediction_loss_only", "batch_eval_metrics", "include_for_metrics",
            "eval_do_concat_batches",
        ),
        _FIGURES,
    ),
}  # fmt: skip


def refuse_without_effect(plan: RunPlan[Any, Any], values: Values) -> None:
    """Check the fields that were given.

    Args:
        values: what TrainingArguments will be made of.

    Raises:
        UsageError: one has no effect in this run, or not the one it promises.
    """
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    for name, value in plan.options.further.items():
        if value == fields[name].default:
            continue
        given = flag(name) if value is True else f"{flag(name)} {value}"
        if name in REFUSED:
            raise UsageError(f"`{given}`: {REFUSED[name]}")
        acts, where = CONDITIONS.get(name, (_always, ""))
        if not acts(plan, values):
            raise UsageError(f"`{given}` has no effect {where}; leave it out")


def _always(plan: RunPlan[Any, Any], values: Values) -> bool:
    return True


_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def refuse_unread(plan: RunPlan[Any, Any], recipe: Recipe, training: TrainingArguments) -> None:
    """Check the optimizer's fields that were given against the rule that would read them.

    Raises:
        UsageError: the rule does not.
    """
    import torch

    from lorica.methods.optional import ClipsItself

    further, rule = plan.options.further, recipe.rule
    if isinstance(rule, ClipsItself) and further.get("max_grad_norm"):
        raise UsageError(
            f"`--max-grad-norm {further['max_grad_norm']:g}`: `{rule.name}` limits its own step,"
            " and clipped gradients would spoil that; leave it out"
        )
    read = rule.options_from(training)
    for name in [name for name in _OPTIMIZERS if name in further]:
        unset = copy.copy(training)
        setattr(unset, name, type(training).__dataclass_fields__[name].default)
        if getattr(training, name) != getattr(unset, name) and rule.options_from(unset) == read:
            raise UsageError(
                f"`{flag(name)} {further[name]:g}` has no effect here: `{rule.name}`, the method's"
                " optimizer, does not read it; leave it out"
            )
        try:
            rule.build([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], dict(read))
        except ValueError as error:
            raise UsageError(f"`{flag(name)} {further[name]:g}`: {error}") from None


_EVERY_CURVE = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def warms_up(curve: str) -> bool:
    """Whether a curve of transformers begins with a warm-up."""
    return "num_warmup_steps" in _parameters(curve)


def check_curve(plan: RunPlan[Any, Any], training: TrainingArguments, steps: int) -> None:
    """Check what was given about the rate's curve against the curve.

    Args:
        steps: of the whole run.

    Raises:
        UsageError: it has no such parameter, lacks one, or has no warm-up.
    """
    import torch
    from transformers import get_scheduler

    options = plan.options
    kind: Any = training.lr_scheduler_type
    curve: str = kind.value
    given: Any = training.lr_scheduler_kwargs or {}
    if not isinstance(given, dict):
        raise UsageError(
            f"`--lr-scheduler-kwargs {given}`: a JSON mapping is wanted, e.g."
            """ '{"num_cycles": 2}'"""
        )
    typed = f"`--lr-scheduler-type {options.lr_scheduler_type}`"
    own = curve == options.lr_scheduler_type  # else a schedule of the method brings the curve
    known = _parameters(curve) if own else {}
    further = [name for name in known if name not in _EVERY_CURVE]
    if given and not further:
        raise UsageError(
            f"`--lr-scheduler-kwargs {json.dumps(given)}` has no effect: {typed} has no parameters;"
            " leave it out"
        )
    lacks = [n for n in further if known[n].default is inspect.Parameter.empty and n not in given]
    lacks = [n for n in lacks if known[n].kind is not inspect.Parameter.VAR_KEYWORD]
    if lacks:
        raise UsageError(
            f"{typed} needs {', '.join(lacks)}: give"
            f" `--lr-scheduler-kwargs '{json.dumps(dict.fromkeys(lacks, 10))}'`"
        )
    warmup = options.warmup_ratio or options.further.get("warmup_steps")
    if own and warmup and not warms_up(curve):
        name = "warmup_steps" if options.warmup_ratio is None else "warmup_ratio"
        raise UsageError(
            f"`{flag(name)} {warmup:g}` has no effect: {typed} has no warm-up; leave it out, or"
            " type `--lr-scheduler-type constant_with_warmup`"
        )
    try:
        nothing = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], lr=1.0)
        get_scheduler(curve, nothing, training.get_warmup_steps(steps), steps, dict(given))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"`--lr-scheduler-kwargs {json.dumps(given)}`: {error}; the parameters of {typed} are"
            f" {', '.join(further)}"
        ) from None


def _parameters(curve: str) -> Mapping[str, inspect.Parameter]:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    function: Any = TYPE_TO_SCHEDULER_FUNCTION[curve]  # type: ignore[index]
    return inspect.signature(function).parameters
