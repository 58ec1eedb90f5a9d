"""A pre-training run: a model from random weights on running text.

What it shares with fine-tuning is in `lorica.run.session`. Every method starts from the same
weights under the same seed, sees the same rows in the same order, and leaves an ordinary
transformers model. What the method has no update for trains in place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.model.summary import human, say
from lorica.run import model_configs
from lorica.run.options import PretrainOptions, UsageError
from lorica.run.session import AbstractRun, absolute, logger, recipe_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lorica.data.stream import Text
    from lorica.data.streamed import Streamed
    from lorica.model.summary import Summary
    from lorica.recipe.recipe import Recipe

METHOD = "full"
LEARNING_RATE = 1e-3  # SwitchLoRA's for ordinary training, at every size
WARMUP_RATIO = 0.05  # between SwitchLoRA's 100 of 40,000 steps and GaLore's tenth
EPOCHS = 1.0
BEGINNING = 20_000_000  # characters of a stream that a tokenizer is trained on
MAX_LENGTH = 256  # GaLore's, and SwitchLoRA's at 130M


def pretrain(
    options: PretrainOptions,
    *,
    then: Callable[[Any, Any], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Pre-train as the options say; returns what result.json holds.

    Args:
        options: see `PretrainOptions`; `further` holds fields of transformers' TrainingArguments.
        then: called with the trained model and its tokenizer once everything is written.
        callbacks: of the Trainer's kind, e.g. `lorica.run.signals.SaveOnSignal()`.

    Raises:
        UsageError: options that cannot be run as they stand, before anything is loaded or written.
        ValueError: data, a configuration or a tokenizer that don't fit, a run that diverges. What
            is complete in the folder stays.
    """
    options.check()
    options = options.placed()
    return Pretraining.start(options, scratch_recipe(options), then, callbacks)


def dry_run(options: PretrainOptions) -> Cost:
    """What the run that the options describe would train and hold; reads no data, writes nothing.

    Without a tokenizer that is given, the vocabulary is `vocab_size` or the shape's.

    Raises:
        UsageError, ValueError: as `pretrain`, as far as it is known without the data.
    """
    from lorica.run.load_model import load_tokenizer
    from lorica.run.session import quieten

    options.check()
    quieten()
    recipe = scratch_recipe(options)
    shape = model_configs.find(options.model_config)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    config = settled(shape, options, tokenizer)
    return cost(config, recipe)


def scratch_recipe(options: PretrainOptions) -> Recipe:
    """The recipe that the options ask for, under which everything trains; left out, its rank is a
    quarter of the model's width, as in the papers."""
    from dataclasses import replace

    options = replace(options, method=options.method or METHOD)
    recipe = recipe_of(options)
    fixed = any(choice.only_r is not None for choice in recipe.choices)
    if "r" in recipe.takes and options.r is None and not fixed:
        config = model_configs.find(options.model_config).config.get_text_config()
        width: Any = getattr(config, "hidden_size", None)
        options = options if width is None else replace(options, r=max(1, width // 4))
        recipe = recipe_of(options)
    return recipe if recipe.whole else recipe_of(options, train_rest=True)


def scratch_rate(recipe: Recipe) -> tuple[float, str]:
    """The default rate and whose it is: the rule's or a schedule's own, which shape a whole run, or
    ordinary training's. Those of starts, scales and forms are for fine-tuning a checkpoint.

    Example:
        >>> from lorica.recipe.recipe import Recipe
        >>> scratch_rate(Recipe.parse("lora"))
        (0.001, 'pre-training')
    """
    for axis in ("rules", "schedules"):
        rated = [(c.default_learning_rate, c.name) for c in recipe.of(axis)]
        if found := [(rate, word) for rate, word in rated if rate is not None]:
            return min(found)
    return LEARNING_RATE, "pre-training"


# -- cost ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a method trains of a model, in elements and bytes; nothing here is measured.

    Attributes:
        parameters: of the plain model.
        trainable: elements that train.
        gradient_bytes: what data-parallel processes exchange at every step: a gradient for each
            trainable element.
        optimizer_bytes: the rule's state of them.
        schedule_bytes: what schedules keep between steps, e.g. spare vectors; where it lies is an
            argument of the schedule.
        weight_bytes: all weights that are held, trained or not.
    """

    method: str
    parameters: int
    trainable: int
    gradient_bytes: int
    optimizer_bytes: int
    schedule_bytes: int
    weight_bytes: int
    summary: Summary

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "summary": self.summary.as_dict()}

    def __str__(self) -> str:
        share = 1 - self.trainable / max(self.parameters, 1)
        kept = f", {human(self.schedule_bytes)} of schedules' state" if self.schedule_bytes else ""
        less = f" ({share:.1%} less)" if share > 0 else ""
        return (
            f"{self.summary}\n{self.parameters:,} parameters, {self.trainable:,} train{less}\n"
            f"a step: {human(self.gradient_bytes)} of gradients to exchange between processes\n"
            f"held: {human(self.weight_bytes)} of weights, {human(self.optimizer_bytes)} of the"
            f" optimizer's state{kept}"
        )


def cost(config: str | PretrainedConfig, method: str | Recipe = METHOD, **fields: Any) -> Cost:
    """What pre-training would train and hold, from shapes alone (on the meta device).

    Args:
        config: a word of `lorica.run.model_configs`, a config.json, or a configuration.
        method: text form or recipe.
        **fields: of `Recipe`, e.g. `r=512`.

    Example:
        >>> found = cost("llama-1b", "lora", r=512)
        >>> found.parameters, found.trainable
        (1339492352, 609720320)
    """
    import torch

    import lorica
    from lorica.recipe.recipe import Recipe

    name = config if isinstance(config, str) else type(config).__name__
    plan = model_configs.find(config).config if isinstance(config, str) else config
    recipe = Recipe.parse(method, **fields)
    recipe = recipe if recipe.whole else Recipe.parse(recipe, train_rest=True)
    with torch.device("meta"):
        model = model_configs.build(plan, name, dtype=torch.float32)
    parameters = count(model)
    summary = lorica.attach(model, recipe, fresh=(), verbose=False).summary
    summary.defaults.pop("learning_rate", None)
    memory = summary.memory
    return Cost(
        method=recipe.text(),
        parameters=parameters,
        trainable=summary.trainable,
        gradient_bytes=memory["gradients"],
        optimizer_bytes=memory["optimizer"],
        schedule_bytes=memory.get("schedules", 0),
        weight_bytes=memory["base"] + memory["trained"] + memory["frozen factors"],
        summary=summary,
    )


def count(model: Any) -> int:
    """Elements of a model's parameters, each once."""
    return sum(p.numel() for p in model.parameters())


# -- the run ---------------------------------------------------------------------------------------


@dataclass
class Pretraining(AbstractRun):
    """A configuration learns running text."""

    verb: ClassVar[str] = "pretrain"
    writes: ClassVar[tuple[str, ...]] = ("model", "tokenizer")

    # -- data --------------------------------------------------------------------------------------

    def load_data(self) -> None:
        from lorica.data.stream import has_txt
        from lorica.embedded.source import BOTH

        options = self.options
        self.shape = model_configs.find(options.model_config)
        self.sources = options.data or (BOTH,)
        self.source = ", ".join(self.sources)
        longest = self.shape.longest
        self.max_length = options.max_length or min(MAX_LENGTH, longest or MAX_LENGTH)
        if self.max_length < 2:
            raise UsageError(
                f"`--max-length {self.max_length}`: a row needs 2 tokens at least, one to predict"
                " the other; common values are 256 to 1024"
            )
        if longest is not None and self.max_length > longest:
            raise UsageError(
                f"`--max-length {self.max_length}`: `{options.model_config}` ends at {longest}"
                " tokens; give at most that"
            )
        evaluated = options.eval_data or ()
        if options.documents is not None and not has_txt((*self.sources, *evaluated)):
            raise UsageError(
                f"`--documents {options.documents}` says what a document of a .txt file is, and"
                f" {self.source} is none; leave it out"
            )
        self.held = None
        if options.streaming:
            self._stream()
        else:
            self._read()
        if self.held is None and options.brings_evaluation():
            self._read_held()
        if self.held is not None:
            self.facts["eval_data_sha256"] = hash_ids(self.held)

    def _read(self) -> None:
        """All of the data, as rows in memory."""
        options = self.options
        text = self._text(self.sources, options.split)
        self._load_tokenizer(text.texts())
        self.text = text.ids(self.tokenizer)
        rows = self.text.rows(self.max_length)
        self._refuse_short(self.source, self.text, len(rows), 1)
        if options.eval_fraction is not None:
            rows, self.held = self._parted(rows)
        self._refuse_short(self.source, self.text, len(rows), self.rows_per_step)
        # Whole steps only, so that each one weighs, and counts, the same.
        self.rows = rows[: len(rows) // self.rows_per_step * self.rows_per_step]
        self.facts = {"data_sha256": hash_ids(self.rows)}

    def _text(self, sources: tuple[str, ...], split: str | None) -> Text:
        from lorica.data.stream import Text, has_txt

        options = self.options
        documents = options.documents if has_txt(sources) else None
        return Text.read(sources, split=split, columns=options.columns, documents=documents)

    def _stream(self) -> None:
        """The data's beginning; rows are made as the run goes on."""
        from lorica.data.streamed import Streamed

        options = self.options
        self.streamed = Streamed(self.source, split=options.split, columns=options.columns)
        self._load_tokenizer(self.streamed.texts(BEGINNING))
        self.streamed.lay(self.tokenizer, self.max_length, options.seed)
        inner: Any = self.tokenizer
        told = inner.backend_tokenizer.to_str() if inner.is_fast else str(inner.get_vocab())
        self.facts = {"tokenizer_sha256": hashlib.sha256(told.encode()).hexdigest()}

    def _load_tokenizer(self, texts: Iterable[str]) -> None:
        """The one given, the one trained for the run that is gone on with, or a new one; and the
        configuration that fits it."""
        from lorica.run.load_model import load_tokenizer
        from lorica.run.train_tokenizer import train_tokenizer

        options = self.options
        kept = None if self.checkpoint is None else self.checkpoint.parent / "tokenizer"
        if options.tokenizer is not None:
            self.tokenizer = load_tokenizer(options.tokenizer)
        elif kept is not None and kept.is_dir():
            self.tokenizer = load_tokenizer(str(kept))
            for name in ("is_local", "local_files_only"):  # what transformers notes of reading it
                self.tokenizer.init_kwargs.pop(name, None)
        else:
            wanted = options.vocab_size or self.shape.vocabulary
            self.tokenizer = train_tokenizer(texts, wanted)
            found = len(self.tokenizer)
            if options.vocab_size is not None and found < wanted:
                raise ValueError(
                    f"`--vocab-size {wanted}`: the text of {self.source} has pairs for {found:,}"
                    " tokens only; give at most that, or more text"
                )
            self.tokenizer.model_max_length = self.max_length
        if not isinstance(self.tokenizer.eos_token_id, int):
            raise ValueError(
                f"the tokenizer `{options.tokenizer}` has no end-of-text token (eos_token), so"
                " documents would run into each other; give one that has it, or leave"
                " `--tokenizer` out to train one"
            )
        self.config = settled(self.shape, options, self.tokenizer)
        if self.shape.own_positions:
            self.config.max_position_embeddings = self.max_length

    def _parted(self, rows: Any) -> tuple[Any, Any]:
        """Rows to train on, and the first of a fraction of them to evaluate on; both in the data's
        order."""
        from datasets import Dataset

        from lorica.data import hold_out

        numbers = Dataset.from_dict({"row": range(len(rows))})
        parts = hold_out(numbers, self.options.eval_fraction, seed=self.options.seed)
        train, held = (part.with_format("numpy")["row"][:] for part in parts)
        return rows[train], rows[held][: self._most_held()]

    def _most_held(self) -> int | None:
        """Rows to evaluate on at most."""
        most = self.options.max_eval_tokens
        return None if most is None else math.ceil(most / self.max_length)

    def _read_held(self) -> None:
        """Text to evaluate on, of its own."""
        from lorica.embedded.source import TEST

        options, split, limit = self.options, self.options.eval_split, self._most_held()
        sources = options.eval_data or self.sources
        if options.streaming and options.eval_data is None:
            self.held = self._open(split).head(limit or 0)
            return
        if options.eval_data is None and split is None:
            split = TEST  # of the embedded tasks
        found = self._text(sources, split).ids(self.tokenizer)
        self.held = found.rows(self.max_length)[:limit]
        self._refuse_short(", ".join(sources), found, len(self.held), 1)

    def _open(self, split: str | None) -> Streamed:
        from lorica.data.streamed import Streamed

        found = Streamed(self.source, split=split, columns=self.options.columns)
        found.lay(self.tokenizer, self.max_length, self.options.seed)
        return found

    def _refuse_short(self, source: str, text: Any, rows: int, wanted: int) -> None:
        if rows >= wanted:
            return
        options, length = self.options, self.max_length
        batch = "one row" if wanted == 1 else f"one step ({wanted} rows of {length})"
        raise ValueError(
            f"the text of {source} is too short: {len(text.ids):,} tokens make {rows} rows of"
            f" {length}, and {batch} needs {wanted * length:,}. Give more text, or a smaller"
            " `--max-length`"
            + (
                ""
                if wanted == 1
                else f", `--per-device-train-batch-size` ({options.per_device_train_batch_size}) or"
                f" `--gradient-accumulation-steps` ({options.gradient_accumulation_steps})"
            )
        )

    @property
    def rows_per_step(self) -> int:
        options = self.options
        a_pass = options.per_device_train_batch_size * self.processes
        return a_pass * options.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.max_length

    # -- arguments ---------------------------------------------------------------------------------

    def plan(self) -> None:
        options = self.options
        epochs = options.num_train_epochs or EPOCHS
        max_steps = options.max_steps
        if options.max_tokens is not None:
            max_steps = math.ceil(options.max_tokens / self.tokens_per_step)
        steps = max_steps or math.ceil(epochs * (len(self.rows) // self.rows_per_step))
        assert self.recipe is not None
        own, self.rate_from = scratch_rate(self.recipe)
        self.learning_rate = options.learning_rate or own
        self.set_arguments(
            self.values(steps, by_pass=False),
            steps=steps,
            max_steps=max_steps,
            epochs=epochs,
            warmup_ratio=WARMUP_RATIO,
            include_num_input_tokens_seen="no",  # they are known; counting would wait for a GPU
            ignore_data_skip=options.streaming,  # it finds its place by itself
        )

    @property
    def evaluates(self) -> bool:
        return self.held is not None

    def filled(self) -> dict[str, Any]:
        return {"data": absolute(self.sources), "max_length": self.max_length}

    # -- model -------------------------------------------------------------------------------------

    def load_model(self) -> None:
        import torch
        from transformers import set_seed

        import lorica

        options = self.options
        how: dict[str, Any] = {"dtype": torch.float32}
        if options.attn_implementation is not None:
            how["attn_implementation"] = options.attn_implementation
        set_seed(options.seed)  # whatever was drawn before, every method starts from these weights
        self.model = model_configs.build(self.config, options.model_config, **how)
        self.model.name_or_path = absolute(options.model_config, options.paths["model_config"])
        self.pad = self.model.config.pad_token_id
        model_configs.check_causal(self.model, options.model_config)
        self.parameters = count(self.model)
        assert self.recipe is not None
        self.adapters = lorica.attach(self.model, self.recipe, fresh=(), verbose=False)
        defaults = self.adapters.summary.defaults
        defaults.pop("learning_rate", None)  # of its parts some are for fine-tuning
        if self.options.learning_rate is None:
            defaults["learning_rate"] = {"value": self.learning_rate, "from": self.rate_from}

    def tell(self) -> None:
        say(str(self.adapters.summary))
        if self.options.streaming:
            logger.info(f"{self.source}, streamed; {self.tokens_per_step:,} tokens a step")
        else:
            logger.info(
                f"{self.text.documents:,} documents, {len(self.text.ids):,} tokens ->"
                f" {len(self.rows):,} rows of {self.max_length} ({self.rows.size:,} tokens);"
                f" {self.tokens_per_step:,} tokens a step"
            )
        vocabulary: Any = self.config.get_text_config()
        logger.info(
            f"tokenizer: {len(self.tokenizer):,} tokens of a vocabulary of"
            f" {vocabulary.vocab_size:,}; {self.parameters:,} parameters"
        )
        if self.held is not None:
            logger.info(f"evaluation: {len(self.held):,} rows, {self.held.size:,} tokens")

    # -- training ----------------------------------------------------------------------------------

    def keep(self) -> None:
        """A tokenizer that was trained is trained once."""
        from lorica.run.train_tokenizer import write

        if self.options.tokenizer is None:
            write(self.tokenizer, self.folder / "tokenizer")

    def trainer(self, log: Any) -> Any:
        from lorica.data.stream import Rows, collate
        from lorica.run.log import StreamPlace
        from lorica.run.token_weighting import TokenWeighted
        from lorica.run.trainer import TrainerMixin

        class Pretrainer(TrainerMixin, TokenWeighted):
            """The Trainer of this run."""

            perplexity = True

        log.tokens_per_step = self.tokens_per_step
        callbacks: list[Any] = [log]
        if self.options.streaming:
            callbacks.append(StreamPlace(self.streamed, self.rows_per_step))
            if self.checkpoint is not None:
                kept = self.before["StreamPlace"]["attributes"]
                self.streamed.resume(kept["place"], kept["consumed"])
        return Pretrainer(
            adapters=self.adapters,
            modules_learning_rate=self.options.modules_learning_rate,
            model=self.model,
            args=self.args,
            train_dataset=self.streamed if self.options.streaming else Rows(self.rows),
            eval_dataset=None if self.held is None else Rows(self.held),
            data_collator=collate,
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    def figures(self, trainer: Any, log: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            "task": "pretraining",
            "model_config": self.model.name_or_path,
            "parameters": self.parameters,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": pace(self.folder.lines()),
            "gradient_bytes": sum(
                t.parameter.numel() * t.parameter.element_size() for t in self.adapters.trained()
            ),
            "optimizer_bytes": state_bytes(trainer.optimizer),
            "schedule_bytes": self.adapters.summary.memory.get("schedules", 0),
            "model": {
                "class": type(self.model).__name__,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "initial_sha256": self.adapters.hash_base(),
            },
            "tokenizer": {"name": self.options.tokenizer, "tokens": len(self.tokenizer)},
            "data": {
                "name": ", ".join(absolute(self.sources)),
                "sha256": self.facts.get("data_sha256"),  # of a stream there is none
                "streaming": self.options.streaming,
                "max_length": self.max_length,
            },
        }
        if not self.options.streaming:
            found["data"] |= {
                "documents": self.text.documents,
                "tokens": len(self.text.ids),
                "rows": len(self.rows),
            }
        if self.held is not None:
            found["eval_data"] = {
                "sha256": self.facts["eval_data_sha256"],
                "rows": len(self.held),
                "tokens": int(self.held.size),
            }
        return found

    def save(self) -> Path:
        """`model/`: an ordinary model of transformers, with its tokenizer."""
        from lorica import formats
        from lorica.formats.native import check_values, full_state

        check_values(self.adapters, full_state(self.adapters))
        out = self.folder / "model"
        config: Any = self.model.config
        config.use_cache, config.pad_token_id = True, self.pad  # as before the Trainer set them
        formats.merge_to(self.adapters, out, tokenizer=self.tokenizer, overwrite=True)
        return out


def settled(
    shape: model_configs.Plan, options: PretrainOptions, tokenizer: Any
) -> PretrainedConfig:
    """The shape's configuration with the vocabulary and the marks of the tokenizer.

    Args:
        tokenizer: given, or trained; None: there is none yet.

    Raises:
        UsageError: the vocabulary is too small for it.
    """
    text: Any = shape.config.get_text_config()
    size = 0 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    fixed = shape.fixed or tokenizer is None
    given = options.vocab_size if fixed or options.tokenizer is not None else None
    text.vocab_size = given or (shape.vocabulary if fixed else size)
    if text.vocab_size < size:
        what = (
            f"`--vocab-size {given}`"
            if given
            else f"the vocabulary of `--model-config {options.model_config}`, {text.vocab_size:,},"
        )
        raise UsageError(
            f"{what} is too small for the tokenizer `{options.tokenizer}`, which has {size:,}"
            f" tokens; type `--vocab-size {size}`"
        )
    if tokenizer is not None:
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, end
        # An embedding that pads never trains, so the end of text must not be it.
        text.pad_token_id = None if pad == end else pad
    return shape.config


def hash_ids(rows: Any) -> str:
    """SHA-256 of rows of ids and their shape."""
    import numpy as np

    digest = hashlib.sha256(f"{rows.shape}".encode())
    digest.update(np.ascontiguousarray(rows, dtype="<i4").tobytes())
    return digest.hexdigest()


def pace(lines: list[dict[str, Any]]) -> float | None:
    """Tokens a second over a run's log: of training alone, whatever the evaluations took.

    Example:
        >>> pace([{"tokens": 100, "tokens_per_second": 50.0},
        ...       {"eval_loss": 1.0}, {"tokens": 200, "tokens_per_second": 100.0}])
        66.7
    """
    seconds = last = 0.0
    for line in lines:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - last) / line["tokens_per_second"]
            last = line["tokens"]
    return round(last / seconds, 1) if seconds else None


def state_bytes(optimizer: Any) -> int | None:
    """What an optimizer keeps of its parameters; None: it has taken no step."""
    if optimizer is None:
        return None
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import Tensor

    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    tensors = [v for state in inner.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor) and t.ndim)
