"""What every training run does, from options to a folder that says what was done.

Everything that can be wrong is looked at in the order of its cost: options, method, files, data,
configuration, and only then the weights. The folder is `lorica.run.folder.RunFolder`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.run import checkpoints
from lorica.run.folder import HEAD, RunFolder, strict
from lorica.run.options import RunOptions, UsageError
from lorica.run.options.checks import MOST

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters
    from lorica.recipe.recipe import Recipe

logger = logging.getLogger("lorica")

LOG_LINES = 50  # a run's log has about so many lines, ...
LOG_STEPS = 50  # ... and never waits longer than so many steps
EVALUATIONS = 5  # in a run that is not measured in passes

# What may differ between a run and its resumption: it touches neither weights nor their order.
_FREE = {
    "output_dir", "report_to", "logging_steps", "logging_strategy", "logging_first_step",
    "disable_tqdm", "save_total_limit", "run_name", "dataloader_num_workers",
    "dataloader_pin_memory", "log_level", "use_cpu",
}  # fmt: skip
_OWN = "  # by default: "  # a comment in config.yaml
_OF_A_CALL = ("resume", "overwrite_output_dir", "json", "dry_run")  # no part of the run


def recipe_of(options: RunOptions, **more: Any) -> Recipe:
    """The recipe that the options ask for.

    Args:
        more: fields of `Recipe` that the verb decides.

    Raises:
        UsageError: there is none.
    """
    from lorica.recipe.recipe import Recipe

    try:
        return Recipe.parse(
            options.method or {}, seed=options.seed, **options.recipe_fields(), **more
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def curved(recipe: Recipe, name: str, warmup_steps: int) -> Recipe:
    """The same with the rate curve of this name, where one of its schedules brings it."""
    from lorica.methods.optional import BringsCurves

    schedules: Any = recipe.schedules
    schedules = [
        s.with_curve(name, warmup_steps)
        if isinstance(s, BringsCurves) and name in s.lr_scheduler_types
        else s
        for s in schedules
    ]
    return dataclasses.replace(recipe, schedules=tuple(schedules))


def check_optim(options: RunOptions, recipe: Recipe) -> None:
    """`--optim` is a kind of the method's own rule.

    Raises:
        UsageError: it is another.
    """
    from lorica.methods.optional import RefusesOptim

    rule: Any = recipe.rule
    optim = options.further.get("optim")
    if isinstance(rule, RefusesOptim) and optim in rule.trainer_refusals:
        raise UsageError(f"`--optim {optim}`: {rule.trainer_refusals[optim]}")
    if optim is not None and optim not in rule.trainer_names:
        raise UsageError(
            f"`--optim {optim}` is not the rule of the method `{recipe.text()}`, which is"
            f" `{rule.name}`; allowed: {', '.join(sorted(rule.trainer_names))}. Another rule is a"
            " word of the method (`lorica methods` lists them)"
        )


@dataclass
class AbstractRun(ABC):
    """One run, step by step; every step fills in what the next ones need."""

    options: Any
    recipe: Recipe | None
    folder: RunFolder
    checkpoint: Path | None
    main: bool
    callbacks: Sequence[Any] = ()  # of the Trainer's kind, beside the run's own

    verb: ClassVar[str]
    writes: ClassVar[tuple[str, ...]]  # folders, beside the checkpoints
    remedy: ClassVar[str] = ""  # against a loss that is no number, beside the usual ones

    # What `load_data` finds: the data's name, and what a checkpoint remembers of it.
    source: Any = dataclasses.field(init=False)
    facts: dict[str, Any] = dataclasses.field(init=False)
    learning_rate: float = dataclasses.field(init=False)  # `plan` knows it
    # What `load_model` makes.
    model: Any = dataclasses.field(init=False)
    tokenizer: Any = dataclasses.field(init=False)
    adapters: Adapters = dataclasses.field(init=False)

    @classmethod
    def start(
        cls,
        options: Any,
        recipe: Recipe | None,
        then: Callable[[Any, Any], None] | None,
        callbacks: Sequence[Any] = (),
    ) -> dict[str, Any]:
        """Take the folder and run; returns what result.json holds.

        Args:
            then: called with the trained model and its tokenizer once everything is written.
        """
        folder = RunFolder(options.output_dir)
        main = int(os.environ.get("RANK", "0")) == 0
        if recipe is not None:
            check_optim(options, recipe)
        folder.refuse_inputs(_paths(options))
        with folder.held() if main else contextlib.nullcontext():
            checkpoint = folder.check(
                resume=options.resume,
                overwrite=options.overwrite_output_dir,
                silent=not main,
                writes=cls.writes,
            )
            run = cls(options, recipe, folder, checkpoint, main, callbacks)
            result = run.go()
            if then is not None:
                then(run.model, run.tokenizer)
            return result

    def go(self) -> dict[str, Any]:
        import torch
        from transformers import set_seed

        quieten()
        self.began = time.perf_counter()
        cpu = bool(self.options.further.get("use_cpu")) or not torch.cuda.is_available()
        self.device = torch.device("cpu" if cpu else "cuda")
        set_seed(self.options.seed)
        self._check_given()
        _check_reports(self.options.report_to)
        self.load_data()
        self.facts["processes"] = self.processes
        self.plan()
        self._check_resumed()
        self.load_model()
        if self.main:
            self.tell()
        return self._train()

    # -- what a verb fills in ----------------------------------------------------------------------

    @abstractmethod
    def load_data(self) -> None:
        """Rows, tokenizer and configuration: `source`, `facts`, and what the other steps read."""

    @abstractmethod
    def plan(self) -> None:
        """The length of the run and its TrainingArguments; see `set_arguments`."""

    @abstractmethod
    def load_model(self) -> None:
        """`model` and `adapters`."""

    @abstractmethod
    def tell(self) -> None:
        """Say what the data are."""

    @abstractmethod
    def trainer(self, log: Any) -> Any:
        """The Trainer of this run, with `log` among its callbacks."""

    @abstractmethod
    def filled(self) -> dict[str, Any]:
        """Options that were found out, for config.yaml."""

    @abstractmethod
    def save(self) -> Path:
        """Write what was trained."""

    @abstractmethod
    def figures(self, trainer: Any, log: Any) -> dict[str, Any]:
        """What this verb adds to result.json."""

    @property
    @abstractmethod
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""

    # -- arguments ---------------------------------------------------------------------------------

    @property
    def own_recipe(self) -> bool:
        """Whether the options say what trains; else a file does, which they name."""
        return True

    @property
    def gathers(self) -> bool:
        """Whether what it writes at its end can be gathered from shards."""
        return False

    @property
    def processes(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    def values(self, steps: int, *, by_pass: bool) -> dict[str, Any]:
        """Arguments that are the user's if given, and otherwise ours: how often the run speaks,
        evaluates and saves.

        Args:
            steps: how many there will be.
            by_pass: evaluate and save after every pass.
        """
        further = dict(self.options.further)
        every = max(1, math.ceil(steps / EVALUATIONS))
        cadence: dict[str, Any] = {"save_strategy": "epoch" if by_pass else "steps"}
        if "save_steps" in further:
            cadence["save_strategy"] = "steps"
        elif not by_pass:
            cadence["save_steps"] = every
        if self.evaluates:
            cadence["eval_strategy"] = cadence["save_strategy"]
            if "eval_steps" in further:
                cadence["eval_strategy"] = "steps"
            elif "eval_strategy" not in further and cadence["save_strategy"] == "steps":
                cadence["eval_steps"] = further.get("save_steps", every)
        values: dict[str, Any] = {
            "logging_steps": max(1, min(LOG_STEPS, steps // LOG_LINES)),
            "save_total_limit": 2,
            "logging_nan_inf_filter": False,  # a loss that is no number is told, not averaged away
            "log_level": "error",
            **cadence,
            **further,
        }
        if self.recipe is not None and "optim" not in further:
            from transformers import TrainingArguments

            rule: Any = self.recipe.rule
            own = TrainingArguments.__dataclass_fields__["optim"].default
            if getattr(own, "value", own) not in rule.trainer_names and rule.trainer_names:
                values["optim"] = min(rule.trainer_names)
        return values

    def set_arguments(
        self,
        values: dict[str, Any],
        *,
        steps: int,
        max_steps: int | None,
        epochs: float,
        warmup_ratio: float,
        **fixed: Any,
    ) -> None:
        """`self.args`, the TrainingArguments of this run.

        Args:
            values: see `values`.
            steps: how many there will be.
            max_steps: the same where the run is measured in steps, else None.
            epochs: passes, where it is measured in these.
            warmup_ratio: where the user said nothing.
            fixed: arguments that the verb decides.

        Raises:
            UsageError: transformers refuses them.
        """
        from transformers import TrainingArguments

        options, values = self.options, dict(values)
        if steps > MOST:
            raise UsageError(
                f"this run would take {steps:,} steps, and {MOST:,} is the most; give a smaller"
                " `--max-steps`, or fewer tokens or passes"
            )
        warmup = warmup_ratio if options.warmup_ratio is None else options.warmup_ratio
        if options.warmup_ratio is None and math.ceil(warmup * steps) >= steps:
            warmup = 0.0  # the first step of a warm-up has rate 0: a run of one would move nothing
        self.further = dict(values)
        curve = self._curve(options.lr_scheduler_type, steps, warmup)
        fixed = {
            "output_dir": str(self.folder.path),
            "per_device_train_batch_size": options.per_device_train_batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "num_train_epochs": epochs,
            "max_steps": max_steps or -1,
            "learning_rate": self.learning_rate,
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
        if self.device.type == "cpu":
            fixed["use_cpu"] = True
        if options.gradient_checkpointing:
            fields = TrainingArguments.__dataclass_fields__
            name = "activation_checkpointing" if "activation_checkpointing" in fields else None
            name = name or "gradient_checkpointing"
            fixed[name], values[f"{name}_kwargs"] = True, {"use_reentrant": False}
        try:
            self.args = TrainingArguments(**{**values, **fixed})
        except (
            ValueError, TypeError, OSError, KeyError, AttributeError, RuntimeError, ImportError,
        ) as error:  # fmt: skip
            raise UsageError(
                f"transformers refuses these options: {' '.join(str(error).split()).rstrip('.')}."
                " Leave out or correct the one that it names"
            ) from None
        self._refuse_best_without_checkpoint()
        self._refuse_sharding()
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1  # replicas of one process would lose the adapters' bookkeeping
            logger.info(
                f"one process trains on one GPU; `torchrun -m lorica {self.verb}` takes several"
            )

    def _refuse_sharding(self) -> None:
        """What FSDP can't do here, or would not do."""
        if not self.args.fsdp:
            return
        plugin: Any = self.args.fsdp_plugin_args
        if plugin["fsdp_version"] != 2:
            raise UsageError(
                "`--fsdp-config` asks for version 1 of FSDP, which flattens parameters, so that"
                ' updates cannot reach theirs; type `"version": 2` there, or leave it out'
            )
        if not self.gathers:
            raise UsageError(
                "`--fsdp`: this run writes a whole model at its end, into which a sharded one"
                " cannot be merged; leave it out, and each process holds the model (DDP)"
            )
        if self.device.type == "cpu":
            raise UsageError(
                "`--fsdp` shards over accelerators only: on the CPU Accelerate passes over it;"
                " leave it out, and each process holds the model (DDP)"
            )

    def _refuse_best_without_checkpoint(self) -> None:
        """What is kept as the best is what was evaluated as the best."""
        args = self.args
        if not (args.load_best_model_at_end and args.save_strategy == "steps"):
            return
        if args.eval_steps != args.save_steps:
            raise UsageError(
                "`--load-best-model-at-end` keeps the weights of the best evaluation, and with"
                f" `--eval-steps {args.eval_steps:g}` and `--save-steps {args.save_steps:g}` not"
                " every evaluation has a checkpoint; give both the same number"
            )

    def _curve(self, name: str, steps: int, warmup: float) -> str:
        """What transformers is to do with the rate: `name`, or nothing where a schedule of the
        method brings that curve, which then is its own affair.

        Raises:
            UsageError: neither knows it.
        """
        from transformers import SchedulerType

        from lorica.methods.optional import BringsCurves

        known = [kind.value for kind in SchedulerType]
        if name in known:
            return name
        schedules: Any = () if self.recipe is None else self.recipe.schedules
        brought = [
            kind for s in schedules if isinstance(s, BringsCurves) for kind in s.lr_scheduler_types
        ]
        if name not in brought:
            allowed = ", ".join([*brought, *known])
            raise UsageError(
                f"`--lr-scheduler-type {name}`: neither transformers nor a schedule of the method"
                f" knows it; allowed here: {allowed}"
            )
        count = self.options.further.get("warmup_steps", warmup)
        count = math.ceil(count * steps) if count < 1 else int(count)
        assert self.recipe is not None
        self.recipe = curved(self.recipe, name, count)
        return SchedulerType.CONSTANT.value

    def resolved(self) -> dict[str, Any]:
        """The options that repeat this run, all filled in."""
        options = dataclasses.asdict(self.options)
        further = options.pop("further")
        for name in _OF_A_CALL:
            options.pop(name, None)
        for name, but in self.options.paths.items():
            options[name] = absolute(options[name], but)
        options |= self.filled()
        options["learning_rate"] = self.learning_rate
        if self.args.max_steps <= 0:
            options["num_train_epochs"] = self.args.num_train_epochs
        if "warmup_steps" not in further:
            options["warmup_ratio"] = float(self.args.warmup_steps)
        if self.recipe is not None and self.own_recipe:
            options |= {"method": self.recipe.text()}
            told = self.recipe.to_dict()
            for name in self.options.recipe_fields() | self.recipe.filled:
                options[name] = told[name]
        skipped = {"log_level", "disable_tqdm", "logging_nan_inf_filter"}
        kept = {k: v for k, v in self.further.items() if k not in skipped or k in further}
        kept = {k: v for k, v in kept.items() if not k.endswith("checkpointing_kwargs")} | further
        options |= {k: getattr(v, "value", v) for k, v in kept.items() if v is not None}
        for name, value in options.items():  # transformers reads every `*_steps` as a fraction
            if name.endswith("_steps") and isinstance(value, float) and value.is_integer():
                options[name] = int(value)
        return {k: plain(v) for k, v in options.items() if v is not None and v != {}}

    # -- going on ----------------------------------------------------------------------------------

    def _before(self) -> tuple[Path, dict[str, Any]] | None:
        """config.yaml of the run that this one goes on with, if any."""
        import yaml

        if self.options.resume is None:
            return None
        folder = self.folder.path if self.checkpoint is None else self.checkpoint.parent
        file = folder / "config.yaml"
        if not file.is_file():
            return None
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise UsageError(
                f"`--resume`: {file} does not say any more what the run is: a mapping `key: value`"
                " is wanted. Put the old one back, or start a run of its own"
            )
        return file, before

    def _refuse_changed(self, now: Mapping[str, Any], names: set[str]) -> None:
        """Of `names`, none has another value than it had."""
        found = self._before()
        if found is None:
            return
        file, before = found
        changed = {k for k in names - _FREE if before.get(k) != now.get(k)}
        if _method(before) == _method(now):
            changed.discard("method")
        if changed:
            name = sorted(changed)[0]
            raise UsageError(
                f"`--resume` goes on with the run of {file}, where `{name}` is"
                f" {before.get(name)!r}, not {now.get(name)!r}: leave that option out, or start"
                " a run of its own with another `--output-dir`"
            )

    def _check_given(self) -> None:
        """Options that were typed and differ are told before any data is read."""
        now = {k: plain(v) for k, v in vars(self.options).items()}
        now |= {k: plain(absolute(now[k], but)) for k, but in self.options.paths.items()}
        fields = dataclasses.fields(self.options)
        given = {f.name for f in fields if getattr(self.options, f.name) != f.default}
        if self.recipe is not None:
            told = self.recipe.to_dict()
            now |= {name: plain(told[name]) for name in ("method", *self.options.recipe_names)}
        self._refuse_changed(now, given - {"further", *_OF_A_CALL})
        self._refuse_other_processes()

    def _refuse_other_processes(self) -> None:
        """More or fewer processes would read other rows a step."""
        if self.checkpoint is None:
            return
        facts = _facts(_state(self.checkpoint))
        before, now = facts.get("processes", self.processes), self.processes
        if before != now:
            raise UsageError(
                f"`--resume`: {self.checkpoint} was trained by {before}"
                f" process{'' if before == 1 else 'es'}, not {now}, which would read other rows; go"
                " on with"
                f" `torchrun --nproc-per-node {before} -m lorica {self.verb} ...`, or start a run"
                " of its own with another `--output-dir`"
            )

    def _check_resumed(self) -> None:
        """A resumed run is the same run: the same options, the same rows."""
        self.before: dict[str, Any] = {}
        now = plain(self.resolved())
        found = self._before()
        self._refuse_changed(now, {*now, *(found[1] if found else {})})
        if self.checkpoint is None:
            return
        state = _state(self.checkpoint)
        self.before = state.get("stateful_callbacks", {})
        for name, value in _facts(state).items():
            if self.facts.get(name) != value:
                raise ValueError(
                    f"the rows of `{self.source}` are not those that"
                    f" {self.checkpoint.name} was trained on ({name} differs): a file has changed,"
                    " or the tokenizer has. Put the old one back, or start a run of its own with"
                    " another `--output-dir`"
                )
        self._check_best(state.get("best_global_step"))

    def _check_best(self, step: int | None) -> None:
        """The checkpoint whose weights would be kept is there, before more is trained."""
        assert self.checkpoint is not None
        if not (self.args.load_best_model_at_end and step):
            return
        best = self.checkpoint.with_name(f"checkpoint-{step}")
        if best != self.checkpoint and (why := checkpoints.damage(best)) is not None:
            raise UsageError(
                f"`--resume`: the best weights so far are those of {best}, which is damaged: {why}."
                " Put its files back, or start anew with `--overwrite-output-dir`"
            )

    # -- training ----------------------------------------------------------------------------------

    def _train(self) -> dict[str, Any]:
        from transformers.trainer_callback import PrinterCallback

        from lorica.run.log import RunLog, clock

        found = self._before()
        if found is not None:  # of a resumed run every option is given; some nobody had given
            for name, source in defaults_in(found[0]).items():
                value = plain(self.resolved()).get(name)
                self.adapters.summary.defaults[name] = {"value": value, "from": source}
        log = RunLog(self.folder, self.device, self.facts, self.main, remedy=self.remedy)
        trainer = self.trainer(log)
        trainer.remove_callback(PrinterCallback)
        for callback in self.callbacks:
            trainer.add_callback(callback)
        if self.main:
            if self.options.overwrite_output_dir:
                self.folder.clear()
            (self.folder / "result.json").unlink(missing_ok=True)
            with checkpoints.saving("config.yaml", self.folder.path):
                defaults = self.adapters.summary.defaults
                self.folder.write("config.yaml", as_yaml(self.resolved(), self.verb, defaults))
                self.keep()
        if self.before.get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
            self._finish(trainer, log)  # the Trainer would take one more step
        else:
            start = None if self.checkpoint is None else str(self.checkpoint)
            if start is not None:
                self.args.eval_on_start = False  # it was done, and is in the log
            trainer.train(resume_from_checkpoint=start)
        result = self._result(trainer, log, self._evaluation(trainer))
        # In its own precision from here on: with `--bf16` its forward pass was wrapped.
        self.model = trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        with checkpoints.saving("what was trained", self.folder.path):
            result["output"] = str(self.save())
        if self.main:
            text = json.dumps(strict(result), indent=2, ensure_ascii=False)
            with checkpoints.saving("result.json", self.folder.path):
                self.folder.write("result.json", text + "\n")
            logger.info(
                f"{result['steps']} steps in {clock(log.seconds)}; {result['output']} is written"
            )
        return strict(result)

    @abstractmethod
    def keep(self) -> None:
        """Write what a resumption needs beside the checkpoints, before the first step."""

    def _finish(self, trainer: Any, log: Any) -> None:
        """Of a run that had taken its last step, what comes after it."""
        import transformers.trainer
        from transformers import TrainerState

        from lorica import formats

        assert self.checkpoint is not None
        state = TrainerState.load_from_json(str(self.checkpoint / "trainer_state.json"))
        trainer.state = state
        align = vars(transformers.trainer).get("align_special_tokens")
        if align is not None:  # as the Trainer does before its first step
            align(self.model, self.tokenizer)
        trainer.load_optimizer(self.checkpoint)
        log.begin(state)
        best = self.args.load_best_model_at_end and state.best_global_step
        step = state.best_global_step if best else state.global_step
        formats.restore(self.adapters, self.checkpoint.parent / f"checkpoint-{step}")

    def _evaluation(self, trainer: Any) -> dict[str, float] | None:
        """The figures of the weights that are kept: the best checkpoint's, else the last ones'."""
        from lorica.run.log import measures

        if not self.evaluates or self.args.eval_strategy == "no":
            return None
        state = trainer.state
        best = self.args.load_best_model_at_end and state.best_global_step
        step = state.best_global_step if best else state.global_step
        for line in reversed(state.log_history):
            if line["step"] == step and "eval_loss" in line:
                found = line
                break
        else:
            found = trainer.evaluate()
        return {k: v for k, v in found.items() if k.startswith("eval_") and measures(k)}

    def _result(
        self, trainer: Any, log: Any, evaluation: dict[str, float] | None
    ) -> dict[str, Any]:
        from lorica.run.log import peak_memory

        adapters, state, contract = self.adapters, trainer.state, self.adapters.summary
        # Not those of metrics.jsonl: in another folder they begin with the resumption.
        lines = [line for line in state.log_history if "loss" in line]
        best = bool(self.args.load_best_model_at_end and state.best_global_step)
        return {
            "method": adapters.recipe.text(),
            "recipe": adapters.recipe.to_dict(),
            "steps": state.global_step,
            "epochs": state.epoch,
            "loss": lines[-1]["loss"] if lines else None,
            "train_loss": mean_loss(lines),
            "learning_rate": self.learning_rate,
            "evaluation": evaluation,
            "best_step": state.best_global_step if best else None,
            "tokens": state.num_input_tokens_seen,
            "seconds": round(log.seconds, 3),
            "seconds_with_loading": round(time.perf_counter() - self.began + log.before, 3),
            "tokens_per_second": round(state.num_input_tokens_seen / max(log.seconds, 1e-9), 1),
            "peak_memory": peak_memory(self.device),
            "device": str(self.device),
            "processes": self.args.world_size,
            "trainable": contract.trainable,
            "parameters": contract.total,
            "summary": contract.as_dict(),
            "adapter_sha256": adapters.fingerprint(),
            **self.figures(trainer, log),
            "versions": versions(),
        }


def _paths(options: RunOptions) -> list[tuple[str, str]]:
    """The flags that may name files, and what they were given."""
    found = []
    for name, words in options.paths.items():
        value = getattr(options, name)
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and path not in words:
                found.append((f"--{name.replace('_', '-')}", path))
    return found


def _check_reports(names: Sequence[str]) -> None:
    """Where else to log is known and installed, before anything is read.

    Raises:
        UsageError: it is not.
    """
    from transformers.integrations.integration_utils import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    for name in names:
        if name in ("none", "all", *get_available_reporting_integrations()):
            continue
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"`--report-to {name}`: {why}; or leave it out") from None


def _method(config: Mapping[str, Any]) -> Any:
    """The method of a config.yaml, or of what was typed, to compare them: with the curve that
    `lr_scheduler_type` writes into it, but for its warm-up, which follows from other options."""
    from lorica.recipe.recipe import Recipe

    told = config.get("method")
    if isinstance(told, str):
        with contextlib.suppress(ValueError):
            return curved(Recipe.parse(told), str(config.get("lr_scheduler_type")), 0).text()
    return told


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of the data and the processes."""
    callbacks = state.get("stateful_callbacks", {})
    return callbacks.get("RunLog", {}).get("attributes", {}).get("facts", {})


def quieten() -> None:
    """transformers' bars and notes would come between ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def mean_loss(lines: list[dict[str, Any]]) -> float | None:
    """Mean of the logged losses, each weighed by the steps it stands for."""
    total = last = 0.0
    for line in lines:
        total += (line["step"] - last) * (line["loss"] or 0.0)
        last = line["step"]
    return total / last if last else None


def versions() -> dict[str, str]:
    """Of Python and of what carries the numbers."""
    names = ("lorica", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def as_yaml(config: Mapping[str, Any], verb: str, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """config.yaml's text; where a value is a method's own, a comment says so."""
    import yaml

    import lorica

    head = (
        f"{HEAD} {lorica.__version__}. To repeat the run:"
        f" lorica {verb} config.yaml --output-dir ANOTHER\n"
    )
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=10**9)
    for name, told in defaults.items():
        line = rf"^({name}: \S+)$"
        if config.get(name) == told["value"]:
            text = re.sub(line, rf"\1{_OWN}{told['from']}", text, flags=re.MULTILINE)
    return head + text


def defaults_in(config: Path) -> dict[str, str]:
    """The comments that `as_yaml` made: option -> the word whose own value it is."""
    line = re.compile(rf"^(\w+): \S+{_OWN}(.+)$", re.MULTILINE)
    return dict(line.findall(config.read_text(encoding="utf-8")))


def absolute(value: Any, but: Collection[str] = ()) -> Any:
    """A path that is there from the root on; anything else as it is, and so are the words `but`."""
    if isinstance(value, (tuple, list)):
        return tuple(absolute(part, but) for part in value)
    if isinstance(value, str) and value not in but and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def plain(value: Any) -> Any:
    """Lists for tuples, so that YAML reads back what was written."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value
