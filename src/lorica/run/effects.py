"""Fields of TrainingArguments that have an effect in some runs only, and where.

A field that is given without having an effect is refused. What a run decides by itself is no option
at all; every other field is passed on and acts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorica.run.options.checks import UsageError, flag
from lorica.run.plan import RunPlan

Condition = tuple[Callable[[RunPlan[Any, Any]], bool], str]


def _further(plan: RunPlan[Any, Any], name: str) -> bool:
    return bool(plan.options.further.get(name))


_ACCELERATOR: Condition = (lambda plan: plan.device.type != "cpu", "on a CPU")
_PROCESSES: Condition = (lambda plan: plan.processes > 1, "in a single process")
_WORKERS: Condition = (
    lambda plan: _further(plan, "dataloader_num_workers"), "without `--dataloader-num-workers`",
)  # fmt: skip
_EVALUATION: Condition = (lambda plan: plan.data.evaluates, "without data to evaluate on")
_HUB: Condition = (lambda plan: _further(plan, "push_to_hub"), "without `--push-to-hub`")

CONDITIONS: dict[str, Condition] = {
    **dict.fromkeys(("tf32", "fp16", "fp16_full_eval", "torch_empty_cache_steps"), _ACCELERATOR),
    **dict.fromkeys(
        ("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), _PROCESSES
    ),
    **dict.fromkeys(
        (
            "dataloader_prefetch_factor", "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
        ),
        _WORKERS,
    ),
    **dict.fromkeys(("eval_delay", "eval_accumulation_steps", "bf16_full_eval"), _EVALUATION),
    **dict.fromkeys(
        ("hub_model_id", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"), _HUB
    ),
    "optim_target_modules": (lambda plan: False, "here, since the method brings its own optimizer"),
}  # fmt: skip


def refuse_without_effect(plan: RunPlan[Any, Any]) -> None:
    """Check the fields that were given.

    Raises:
        UsageError: one has no effect in this run.
    """
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    for name, value in plan.options.further.items():
        if name not in CONDITIONS or value == fields[name].default:
            continue
        acts, where = CONDITIONS[name]
        if not acts(plan):
            given = flag(name) if value is True else f"{flag(name)} {value}"
            raise UsageError(f"`{given}` has no effect {where}; leave it out")
