"""A fine-tuning run; what it shares with others is in `lorica.run.session`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.run.options import TrainOptions, UsageError, masking
from lorica.run.session import AbstractRun, absolute, check_optim, logger, recipe_of

if TYPE_CHECKING:
    from lorica.data import Labels, Prepared

WARMUP_RATIO = 0.03
EPOCHS = 3.0
MAX_LENGTH = 1024


def train(
    options: TrainOptions,
    *,
    then: Callable[[Any, Any], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Fine-tune as the options say; returns what result.json holds.

    Args:
        options: see `TrainOptions`; `further` holds fields of transformers' TrainingArguments.
        then: called with the trained model and its tokenizer once everything is written.
        callbacks: of the Trainer's kind, e.g. `lorica.run.signals.SaveOnSignal()`.

    Raises:
        UsageError: options that cannot be run as they stand, before anything is loaded or written.
        ValueError: data or a model that does not fit, a run that diverges. What is complete in the
            folder stays.
    """
    options.check()
    options = options.placed()
    recipe = None if options.adapter is not None else recipe_of(options)
    return FineTuning.start(options, recipe, then, callbacks)


@dataclass
class FineTuning(AbstractRun):
    """A checkpoint learns a data set."""

    verb: ClassVar[str] = "train"
    writes: ClassVar[tuple[str, ...]] = ("adapter", "model")
    remedy: ClassVar[str] = "; with float16 weights type `--dtype float32`"

    @property
    def gathers(self) -> bool:
        return self.recipe is None or "base_unchanged" in self.recipe.given()

    # -- data --------------------------------------------------------------------------------------

    def load_data(self) -> None:
        from lorica.data import detect, prepare
        from lorica.data.lengths import longest
        from lorica.run.load_model import (
            base_name,
            load_tokenizer,
            own_labels,
            read_config,
        )

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
        from lorica.embedded.source import NEW, TEST, is_embedded

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

    def plan(self) -> None:
        from lorica.inference.metrics import Scores

        options = self.options
        classes = 0 if self.labels is None else len(self.labels.names)
        self.scores = Scores(self.task, classes)
        rows = len(self.data.dataset)
        batches = math.ceil(rows / (options.per_device_train_batch_size * self.processes))
        a_pass = max(1, math.ceil(batches / options.gradient_accumulation_steps))
        epochs = options.num_train_epochs or EPOCHS
        steps = options.max_steps or math.ceil(epochs * a_pass)
        default = self.recipe.learning_rate if self.recipe is not None else None
        self.learning_rate = options.learning_rate or (default[0] if default else 2e-4)
        values = self.values(steps, by_pass=options.max_steps is None and epochs >= 2)
        ending = self._ending(steps)
        if self.held is not None and values["eval_strategy"] != "no":
            best, more = self.scores.best
            matches = values["eval_strategy"] == values["save_strategy"]
            saves, evals = values.get("save_steps"), values.get("eval_steps")
            if values["eval_strategy"] == "steps" and matches and saves and evals:
                matches = saves == evals  # else the best evaluation may have no checkpoint
            values.setdefault("load_best_model_at_end", matches and not ending)
            values.setdefault("metric_for_best_model", best)
            name = values["metric_for_best_model"].removeprefix("eval_")
            values.setdefault("greater_is_better", more if name == best else None)
        self.set_arguments(
            values,
            steps=steps,
            max_steps=options.max_steps,
            epochs=epochs,
            warmup_ratio=WARMUP_RATIO,
            include_num_input_tokens_seen="all" if self._packs else "non_padding",
        )
        patient = options.early_stopping_patience is not None
        if (patient or self.args.load_best_model_at_end) and ending:
            raise UsageError(
                f"`{ending}` gives what it promises at the end of a run only, and the best"
                " evaluation may lie before; leave out `--load-best-model-at-end` and"
                " `--early-stopping-patience`"
            )
        if self.args.label_smoothing_factor and self.labels is not None and self.labels.regression:
            raise UsageError(
                f"`--label-smoothing-factor {self.args.label_smoothing_factor}` spreads a label"
                " over classes, and the labels here are figures (a regression): leave it out"
            )
        if options.early_stopping_patience is not None and not self.args.load_best_model_at_end:
            raise UsageError(
                "`--early-stopping-patience` goes by the best checkpoint, which is kept only where"
                " evaluations and checkpoints fall together: let `--eval-steps` and `--save-steps`"
                " match"
            )

    def _ending(self, steps: int) -> str:
        """The word of a schedule whose weights are not what it promises before the end, or ""."""
        schedules: Any = () if self.recipe is None else self.recipe.schedules
        return next((s.name for s in schedules if s.fit(steps).final_from(steps) > 0), "")

    @property
    def evaluates(self) -> bool:
        return self.held is not None

    @property
    def own_recipe(self) -> bool:
        return self.options.adapter is None

    @property
    def _packs(self) -> bool:
        return self.options.packing != "none"

    def filled(self) -> dict[str, Any]:
        data = self.options.data or self.source
        return {"data": absolute(data), "max_length": self.max_length, "task": self.task}

    # -- model -------------------------------------------------------------------------------------

    def load_model(self) -> None:
        import lorica
        from lorica.data import check_isolation
        from lorica.run.load_model import load_model

        options = self.options
        self.model: Any = load_model(
            self.name,
            self.task,
            labels=self.labels,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            widen=self.device.type == "cpu",
        )
        self.model.name_or_path = absolute(self.name)  # what is written names the base by it
        self.model.config.name_or_path = absolute(self.name)
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.data.pad_token_id
        self.collator = self.data.collator()
        if self.task == "seq2seq-lm" and self.args.label_smoothing_factor:
            # The Trainer then keeps the labels, which decoders make their inputs of.
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise UsageError(
                    f"`--label-smoothing-factor {self.args.label_smoothing_factor}`: a"
                    f" {type(self.model).__name__} does not say what its decoder reads for a label;"
                    " leave it out"
                )
            self.collator = dataclasses.replace(self.collator, shift=shift)
        if self._packs:
            self.model.config.use_cache = False
            check_isolation(self.model, self.collator)
        if options.adapter is not None:
            from lorica import formats

            self.adapters = formats.load(
                self.model, options.adapter, check_base=not options.ignore_base_hash
            )
            self.recipe = recipe = self.adapters.recipe
            check_optim(options, recipe)
            if options.learning_rate is None and recipe.learning_rate is not None:
                self.learning_rate = recipe.learning_rate[0]
                self.args.learning_rate = self.learning_rate
        else:
            assert self.recipe is not None
            self.adapters = lorica.attach(self.model, self.recipe)

    def tell(self) -> None:
        from lorica.data import show_example

        logger.info(str(self.data.report))
        if self.held is not None:
            logger.info(f"evaluation: {len(self.held.dataset):,} rows")
        logger.info("one example, as the model sees it (what is trained is marked):")
        logger.info(show_example(self.data, self.tokenizer))

    # -- training ----------------------------------------------------------------------------------

    def keep(self) -> None:
        """The checkpoints hold all that a resumption needs."""

    def trainer(self, log: Any) -> Any:
        from transformers import EarlyStoppingCallback

        from lorica.run.token_weighting import TokenWeighted
        from lorica.run.trainer import TrainerMixin

        class Tuner(TrainerMixin, TokenWeighted):
            """The Trainer of this run."""

        Tuner.perplexity = self.task in ("causal-lm", "seq2seq-lm")
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
        return Tuner(
            adapters=self.adapters,
            modules_learning_rate=self.options.modules_learning_rate,
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

    def save(self) -> Path:
        """`adapter/` beside the published base, else `model/`; the tokenizer lies with it."""
        from lorica import formats
        from lorica.formats.atomic_folder import writing

        adapters = self.adapters
        out = self.folder / ("adapter" if adapters.base_unchanged else "model")
        if adapters.layers and not adapters.base_unchanged:
            formats.merge_to(adapters, out, tokenizer=self.tokenizer, overwrite=True)
        elif not self.main:
            formats.save(adapters, out, overwrite=True)  # its part of what the first process writes
        else:
            with writing(out, overwrite=True) as aside:
                formats.save(adapters, aside)
                self.tokenizer.save_pretrained(aside)
                if (
                    self.labels is not None and adapters.base_unchanged
                ):  # a model's are in its config
                    names = json.dumps(self.labels.names, ensure_ascii=False)
                    (aside / "labels.json").write_text(names + "\n", encoding="utf-8")
        return out

    def figures(self, trainer: Any, log: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            "task": self.task,
            "model": {
                "name": absolute(self.name),
                "class": type(self.model).__name__,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "sha256": self.adapters.hash_base(),
            },
            "data": {
                "name": absolute(self.source),
                "sha256": self.facts["data_sha256"],
                **self.data.report.as_dict(),
            },
        }
        if self.held is not None:
            found["eval_data"] = {
                "sha256": self.facts["eval_data_sha256"],
                **self.held.report.as_dict(),
            }
        return found


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
