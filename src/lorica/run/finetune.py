"""A fine-tuning run: a checkpoint learns a data set.

`train` reads as the run goes: data → arguments → model → train, over one `FineTuning` plan. What
is heavy (torch, transformers) is imported inside the functions, so that wrong options are refused
at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.run import new_tokens, resume
from lorica.run.arguments import cadence, training_arguments
from lorica.run.config import absolute
from lorica.run.effects import refuse_unread
from lorica.run.options import TrainOptions, UsageError, masking
from lorica.run.options.checks import refuse
from lorica.run.plan import RunData, RunPlan
from lorica.run.quantization import check_method
from lorica.run.recipe import check_optim, recipe_of
from lorica.run.start import started
from lorica.text import nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, TrainerCallback

    from lorica.data import Prepared
    from lorica.inference.metrics import Scores
    from lorica.run.log import RunLog
    from lorica.run.loop import RunTrainer
    from lorica.run.new_tokens import NewTokens
    from lorica.run.report.samples import Samples

logger = logging.getLogger("lorica")

WARMUP_RATIO = 0.03
EPOCHS = 3.0
MAX_LENGTH = 1024
LEARNING_RATE = 2e-4  # where the method has none of its own


@dataclass(kw_only=True)
class FineTuningData(RunData):
    """Rows of examples, as the model takes them.

    Attributes:
        base: folder or hub id of the model.
        config: the base's.
        task: what is learnt.
        train: rows to train on; they say which labels there are.
        held: rows to evaluate on, if any.
        scores: the task's figures.
        name: the data, for result.json.
        columns: the names in the data.
        asked: rows as they are in the data, to take the examples of the run's page from: those to
            evaluate on where there are any.
        new: tokens that the tokenizer was given, if any.
        quantization: transformers' configuration of how the base is quantised while it is loaded,
            if it is.
    """

    base: str
    config: PretrainedConfig
    task: str
    train: Prepared
    held: Prepared | None
    scores: Scores
    name: str
    columns: tuple[str, ...]
    asked: Dataset
    new: NewTokens | None
    quantization: Any  # Any: transformers has a class for each method


class FineTuning(RunPlan[TrainOptions, FineTuningData]):
    """The plan of `lorica train`."""

    verb: ClassVar[str] = "train"
    writes: ClassVar[tuple[str, ...]] = ("adapter", "model")


def train(
    options: TrainOptions,
    *,
    then: Callable[[Any, Any], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Fine-tune as the options say; returns what result.json holds.

    Args:
        options: see `TrainOptions`; `further` holds fields of transformers' TrainingArguments.
        then: called with the trained model and its tokenizer once everything is written.
        callbacks: of the Trainer's kind, e.g. `lorica.run.signals.SaveOnSignal()`.

    Raises:
        UsageError: options that cannot be run, before anything is loaded or written.
        ValueError: data or a model that does not fit, a run that diverges. What is complete in the
            folder stays.
    """
    options.check()
    options = options.placed()
    recipe = None if options.adapter is not None else recipe_of(options)
    with started(FineTuning, options, recipe) as plan:
        read_data(plan)
        plan_steps(plan)
        resume.check_same_run(plan)
        load_model(plan)
        result = train_model(plan, callbacks)
        if then is not None:
            then(plan.model, plan.data.tokenizer)
        return result


# -- data ------------------------------------------------------------------------------------------


def read_data(plan: FineTuning) -> None:
    """Read the rows and the tokenizer, and fill in `plan.data`.

    Raises:
        ValueError: there is no such data or model, or the data has no shape that is known.
    """
    from lorica.data import detect, prepare
    from lorica.data.lengths import longest
    from lorica.data.tokenise import sample_of
    from lorica.run.load_model import base_name, load_tokenizer, own_labels, read_config

    options = plan.options
    base = base_name(options.model, options.adapter)
    trust = {"trust_remote_code": options.trust_remote_code}
    config = read_config(base, attn_implementation=options.attn_implementation, **trust)
    quantization = options.quantization_config()
    if plan.recipe is not None:
        check_method(plan.recipe, quantization, config, base)
    source, train_rows, held_rows = _rows(options)
    shape = detect(
        train_rows.column_names,
        task=options.task,
        shape=options.shape,
        sample=sample_of(train_rows),
    )
    task = options.task or shape.default_task
    tokenizer = load_tokenizer(_tokenizer_of(options, base), **trust)
    new = None if options.add_tokens is None else new_tokens.add(tokenizer, options.add_tokens)
    embeddings = new_tokens.vocabulary_with(base, config, options.adapter, **trust)
    if new is not None and embeddings is not None:
        embeddings = max(embeddings, new.vocabulary)
    limit = longest(config, tokenizer)
    max_length = options.max_length or min(MAX_LENGTH, limit or MAX_LENGTH)
    refuse(
        limit is not None and max_length > limit,
        f"`--max-length {max_length}`: `{base}` ends at {limit} tokens; give at most that",
    )
    how: dict[str, Any] = {
        "max_length": max_length,
        "task": task,
        "shape": options.shape,
        "now": None if options.now is None else datetime.fromisoformat(options.now),
        "embeddings": embeddings,
    }
    if options.max_lost_text is not None:
        how["max_lost_text"] = options.max_lost_text
    if options.packing != "none":
        how["packing"] = options.packing
    how |= masking(options.chat_template, options.train_on)
    labels = own_labels(config, task)
    data = prepare(train_rows, tokenizer, **how, **_labelled(labels))
    held = None
    if held_rows is not None:
        how["now"] = how["now"] or data.now  # one day for both
        held = prepare(held_rows, tokenizer, **how, **_labelled(data.labels))
    if data.chat_template is not None:
        tokenizer.chat_template = data.chat_template
    scores = _scores(task, data)
    facts: dict[str, Any] = {"data_sha256": hash_rows(data.dataset)}
    if held is not None:
        facts["eval_data_sha256"] = hash_rows(held.dataset)
    facts["processes"] = plan.processes
    settled = {"data": absolute(source), "max_length": max_length, "task": task}
    if data.now is not None:  # a resumed run prints the same date
        settled["now"] = data.now.isoformat()
    plan.data = FineTuningData(
        source=source,
        tokenizer=tokenizer,
        max_length=max_length,
        facts=facts,
        settled=settled,
        evaluates=held is not None,
        measured=scores.measure is not None,
        shuffled=True,
        uniform=False,
        base=base,
        config=config,
        task=task,
        train=data,
        held=held,
        scores=scores,
        name=absolute(source),
        columns=tuple(train_rows.column_names),
        asked=train_rows if held_rows is None else held_rows,
        new=new,
        quantization=quantization,
    )


def _tokenizer_of(options: TrainOptions, base: str) -> str:
    """Where the tokenizer is: with an adapter that has one, which knows the tokens and the chat
    template of its training, else with the base."""
    from lorica.formats.safe_files import locate

    if options.adapter is not None:
        own = locate(options.adapter)
        if (own / "tokenizer_config.json").is_file():
            return str(own)
    return base


def _scores(task: str, data: Prepared) -> Scores:
    """The task's figures; which of them is the default goes by the labels that are trained on."""
    import numpy as np

    from lorica.inference.metrics import Scores, majority

    names = () if data.labels is None else data.labels.names
    if not names or task == "token-classification":
        return Scores(task, names)
    return Scores(task, names, majority(np.asarray(data.dataset["labels"][:])))


def _rows(options: TrainOptions) -> tuple[str, Dataset, Dataset | None]:
    """The data's name, rows to train on and rows to evaluate on."""
    from lorica.data import read_splits
    from lorica.embedded.source import NEW, TEST, is_embedded

    source, eval_split = options.data or NEW, options.eval_split
    brought = is_embedded(source) and options.eval_data is options.eval_fraction is None
    train_rows, held_rows = read_splits(
        source,
        split=options.split,
        eval_source=options.eval_data,
        eval_split=TEST if brought and eval_split is None else eval_split,
        eval_fraction=options.eval_fraction,
        seed=options.seed,
        header=options.header,
        columns=options.columns,
        max_samples=options.max_samples,
        txt_split=options.documents,
    )
    return source, train_rows, held_rows


def _labelled(labels: Any) -> dict[str, Any]:
    return {} if labels is None else {"labels": labels}


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


# -- arguments -------------------------------------------------------------------------------------


def plan_steps(plan: FineTuning) -> None:
    """Work out how long the run is, and fill in `plan.arguments`.

    Raises:
        UsageError: options that contradict the data or each other.
    """
    options, recipe = plan.options, plan.recipe
    rows = len(plan.data.train.dataset)
    at_once = options.per_device_train_batch_size * plan.processes
    drops = bool(options.further.get("dataloader_drop_last"))
    refuse(
        drops and rows < at_once,
        f"`--dataloader-drop-last` leaves out the last batch, and the only one has {rows:,} of"
        f" {at_once:,} examples: nothing would be trained. Leave it out, or give a smaller"
        f" `--per-device-train-batch-size`, at most {max(1, rows // plan.processes)}",
    )
    batches = rows // at_once if drops else math.ceil(rows / at_once)
    epoch_steps = max(1, math.ceil(batches / options.gradient_accumulation_steps))
    epochs = options.num_train_epochs or EPOCHS
    steps = options.max_steps or math.ceil(epochs * epoch_steps)
    default = recipe.learning_rate if recipe is not None else None
    values = cadence(plan, steps, by_epoch=options.max_steps is None and epochs >= 2)
    ending = _ending(plan, steps)
    _set_best(plan, values, ending)
    plan.arguments = training_arguments(
        plan,
        values,
        learning_rate=options.learning_rate or (default[0] if default else LEARNING_RATE),
        steps=steps,
        max_steps=options.max_steps,
        epochs=epochs,
        warmup_ratio=WARMUP_RATIO,
        gathers=recipe is None or "base_unchanged" in recipe.given(),
        include_num_input_tokens_seen="non_padding" if options.packing == "none" else "all",
    )
    _check_steps(plan, ending)


def _set_best(plan: FineTuning, values: dict[str, Any], ending: str) -> None:
    """Keep the best weights, unless the user says otherwise, where that is possible."""
    if not plan.data.evaluates or values["eval_strategy"] == "no":
        return
    scores = plan.data.scores
    best, _ = scores.best
    matches = values["eval_strategy"] == values["save_strategy"]
    saves, evals = values.get("save_steps"), values.get("eval_steps")
    if values["eval_strategy"] == "steps" and matches and saves and evals:
        matches = saves == evals  # else the best evaluation may have no checkpoint
    values.setdefault("load_best_model_at_end", matches and not ending)
    chosen = "metric_for_best_model" in values
    values.setdefault("metric_for_best_model", best)
    name = values["metric_for_best_model"].removeprefix("eval_")
    refuse(
        name not in scores.names,
        f"`--metric-for-best-model {name}`: the figures of `{plan.data.task}` are"
        f" {', '.join(scores.names)}; type one of these.{nearest(name, scores.names)}",
    )
    # Not transformers' guess, which takes everything but a loss for something to be raised.
    values.setdefault("greater_is_better", name not in scores.falling)
    if values["load_best_model_at_end"]:
        wanted = "highest" if values["greater_is_better"] else "lowest"
        why = f" ({scores.why})" if scores.why and not chosen else ""
        others = ", ".join(other for other in scores.names if other != name)
        more = f"; `--metric-for-best-model` also takes {others}" if plan.options.verbose else ""
        logger.info(f"the checkpoint with the {wanted} {name} is kept{why}{more}")


def _ending(plan: FineTuning, steps: int) -> str:
    """The name of a schedule whose weights are not what it promises before the end, or ""."""
    schedules = () if plan.recipe is None else plan.recipe.schedules
    return next((s.name for s in schedules if s.fit(steps).final_from(steps) > 0), "")


def _check_steps(plan: FineTuning, ending: str) -> None:
    training, labels = plan.arguments.training, plan.data.train.labels
    patient = plan.options.early_stopping_patience is not None
    refuse(
        bool(ending) and (patient or training.load_best_model_at_end),
        f"`{ending}` gives what it promises at the end of a run only, and the best evaluation may"
        " lie before; leave out `--load-best-model-at-end` and `--early-stopping-patience`",
    )
    smoothing = training.label_smoothing_factor
    refuse(
        bool(smoothing) and labels is not None and labels.regression,
        f"`--label-smoothing-factor {smoothing}` spreads a label over classes, and the labels here"
        " are figures (a regression): leave it out",
    )
    refuse(
        patient and not training.load_best_model_at_end,
        "`--early-stopping-patience` goes by the best checkpoint, which is kept only where"
        " evaluations and checkpoints fall together: let `--eval-steps` and `--save-steps` match",
    )


# -- model -----------------------------------------------------------------------------------------


def load_model(plan: FineTuning) -> None:
    """Load the base and attach the adapters; fill in `plan.model`, `adapters` and `collator`.

    Raises:
        ValueError: the model or the adapter cannot be loaded, or they do not fit.
    """
    import lorica
    from lorica.data import check_causal, check_isolation
    from lorica.run import load_model as loading
    from lorica.run.start_from_data import attach_options

    options, data = plan.options, plan.data
    loaded = loading.load_model(
        data.base,
        data.task,
        labels=data.train.labels,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        widen=plan.device.type == "cpu",
        trust_remote_code=options.trust_remote_code,
        quantization=data.quantization,
    )
    model: Any = loaded.model
    if data.new is not None:
        new_tokens.start(model, data.new)
    model.name_or_path = absolute(data.base)  # what is written names the base by it
    model.config.name_or_path = absolute(data.base)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = data.train.pad_token_id
    collator: Any = data.train.collator()
    if data.task == "seq2seq-lm" and plan.arguments.training.label_smoothing_factor:
        collator = dataclasses.replace(collator, shift=_shift(plan, model))
    if data.task == "causal-lm":
        check_causal(model, data.columns)
    if options.packing != "none":
        model.config.use_cache = False
        check_isolation(model, collator)
    plan.model, plan.collator = model, collator
    if options.adapter is None:
        assert plan.recipe is not None
        if data.new is not None:
            plan.recipe = new_tokens.trained_by(plan.recipe, model, data.new)
        start = attach_options(plan, lambda _: data.train.dataset)
        plan.adapters = lorica.attach(
            model, plan.recipe, missing_keys=loaded.missing_keys, verbose=False, **start
        )
    else:
        _load_adapter(plan, options.adapter)
        if bare := loaded.drawn(plan.adapters):
            raise ValueError(
                f"`{data.base}` has no weights for {', '.join(bare)} of {type(model).__name__}, and"
                f" the adapter `{options.adapter}` has none either, so they would stay frozen at"
                " random values. Name the base that the adapter was trained on with `--model`"
            )
    if options.learning_rate is not None:
        plan.adapters.summary.defaults.pop("learning_rate", None)  # the method's own is not used
    _describe(plan)


def _shift(plan: FineTuning, model: Any) -> Callable[..., Any]:
    """What makes the decoder's inputs of the labels: under label smoothing the Trainer keeps these
    from the model."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise UsageError(
            f"`--label-smoothing-factor {plan.arguments.training.label_smoothing_factor}`: a"
            f" {type(model).__name__} does not say what its decoder reads for a label; leave it"
            " out"
        )
    return shift


def _load_adapter(plan: FineTuning, adapter: str) -> None:
    """An adapter brings its own recipe, and with it a rate."""
    from lorica import formats

    options, arguments = plan.options, plan.arguments
    new_tokens.fit_adapter(plan.model, adapter)
    plan.adapters = formats.load(plan.model, adapter, check_base=not options.ignore_base_hash)
    plan.recipe = plan.adapters.recipe
    check_optim(options, plan.recipe)
    refuse_unread(plan, plan.recipe, arguments.training)
    if options.learning_rate is None and plan.recipe.learning_rate is not None:
        arguments.learning_rate = plan.recipe.learning_rate[0]
        arguments.training.learning_rate = arguments.learning_rate


def _describe(plan: FineTuning) -> None:
    from lorica.data import show_example
    from lorica.model.summary import say

    if not plan.main:
        return
    summary = plan.adapters.summary
    say(summary.details() if plan.options.verbose else str(summary))
    logger.info(str(plan.data.train.report))
    if plan.data.held is not None:
        logger.info(f"evaluation: {len(plan.data.held.dataset):,} rows")
    logger.info("one example, as the model sees it (what is trained is marked):")
    logger.info(show_example(plan.data.train, plan.data.tokenizer))


# -- training --------------------------------------------------------------------------------------


def train_model(plan: FineTuning, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """Take the steps, and write what was trained; returns what result.json holds.

    Raises:
        ValueError: the run diverges.
        OSError: the disk refuses a file.
    """
    from lorica.run import checkpoints, loop
    from lorica.run.log import RunLog
    from lorica.run.report import reported

    log = RunLog(
        plan.folder,
        plan.device,
        plan.data.facts,
        plan.main,
        remedy="; with float16 weights type `--dtype float32`",
        scores=plan.data.scores,
        pause=_pause(plan),
    )
    trainer = _trainer(plan, log)
    loop.begin(plan, trainer, callbacks)
    with reported(plan):
        samples = _samples(plan)
        loop.take_steps(plan, trainer, log)
        result = loop.measured(plan, trainer, log) | _figures(plan)
        result["versions"] = loop.versions()
        loop.unwrap(plan, trainer)
        with checkpoints.saving("what was trained", plan.folder.path):
            result["output"] = str(save(plan))
            if plan.main:
                _write_card(plan, result)
        samples.finish()
        return loop.write_result(plan, result, log)


def _pause(plan: FineTuning) -> float:
    """An evaluation's time in steps, as a guess: a step takes three times its forward pass."""
    held, options = plan.data.held, plan.options
    step = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return 0.0 if held is None else len(held.dataset) / (3 * step * plan.processes)


def _samples(plan: FineTuning) -> Samples:
    """The examples of the run's page, asked before the first step."""
    from lorica.run.report import samples

    data, options = plan.data, plan.options

    def questions() -> samples.AbstractQuestions:
        if data.train.labels is not None:
            return samples.Predictions(data.tokenizer, data.held or data.train)
        return samples.from_rows(
            data.tokenizer,
            data.task,
            data.asked,
            chat_template=options.chat_template,
            shape=options.shape,
        )

    of = "training data" if data.held is None else "evaluation data"
    return samples.Samples(plan, questions, of)


def _trainer(plan: FineTuning, log: RunLog) -> RunTrainer:
    from transformers import EarlyStoppingCallback

    from lorica.run.loop import RunTrainer

    data, scores = plan.data, plan.data.scores
    callbacks: list[TrainerCallback] = [log]
    if plan.options.early_stopping_patience is not None:
        stopping = EarlyStoppingCallback(plan.options.early_stopping_patience)
        # The Trainer leaves the count at 0 on resuming, so a resumed run would stop later.
        before = plan.earlier.get(type(stopping).__name__, {})
        for name, value in before.get("attributes", {}).items():
            setattr(stopping, name, value)
        callbacks.append(stopping)
    measures = scores.measure is not None
    trainer = RunTrainer(
        adapters=plan.adapters,
        modules_learning_rate=plan.options.modules_learning_rate,
        model=plan.model,
        args=plan.arguments.training,
        train_dataset=data.train.dataset,
        eval_dataset=None if data.held is None else data.held.dataset,
        data_collator=plan.collator,
        processing_class=data.tokenizer,
        callbacks=callbacks,
        compute_metrics=scores if measures else None,
        preprocess_logits_for_metrics=scores.reduce if measures else None,
    )
    trainer.perplexity = data.task in ("causal-lm", "seq2seq-lm")
    return trainer


def save(plan: FineTuning) -> Path:
    """Write `adapter/` beside the published base, else `model/`, with the tokenizer."""
    from lorica import formats
    from lorica.formats.atomic_folder import writing

    adapters, labels = plan.adapters, plan.data.train.labels
    out = plan.folder / ("adapter" if adapters.base_unchanged else "model")
    if adapters.layers and not adapters.base_unchanged:
        formats.merge_to(adapters, out, tokenizer=plan.data.tokenizer, overwrite=True)
    elif not plan.main:
        formats.save(adapters, out, overwrite=True)  # its part of what the first process writes
    else:
        with writing(out, overwrite=True) as aside:
            formats.save(adapters, aside)
            plan.data.tokenizer.save_pretrained(aside)
            if labels is not None and adapters.base_unchanged:  # a model's are in its config
                names = json.dumps(labels.names, ensure_ascii=False)
                (aside / "labels.json").write_text(names + "\n", encoding="utf-8")
    return out


def _write_card(plan: FineTuning, result: dict[str, Any]) -> None:
    """Write the model card beside what was trained."""
    import lorica
    from lorica.run import card

    out = Path(result["output"])
    told = card.text(
        out,
        method=result["method"],
        base=result["model"]["name"],
        what=out.name,
        result=result,
        citation=lorica.cite(plan.adapters.recipe),
    )
    card.write(out, told)


def _figures(plan: FineTuning) -> dict[str, Any]:
    """What this verb adds to result.json."""
    from lorica.embedded import named

    data, facts = plan.data, plan.data.facts
    found: dict[str, Any] = {
        "task": data.task,
        "model": {
            "name": named(absolute(data.base)),
            "class": type(plan.model).__name__,
            "dtype": str(plan.model.dtype).removeprefix("torch."),
            "sha256": plan.adapters.hash_base(),
        },
        "data": {
            "name": data.name,
            "sha256": facts["data_sha256"],
            **data.train.report.as_dict(),
        },
    }
    if data.held is not None:
        found["eval_data"] = {
            "sha256": facts["eval_data_sha256"],
            **data.held.report.as_dict(),
        }
    return found
