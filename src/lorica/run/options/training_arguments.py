"""Fields of transformers' TrainingArguments, which are options under their own names.

transformers reads and types them; what is checked here are values that it would accept and fail on
in the middle of the run.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from lorica.run.options.checks import (
    MOST,
    check_whole,
    flag,
    is_number,
    json_option,
    refuse,
)

NEED_EVALUATION = (
    "eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size",
)  # fmt: skip
_AT_LEAST = {
    "per_device_eval_batch_size": 1, "eval_accumulation_steps": 1, "torch_empty_cache_steps": 1,
    "dataloader_num_workers": 0,
}  # fmt: skip
_CADENCES = ("save_steps", "eval_steps", "logging_steps")
_PACKAGES = {"deepspeed": "deepspeed", "use_liger_kernel": "liger_kernel"}
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")


@dataclass(frozen=True, kw_only=True)
class TrainingArgumentsOptions:
    """`further` holds the fields that were given, by name."""

    further: Annotated[dict[str, Any], tyro.conf.SuppressFixed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # `null` leaves an option unset, transformers' as well as ours.
        given = {name: value for name, value in self.further.items() if value is not None}
        object.__setattr__(self, "further", given)

    def check_further(self) -> None:
        """Raises UsageError: a value that transformers would accept and fail on later."""
        for name, value in self.further.items():
            _check(name, value)
        for name, package in _PACKAGES.items():
            refuse(
                bool(self.further.get(name)) and importlib.util.find_spec(package) is None,
                f"`{flag(name)}`: the package {package.replace('_', '-')} is not installed; install"
                " it, or leave the option out",
            )


def _check(name: str, value: Any) -> None:
    given = f"`{flag(name)} {f'{value:g}' if isinstance(value, float) else value}`"
    if is_number(value):
        refuse(not math.isfinite(value), f"{given}: a finite number is wanted")
        if name in _AT_LEAST:
            check_whole(name, value, least=_AT_LEAST[name], most=MOST)
        refuse(
            name in _CADENCES and value <= 0,
            f"{given}: it is a number of steps above 0, or a fraction of them; to have none type"
            f" `{flag(name.replace('steps', 'strategy'))} no`",
        )
    if name in _FILES and isinstance(value, str):
        json_option(name, value)
