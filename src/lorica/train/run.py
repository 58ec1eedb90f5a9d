"""A fine-tuning run: from options to a folder that says what was done.

Everything that can be wrong is looked at in the order of its cost: options, method, files, data,
configuration, and only then the weights. The folder is `lorica.train.folder.RunFolder`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.train.folder import RunFolder, strict
from lorica.train.options import TrainOptions, UsageError, masking

if TYPE_CHECKING:
    from lorica.adapters import Adapters
    from lorica.data import Labels, Prepared
    from lorica.recipe import Recipe

logger = logging.getLogger("lorica")

WARMUP_RATIO = 0.03
EPOCHS = 3.0
MAX_LENGTH = 1024
LOG_LINES = 50  # a run's log has about so many lines, ...
LOG_STEPS = 50  # ... and never waits longer than so many steps
EVALUATIONS = 5  # in a run that is not measured in passes

# What may differ between a run and its resumption: it touches neither weights nor their order.
_FREE = {
    "output_dir", "report_to", "logging_steps", "logging_strategy", "logging_first_step",
    "disable_tqdm", "save_total_limit", "run_name", "dataloader_num_workers",
    "dataloader_pin_memory", "log_level", "use_cpu",
}  # fmt: skip


def train(
    options: TrainOptions, *, then: Callable[[Any, Any], None] | None = None
) -> dict[str, Any]:
    """Fine-tune as the options say; returns what result.json holds.

    Args:
        options: see `TrainOptions`; `further` holds fields of transformers' TrainingArguments.
        then: called with the trained model and its tokenizer once everything is written.

    Raises:
        UsageError: options that cannot be run as they stand, before anything is loaded or written.
        ValueError: data or a model that does not fit, a run that diverges. What is complete in the
            folder stays.
    """
    options.check()
    recipe = None if options.adapter is not None else recipe_of(options)
    folder = RunFolder(options.output_dir)
    main = int(os.environ.get("RANK", "0")) == 0
    checkpoint = folder.check(resume=options.resume, overwrite=options.overwrite_output_dir)
    if recipe is not None:
        _check_optim(options, recipe)
    with folder.held() if main else contextlib.nullcontext():
        run = _Run(options, recipe, folder, checkpoint, main)
        result = run.go()
        if then is not None:
            then(run.model, run.tokenizer)
        return result


def recipe_of(options: TrainOptions) -> Recipe:
    """The recipe that the options ask for.

    Raises:
        UsageError: there is none.
    """
    from lorica.recipe import Recipe

    try:
        return Recipe.parse(options.method or {}, seed=options.seed, **options.recipe_fields())
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_optim(options: TrainOptions, recipe: Recipe) -> None:
    rule: Any = recipe.rule
    optim = options.further.get("optim")
    if optim is not None and optim not in rule.trainer_names:
        raise UsageError(
            f"`--optim {optim}` is not the rule of the method `{recipe.text()}`, which is"
            f" `{rule.word}`; allowed: {', '.join(sorted(rule.trainer_names))}. Another rule is a"
            " word of the method (`lorica methods` lists them)"
        )


@dataclass
class _Run:
    """One run, step by step; every step fills in what the next ones need."""

    options: TrainOptions
    recipe: Recipe | None
    folder: RunFolder
    checkpoint: Path | None
    main: bool

    def go(self) -> dict[str, Any]:
        import torch
        from transformers import set_seed
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.began = time.perf_counter()
        cpu = bool(self.options.further.get("use_cpu")) or not torch.cuda.is_available()
        self.device = torch.device("cpu" if cpu else "cuda")
        set_seed(self.options.seed)
        self._load_data()
        self._plan()
        self._check_resumed()
        self._load_model()
        self._tell()
        return self._train()

    # -- data --------------------------------------------------------------------------------------

    def _load_data(self) -> None:
        from lorica.data import detect, prepare
        from lorica.train.load import base_name, load_tokenizer, longest, own_labels, read_config

        options = self.options
        self.name = base_name(options.model, options.adapter)
        self.config = read_config(self.name)
        train, held = self._rows()
        shape = detect(train.column_names, task=options.task)
        self.task = options.task or shape.default_task
        self.tokenizer = load_tokenizer(self.name)
        limit = longest(self.config, self.tokenizer)
        self.max_length = options.max_length or min(MAX_LENGTH, limit or MAX_LENGTH)
        if limit is not None and self.max_length > limit:
            raise UsageError(
                f"`--max-length {self.max_length}`: `{self.name}` ends at {limit} tokens; give"
                " at most that"
            )
        how: dict[str, Any] = {"max_length": self.max_length, "task": self.task}
        if options.packing != "none":
            how["packing"] = options.packing
        how |= masking(options.chat_template, options.train_on)
        labels = own_labels(self.config, self.task)
        labelled: dict[str, Any] = {} if labels is None else {"labels": labels}
        self.data: Prepared = prepare(train, self.tokenizer, **how, **labelled)
        self.labels: Labels | None = self.data.labels
        labelled = {} if self.labels is None else {"labels": self.labels}
        self.held: Prepared | None = None
        if held is not None:
            self.held = prepare(held, self.tokenizer, **how, **labelled)
        if self.data.chat_template is not None:
            self.tokenizer.chat_template = self.data.chat_template
        self.facts = {"data_sha256": hash_rows(self.data.dataset)}
        if self.held is not None:
            self.facts["eval_data_sha256"] = hash_rows(self.held.dataset)

    def _rows(self) -> tuple[Any, Any]:
        """Rows to train on and rows to evaluate on (or None)."""
        from lorica.data import read_splits
        from lorica.world.source import NEW, TEST, is_embedded

        options, eval_split = self.options, self.options.eval_split
        self.source = options.data or NEW
        brought = is_embedded(self.source) and options.eval_data is options.eval_fraction is None
        return read_splits(
            self.source,
            split=options.split,
            eval_source=options.eval_data,
            eval_split=TEST if brought and eval_split is None else eval_split,
            eval_fraction=options.eval_fraction,
            seed=options.seed,
            header=options.header,
            columns=options.columns,
            max_samples=options.max_samples,
        )

    # -- arguments ---------------------------------------------------------------------------------

    def _plan(self) -> None:
        """TrainingArguments, with our defaults where the user said nothing."""
        from transformers import TrainingArguments

        from lorica.train.metrics import Scores

        options, further = self.options, dict(self.options.further)
        classes = 0 if self.labels is None else len(self.labels.names)
        self.scores = Scores(self.task, classes)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        rows = len(self.data.dataset)
        batches = math.ceil(rows / (options.per_device_train_batch_size * processes))
        a_pass = max(1, math.ceil(batches / options.gradient_accumulation_steps))
        epochs = options.num_train_epochs or EPOCHS
        steps = options.max_steps or math.ceil(epochs * a_pass)
        by_pass = options.max_steps is None and epochs >= 2
        every = max(1, math.ceil(steps / EVALUATIONS))
        cadence: dict[str, Any] = {"save_strategy": "epoch" if by_pass else "steps"}
        if "save_steps" in further:
            cadence["save_strategy"] = "steps"
        elif not by_pass:
            cadence["save_steps"] = every
        if self.held is not None:
            cadence["eval_strategy"] = cadence["save_strategy"]
            if "eval_steps" in further:
                cadence["eval_strategy"] = "steps"
            elif "eval_strategy" not in further and not by_pass:
                cadence["eval_steps"] = further.get("save_steps", every)
        recipe = self.recipe
        default = recipe.learning_rate if recipe is not None else None
        self.learning_rate = options.learning_rate or (default[0] if default else 2e-4)
        warmup = WARMUP_RATIO if options.warmup_ratio is None else options.warmup_ratio
        if options.warmup_ratio is None and math.ceil(warmup * steps) >= steps:
            warmup = 0.0  # the first step of a warm-up has rate 0: a run of one would move nothing
        values: dict[str, Any] = {
            "logging_steps": max(1, min(LOG_STEPS, steps // LOG_LINES)),
            "save_total_limit": 2,
            "logging_nan_inf_filter": False,  # a loss that is no number is told, not averaged away
            "log_level": "error",
            **cadence,
            **further,
        }
        if recipe is not None and "optim" not in further:
            rule: Any = recipe.rule
            own = TrainingArguments.__dataclass_fields__["optim"].default
            if getattr(own, "value", own) not in rule.trainer_names and rule.trainer_names:
                values["optim"] = min(rule.trainer_names)
        if self.held is not None and values["eval_strategy"] != "no":
            best, more = self.scores.best
            matches = values["eval_strategy"] == values["save_strategy"]
            saves, evals = values.get("save_steps"), values.get("eval_steps")
            if values["eval_strategy"] == "steps" and matches and saves and evals:
                matches = saves % evals == 0
            values.setdefault("load_best_model_at_end", matches)
            values.setdefault("metric_for_best_model", best)
            name = values["metric_for_best_model"].removeprefix("eval_")
            values.setdefault("greater_is_better", more if name == best else None)
        self.further = values
        fixed = {
            "output_dir": str(self.folder.path),
            "per_device_train_batch_size": options.per_device_train_batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "num_train_epochs": epochs,
            "max_steps": options.max_steps or -1,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": options.lr_scheduler_type,
            "seed": options.seed,
            "bf16": options.bf16,
            "report_to": list(options.report_to),
            "disable_tqdm": True,
            "remove_unused_columns": False,  # the rows hold what the model takes, and nothing else
            "include_num_input_tokens_seen": "all" if self._packs else "non_padding",
        }
        if "warmup_steps" not in further:
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
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from None
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1  # replicas of one process would lose the adapters' bookkeeping
            logger.info("one process trains on one GPU; `torchrun -m lorica train` takes several")
        if options.early_stopping_patience is not None and not self.args.load_best_model_at_end:
            raise UsageError(
                "`--early-stopping-patience` goes by the best checkpoint, which is kept only where"
                " evaluations and checkpoints fall together: let `--eval-steps` and `--save-steps`"
                " match"
            )

    @property
    def _packs(self) -> bool:
        return self.options.packing != "none"

    def resolved(self) -> dict[str, Any]:
        """The options that repeat this run, all filled in."""
        options = dataclasses.asdict(self.options)
        further = options.pop("further")
        for name in ("resume", "overwrite_output_dir", "json"):
            options.pop(name, None)
        for name in ("model", "data", "eval_data", "adapter"):
            value = options[name]
            if value is not None and Path(value).expanduser().exists():
                options[name] = str(Path(value).expanduser().resolve())
        options["data"] = options["data"] or self.source
        options["max_length"] = self.max_length
        options["task"] = self.task
        options["learning_rate"] = self.learning_rate
        if options["max_steps"] is None:
            options["num_train_epochs"] = self.args.num_train_epochs
        if "warmup_steps" not in further:
            options["warmup_ratio"] = float(self.args.warmup_steps)
        if self.recipe is not None:
            options |= {"method": self.recipe.text()}
            told = self.recipe.to_dict()
            for name in self.options.recipe_fields() | self.recipe.filled:
                options[name] = told[name]
        skipped = {"log_level", "disable_tqdm", "logging_nan_inf_filter"}
        kept = {k: v for k, v in self.further.items() if k not in skipped or k in further}
        kept = {k: v for k, v in kept.items() if not k.endswith("checkpointing_kwargs")} | further
        options |= {k: getattr(v, "value", v) for k, v in kept.items() if v is not None}
        return {k: _plain(v) for k, v in options.items() if v is not None and v != {}}

    def _check_resumed(self) -> None:
        """A resumed run is the same run: the same options, the same rows."""
        self.before: dict[str, Any] = {}
        if self.checkpoint is None:
            return
        import yaml

        before_file = self.checkpoint.parent / "config.yaml"
        if before_file.is_file():
            before = yaml.safe_load(before_file.read_text(encoding="utf-8")) or {}
            now = _plain(self.resolved())
            names = {k for k in {*before, *now} - _FREE if before.get(k) != now.get(k)}
            if names:
                name = sorted(names)[0]
                raise UsageError(
                    f"`--resume` goes on with the run of {before_file}, where `{name}` is"
                    f" {before.get(name)!r}, not {now.get(name)!r}: leave that option out, or start"
                    " a run of its own with another `--output-dir`"
                )
        state = json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        self.before = state.get("stateful_callbacks", {})
        facts = self.before.get("RunLog", {}).get("attributes", {}).get("facts", {})
        for name, value in facts.items():
            if self.facts.get(name) != value:
                raise ValueError(
                    f"the rows of `{self.source}` are not those that"
                    f" {self.checkpoint.name} was trained on ({name} differs): a file has changed,"
                    " or the tokenizer has. Put the old one back, or start a run of its own with"
                    " another `--output-dir`"
                )

    # -- model -------------------------------------------------------------------------------------

    def _load_model(self) -> None:
        import lorica
        from lorica.data import check_isolation
        from lorica.train.load import load_model

        options = self.options
        self.model: Any = load_model(
            self.name,
            self.task,
            labels=self.labels,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            widen=self.device.type == "cpu",
        )
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.data.pad_token_id
        self.collator = self.data.collator()
        if self._packs:
            self.model.config.use_cache = False
            check_isolation(self.model, self.collator)
        self.adapters: Adapters
        if options.adapter is not None:
            from lorica import io

            self.adapters = io.load(
                self.model, options.adapter, check_base=not options.ignore_base_hash
            )
            self.recipe = self.adapters.recipe
            _check_optim(options, self.recipe)
            if options.learning_rate is None and self.recipe.learning_rate is not None:
                self.learning_rate = self.recipe.learning_rate[0]
                self.args.learning_rate = self.learning_rate
        else:
            assert self.recipe is not None
            self.adapters = lorica.attach(self.model, self.recipe)
        if not self.adapters.pristine:
            self.adapters.hash_base()  # before the first step writes to it

    def _tell(self) -> None:
        from lorica.data import show_example

        if not self.main:
            return
        logger.info(str(self.data.report))
        if self.held is not None:
            logger.info(f"evaluation: {len(self.held.dataset):,} rows")
        logger.info("one example, as the model sees it (what is trained is marked):")
        logger.info(show_example(self.data, self.tokenizer))

    # -- training ----------------------------------------------------------------------------------

    def _train(self) -> dict[str, Any]:
        from transformers import EarlyStoppingCallback
        from transformers.trainer_callback import PrinterCallback

        from lorica.train.log import RunLog, clock
        from lorica.train.trainer import TrainerMixin
        from lorica.train.weighted import TokenWeighted

        class Tuner(TrainerMixin, TokenWeighted):
            """The Trainer of this run."""

        Tuner.perplexity = self.task in ("causal-lm", "seq2seq-lm")
        log = RunLog(self.folder, self.device, self.facts, self.main)
        callbacks: list[Any] = [log]
        if self.options.early_stopping_patience is not None:
            stopping = EarlyStoppingCallback(self.options.early_stopping_patience)
            # The Trainer leaves the count at 0 on resuming, so a resumed run would stop later.
            for name, value in (
                self.before.get(type(stopping).__name__, {}).get("attributes", {}).items()
            ):
                setattr(stopping, name, value)
            callbacks.append(stopping)
        measured = self.scores.measure is not None
        trainer = Tuner(
            adapters=self.adapters,
            model=self.model,
            args=self.args,
            train_dataset=self.data.dataset,
            eval_dataset=None if self.held is None else self.held.dataset,
            data_collator=self.collator,
            processing_class=self.tokenizer,
            callbacks=callbacks,
            compute_metrics=self.scores if measured else None,
            preprocess_logits_for_metrics=self.scores.reduce if measured else None,
        )
        trainer.remove_callback(PrinterCallback)
        if self.main:
            if self.options.overwrite_output_dir:
                self.folder.clear()
            (self.folder / "result.json").unlink(missing_ok=True)
            self.folder.write("config.yaml", as_yaml(self.resolved()))
        if self.before.get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
            self._finish(trainer, log)  # the Trainer would take one more step
        else:
            start = None if self.checkpoint is None else str(self.checkpoint)
            trainer.train(resume_from_checkpoint=start)
        result = self._result(trainer, log, self._evaluation(trainer))
        result["output"] = str(self._save())
        if self.main:
            text = json.dumps(strict(result), indent=2, ensure_ascii=False)
            self.folder.write("result.json", text + "\n")
            logger.info(
                f"{result['steps']} steps in {clock(log.seconds)}; {result['output']} is written"
            )
        return strict(result)

    def _finish(self, trainer: Any, log: Any) -> None:
        """Of a run that had taken its last step, what comes after it."""
        from transformers import TrainerState

        from lorica import io

        assert self.checkpoint is not None
        state = TrainerState.load_from_json(str(self.checkpoint / "trainer_state.json"))
        trainer.state = state
        log.begin(state)
        best = self.args.load_best_model_at_end and state.best_global_step
        step = state.best_global_step if best else state.global_step
        io.restore(self.adapters, self.checkpoint.parent / f"checkpoint-{step}")

    def _evaluation(self, trainer: Any) -> dict[str, float] | None:
        """The figures of the weights that are kept: the best checkpoint's, else the last ones'."""
        from lorica.train.log import _figure

        if self.held is None or self.args.eval_strategy == "no":
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
        return {k: v for k, v in found.items() if k.startswith("eval_") and _figure(k)}

    def _save(self) -> Path:
        """`adapter/` beside the published base, else `model/`; the tokenizer lies with it."""
        from lorica import io

        adapters = self.adapters
        out = self.folder / ("adapter" if adapters.pristine else "model")
        if adapters.pristine or adapters.direct:
            io.save(adapters, out, overwrite=True)
        else:
            io.merge_to(adapters, out, overwrite=True)
        if self.main:
            self.tokenizer.save_pretrained(out)
            if self.labels is not None and adapters.pristine:  # a model has them in its config.json
                names = json.dumps(self.labels.names, ensure_ascii=False)
                (out / "labels.json").write_text(names + "\n", encoding="utf-8")
        return out

    def _result(
        self, trainer: Any, log: Any, evaluation: dict[str, float] | None
    ) -> dict[str, Any]:
        from lorica.train.log import peak_memory

        adapters, state, contract = self.adapters, trainer.state, self.adapters.contract
        lines = [line for line in self.folder.lines() if "loss" in line]
        best = bool(self.args.load_best_model_at_end and state.best_global_step)
        result: dict[str, Any] = {
            "method": adapters.recipe.text(),
            "recipe": adapters.recipe.to_dict(),
            "task": self.task,
            "steps": state.global_step,
            "epochs": state.epoch,
            "loss": lines[-1]["loss"] if lines else None,
            "train_loss": _mean_loss(lines),
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
            "contract": contract.as_dict(),
            "model": {
                "name": self.name,
                "class": type(self.model).__name__,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "sha256": adapters.hash_base(),
            },
            "adapter_sha256": adapters.fingerprint(),
            "data": {
                "name": self.source,
                "sha256": self.facts["data_sha256"],
                **self.data.report.as_dict(),
            },
            "versions": versions(),
        }
        if self.held is not None:
            result["eval_data"] = {
                "sha256": self.facts["eval_data_sha256"],
                **self.held.report.as_dict(),
            }
        return result


def _mean_loss(lines: list[dict[str, Any]]) -> float | None:
    """Mean of the logged losses, each weighed by the steps it stands for."""
    total = last = 0.0
    for line in lines:
        total += (line["step"] - last) * (line["loss"] or 0.0)
        last = line["step"]
    return total / last if last else None


def hash_rows(dataset: Any) -> str:
    """SHA-256 of a data set's columns by name, lengths and values: equal rows, equal hash."""
    import numpy as np

    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update(name.encode())
        for row in dataset.with_format("numpy").select_columns([name])[:][name]:
            array = np.asarray(row)
            wide = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
            digest.update(f"{wide.shape}".encode())
            digest.update(np.ascontiguousarray(wide).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of what carries the numbers."""
    names = ("lorica", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def as_yaml(config: Mapping[str, Any]) -> str:
    """config.yaml's text."""
    import yaml

    import lorica

    head = (
        f"# Written by lorica {lorica.__version__}. To repeat the run:"
        " lorica train config.yaml --output-dir ANOTHER\n"
    )
    return head + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Lists for tuples, so that YAML reads back what was written."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
