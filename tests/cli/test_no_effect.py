"""An option of transformers that would change nothing is refused; any other one acts."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import pytest
from transformers import TrainerCallback, TrainingArguments

from lorica.run import effects
from lorica.run.options import PretrainOptions, TrainOptions, UsageError


def own_names() -> set[str]:
    """Fields of TrainingArguments that are options of Lorica's, by the same name."""
    options = {f.name for c in (TrainOptions, PretrainOptions) for f in dataclasses.fields(c)}
    return options & TrainingArguments.__dataclass_fields__.keys()


def test_every_field_is_in_one_table():
    tables = {
        "Lorica's own options": own_names() - effects.DECIDED,
        "DECIDED": effects.DECIDED,
        "ACTS": effects.ACTS,
        "CONDITIONS": effects.CONDITIONS.keys(),
        "REFUSED": effects.REFUSED.keys(),
    }
    fields = TrainingArguments.__dataclass_fields__.keys()
    for name in fields:
        where = [table for table, names in tables.items() if name in names]
        assert len(where) == 1, (
            f"the field `{name}` of transformers' TrainingArguments is in {where or 'no table'}:"
            " see what it does in a run, and name it in one table of src/lorica/run/effects.py:"
            " ACTS (with a case of `SHOWN` in this file), CONDITIONS, REFUSED or DECIDED"
        )
    assert set().union(*tables.values()) <= fields


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, where", [
    (("--fp16",), "on a CPU"),
    (("--tf32", "true"), "on a CPU"),
    (("--torch-empty-cache-steps", 2), "on a CPU"),
    (("--ddp-bucket-cap-mb", 9), "in a single process"),
    (("--dataloader-persistent-workers",), "without `--dataloader-num-workers`"),
    (("--eval-accumulation-steps", 2), "where evaluations keep no predictions"),
    (("--hub-model-id", "a/b"), "lorica push OUT OWNER/NAME"),
    (("--optim-target-modules", "q_proj"), "the method brings its own"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(train, tmp_path, words, where):
    ran = train(*words, "--use-cpu", steps=1)
    assert ran.status == 2 and words[0] in ran.err and where in ran.err
    assert not (tmp_path / "out").exists()


IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "dataloader_pin_memory": ({"dataloader_pin_memory": False}, "on a CPU"),
    "ddp_timeout": ({"ddp_timeout": 9}, "in a single process"),
    "ddp_backend": ({"ddp_backend": "gloo"}, "in a single process"),
    "ddp_find_unused_parameters": ({"ddp_find_unused_parameters": True}, "in a single process"),
    "average_tokens": ({"average_tokens_across_devices": False}, "in a single process"),
    "log_on_each_node": ({"log_on_each_node": False}, "in a single process"),
    "in_order": ({"dataloader_in_order": False}, "without `--dataloader-num-workers`"),
    "eval_delay": ({"eval_delay": 1}, "without evaluations"),
    "save_total_limit": ({"save_total_limit": 1, "save_strategy": "no"}, "without checkpoints"),
    "save_steps": ({"save_steps": 1, "save_strategy": "epoch"}, "does not go by steps"),
    "logging_steps": ({"logging_steps": 1, "logging_strategy": "no"}, "does not go by steps"),
    "run_name": ({"run_name": "a"}, "without a tracker"),
    "project": ({"project": "a"}, "without `--report-to trackio`"),
    "checkpointing": (
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "without `--gradient-checkpointing`",
    ),
    "liger_kernel_config": ({"liger_kernel_config": {"rope": True}}, "without `--use-liger-kernel"),
    "liger_kernel": ({"use_liger_kernel": True}, "liger-kernel is not installed"),
    "fsdp_config": ({"fsdp_config": {"version": 2}}, "without `--fsdp`"),
    "accelerator_config": ({"accelerator_config": '{"even_batches": false}'}, "on a CPU"),
    "debug": ({"debug": "tpu_metrics_debug"}, "--debug underflow_overflow"),
    "optim_args": ({"optim_args": "a=1"}, "written in the method"),
    "use_cache": ({"use_cache": True}, "training has no use for a cache"),
    "auto_find": ({"auto_find_batch_size": True}, "--per-device-train-batch-size"),
    "jit": ({"enable_jit_checkpoint": True}, "SIGTERM by itself"),
    "data_skip": ({"ignore_data_skip": True}, "continues with the row after the last one"),
    "callbacks": ({"restore_callback_states_from_checkpoint": True}, "does that by itself"),
    "memory": ({"skip_memory_metrics": False}, "peak memory"),
    "length_column": ({"length_column_name": "n"}, "the length that the model sees"),
    "parallelism": ({"parallelism_config": "x"}, "no text names"),
    "loss_only": ({"prediction_loss_only": True}, "follows from the task"),
    "inputs": ({"include_for_metrics": ["inputs"]}, "follows from the task"),
    "push": ({"push_to_hub": True}, "lorica push OUT OWNER/NAME"),
    "curve": (
        {"lr_scheduler_kwargs": '{"a": 1}', "lr_scheduler_type": "linear"}, "linear` has no param"
    ),
    "parameter": ({"lr_scheduler_kwargs": {"power": 2.0}}, "unexpected keyword argument 'power'"),
    "decay": (
        {"lr_scheduler_type": "warmup_stable_decay"}, """needs num_decay_steps: give `--lr-sche"""
    ),
    "warm-up": ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, "has no warm-up"),
    "warm-up steps": ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "has no warm-up"),
    "max_grad_norm": ({"method": "lora+lorarite", "max_grad_norm": 0.5}, "limits its own step"),
    "adam": ({"method": "lora+sgd", "adam_beta1": 0.5}, "has no effect with the rule `sgd`"),
    "two names": (
        {
            "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {},
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        "two names of one option",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDLE)
def test_what_has_no_effect_is_refused_before_anything_is_loaded(case, options, tmp_path):
    from lorica.run.finetune import train

    given, where = IDLE[case]
    with pytest.raises(UsageError) as error:
        train(options(**given))
    assert where in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("given, where", [
    ({"dataloader_drop_last": True}, "every batch is full"),
    ({"train_sampling_strategy": "group_by_length"}, "all of one length"),
    ({"streaming": True, "max_steps": 1, "data_seed": 3}, "reads in order"),
    ({"streaming": True, "max_steps": 1, "train_sampling_strategy": "sequential"}, "in order"),
])  # fmt: skip
def test_what_running_text_has_no_use_for(given, where, tmp_path, text):
    from lorica.run.pretrain import pretrain

    own = {f.name for f in dataclasses.fields(PretrainOptions)}
    further = {name: value for name, value in given.items() if name not in own}
    given = {name: value for name, value in given.items() if name in own}
    rows = tmp_path / "data" / "train.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"text": "the cat sees the dog"}\n' * 60)
    with pytest.raises(UsageError, match=where):
        pretrain(
            PretrainOptions(
                data=(str(rows.parent),),
                output_dir=str(tmp_path / "out"),
                max_length=16,
                per_device_train_batch_size=2,
                vocab_size=265,
                further=further,
                **given,
            )  # fmt: skip
        )


# -- what acts -------------------------------------------------------------------------------------


class Spy(TrainerCallback):
    """What the Trainer works with, and what it said."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.evaluated: list[int] = []
        self.saved: list[int] = []
        self.logged: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.args, self.optimizer = args, kwargs["optimizer"]
        self.loader, self.scheduler = kwargs["train_dataloader"], kwargs["lr_scheduler"]
        self.level = logging.getLogger("transformers").level

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(self.scheduler.get_last_lr()[0])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.logged.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(state.global_step)


@dataclasses.dataclass
class Seen:
    spy: Spy
    result: dict[str, Any]
    files: set[str]
    model: Any

    @property
    def group(self) -> dict[str, Any]:
        return self.spy.optimizer.param_groups[0]

    @property
    def figures(self) -> tuple[Any, ...]:
        return self.result["adapter_sha256"], self.result["evaluation"]


@pytest.fixture
def options(llama, text, tmp_path):
    """Options of a run of two steps in tmp_path / "out"; what is no option of ours is further."""

    def made(**given: Any) -> TrainOptions:
        own = {f.name for f in dataclasses.fields(TrainOptions)}
        own_given = {name: value for name, value in given.items() if name in own}
        further = {name: value for name, value in given.items() if name not in own}
        length = {} if "num_train_epochs" in given else {"max_steps": 2}
        return TrainOptions(
            **{
                "model": str(llama), "data": str(text), "output_dir": str(tmp_path / "out"),
                "r": 2, "per_device_train_batch_size": 4, **length, **own_given,
            },
            further={"use_cpu": True, **further},
        )  # fmt: skip

    return made


def seen(options: TrainOptions) -> Seen:
    from pathlib import Path

    from lorica.run.finetune import train

    spy, kept = Spy(), []
    result = train(options, callbacks=[spy], then=lambda model, _: kept.append(model))
    out = Path(options.output_dir)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    return Seen(spy, result, files, kept[0])


NOT_HERE = (effects._ACCELERATOR, effects._PROCESSES, effects._WORKERS, effects._TRACKIO)
EVALUATED = {"eval_fraction": 0.25}
BY_STEP = {**EVALUATED, "eval_steps": 1, "save_steps": 1}
MANY = {"max_steps": None, "num_train_epochs": 2.0}

# field -> what is given beside it, its value, and what then is another than without it.
SHOWN: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "lr_scheduler_kwargs": ({}, {"num_cycles": 2}, lambda s: s.spy.rates),
    "warmup_steps": ({}, 2, lambda s: s.spy.rates),
    "optim": ({}, "adamw_torch", lambda s: s.spy.optimizer.defaults["fused"]),
    "weight_decay": ({}, 0.5, lambda s: s.group["weight_decay"]),
    "adam_beta1": ({}, 0.5, lambda s: s.group["betas"]),
    "adam_beta2": ({}, 0.5, lambda s: s.group["betas"]),
    "adam_epsilon": ({}, 0.5, lambda s: s.group["eps"]),
    "max_grad_norm": ({"method": "lora+sgd"}, 1e-6, lambda s: s.figures),
    "label_smoothing_factor": ({}, 0.2, lambda s: s.figures),
    "neftune_noise_alpha": ({}, 5.0, lambda s: s.figures),
    "full_determinism": ({}, True, lambda s: s.spy.args.full_determinism),
    "logging_strategy": ({}, "no", lambda s: s.spy.logged),
    "logging_steps": ({}, 2, lambda s: s.spy.logged),
    "logging_first_step": ({"logging_steps": 2}, True, lambda s: s.spy.logged),
    "log_level": ({}, "info", lambda s: s.spy.level),
    "eval_strategy": (EVALUATED, "no", lambda s: s.spy.evaluated),
    "eval_steps": ({**EVALUATED, "save_steps": 2}, 1, lambda s: s.spy.evaluated),
    "eval_delay": (BY_STEP, 2, lambda s: s.spy.evaluated),
    "eval_on_start": (EVALUATED, True, lambda s: s.spy.evaluated),
    "load_best_model_at_end": (BY_STEP, False, lambda s: s.result["best_step"]),
    "metric_for_best_model": (BY_STEP, "perplexity", lambda s: s.spy.args.metric_for_best_model),
    "greater_is_better": (
        {**BY_STEP, "learning_rate": 1e-2}, True, lambda s: s.result["best_step"]
    ),
    "save_strategy": ({}, "no", lambda s: s.spy.saved),
    "save_steps": ({}, 2, lambda s: s.spy.saved),
    "save_total_limit": ({"save_steps": 1}, 1, lambda s: s.files),
    "save_only_model": ({}, True, lambda s: s.files),
    "dataloader_num_workers": ({}, 1, lambda s: s.spy.loader.num_workers),
    "dataloader_drop_last": (
        {"max_samples": 6, "num_train_epochs": 1.0}, True, lambda s: s.result["steps"]
    ),
    "data_seed": ({}, 7, lambda s: s.figures),
    "train_sampling_strategy": ({}, "sequential", lambda s: s.figures),
    "accelerator_config": ({}, '{"use_seedable_sampler": false}', lambda s: s.figures),
    "gradient_checkpointing_kwargs": (
        {"gradient_checkpointing": True}, {"use_reentrant": True},
        lambda s: s.spy.args.gradient_checkpointing_kwargs,
    ),
    "debug": ({}, "underflow_overflow", lambda s: s.spy.args.debug),
}  # fmt: skip
# What one process on a CPU without further packages can't show, or what is the default here.
ELSEWHERE = {
    *(name for name, condition in effects.CONDITIONS.items() if condition in NOT_HERE),
    "run_name", "fsdp", "fsdp_config", "deepspeed", "use_liger_kernel", "liger_kernel_config",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cpu",
    "logging_nan_inf_filter", "per_device_eval_batch_size", "eval_accumulation_steps",
    "bf16_full_eval", "activation_checkpointing_kwargs",
}  # fmt: skip


def test_what_acts_is_shown_to_act():
    assert effects.ACTS | effects.CONDITIONS.keys() == SHOWN.keys() | ELSEWHERE
    assert not SHOWN.keys() & ELSEWHERE


@pytest.fixture(scope="module")
def without() -> dict[str, Seen]:
    """Runs without the field, by what was given beside it."""
    return {}


@pytest.mark.parametrize("field", SHOWN)
def test_what_is_passed_on_acts(field, options, without, tmp_path):
    beside, value, look = SHOWN[field]
    if (key := json.dumps(beside)) not in without:
        without[key] = seen(options(output_dir=str(tmp_path / "without"), **beside))
    given = seen(options(**beside, **{field: value}))
    assert look(given) != look(without[key])
