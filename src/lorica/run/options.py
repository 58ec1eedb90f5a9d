"""What a training run can be told, as typed options.

The command line, the YAML file and the run itself share this one list. Importing it costs nothing:
neither torch nor transformers is needed to read options, so `--help` and a misspelt flag answer at
once.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import tyro

from lorica.embedded.source import is_embedded
from lorica.text import cut

SHAPES = (
    "llama-1m", "llama-4m", "llama-9m", "llama-20m", "llama-60m", "llama-130m", "llama-250m",
    "llama-350m", "llama-1b",
)  # fmt: skip
TASKS = ("causal-lm", "sequence-classification", "token-classification", "seq2seq-lm")


O = TypeVar("O", bound="RunOptions")  # noqa: E741


class UsageError(ValueError):
    """What was typed cannot be run as it stands: exit status 2, where any other error is 1.

    Args:
        message: for a person, so what it quotes at length is cut.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(str(message)))


def nearest(name: str, known: Iterable[str], *, flag: bool = False) -> str:
    """` Did you mean `x`?` for the closest known name, or an empty string."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.6)
    if not found:
        return ""
    return f" Did you mean `{'--' + found[0].replace('_', '-') if flag else found[0]}`?"


# -- kinds of options ------------------------------------------------------------------------------


class Kind(tyro.constructors.PrimitiveConstructorSpec):
    """How the text of an option becomes its value; flags and YAML values go the same way.

    Args:
        metavar: stands for the value in `--help`.
        read: the words after the flag -> value; raises ValueError with what is wanted.
        nargs: how many words; `*` for any number.
        mapping: how a YAML mapping becomes the value; None: it cannot be one.
    """

    def __init__(
        self,
        metavar: str,
        read: Callable[[Sequence[str]], Any],
        *,
        nargs: Any = 1,
        mapping: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__(
            nargs=nargs,
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: True,
            str_from_instance=shown,
        )
        object.__setattr__(self, "mapping", mapping)

    def from_yaml(self, value: Any) -> Any:
        """The value of a YAML node; `null` leaves the option unset."""
        if value is None:
            return None
        if isinstance(value, Mapping):
            mapping: Any = vars(self)["mapping"]
            if mapping is None:
                raise ValueError(f"{self.metavar} is wanted, not a mapping")
            return mapping(value)
        if isinstance(value, bool):
            if self.nargs != (0, 1):
                raise ValueError(f"{self.metavar} is wanted, not {str(value).lower()}")
            return self.instance_from_str([]) if value else None
        if isinstance(value, list) and self.nargs != "*":
            raise ValueError(f"one {self.metavar} is wanted, not a list")
        return self.instance_from_str([str(v) for v in (value if type(value) is list else [value])])


class Unsaid(str):
    """A text that nobody typed: a default's, or a file's."""


class _Where(Kind):
    """Text that is known for `Unsaid` where a file says it."""

    def from_yaml(self, value: Any) -> Any:
        read = super().from_yaml(value)
        return None if read is None else Unsaid(read)


def shown(value: Any) -> list[str]:
    """A value as it would be typed; `-` for what is unset."""
    if value is None or value == () or value == {}:
        return ["-"]
    if isinstance(value, (tuple, list)):
        return [str(v) for v in value]
    return [json.dumps(value) if isinstance(value, Mapping) else str(value)]


def _told(text: str, width: int = 120) -> str:
    """What was given, as a message shows it."""
    return repr(text) if len(text) <= width else repr(text[: width - 3]) + "..."


def _whole(words: Sequence[str]) -> int:
    try:
        return int(words[0])
    except ValueError:
        raise ValueError(f"a whole number is wanted, e.g. 8, not {_told(words[0])}") from None


def _number(words: Sequence[str]) -> float:
    try:
        return float(words[0])
    except ValueError:
        raise ValueError(f"a number is wanted, e.g. 1e-4, not {_told(words[0])}") from None


def _names(words: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for word in words for name in word.split(","))
    if not names or "" in names:
        raise ValueError("one or more names are wanted, e.g. `q_proj v_proj`")
    return names


def _modules(words: Sequence[str]) -> str | tuple[str, ...]:
    if len(words) == 1 and (words[0] == "all-linear" or re.search(r"[*+?()\[\]{}|^$\\]", words[0])):
        return words[0]
    return _names(words)


def _wholes(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(_whole([name]) for name in _names(words))


def _json(words: Sequence[str]) -> dict[str, Any]:
    wanted = """a JSON mapping is wanted, e.g. '{"q_proj": 8}', not """
    try:
        value = json.loads(words[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"{wanted}{_told(words[0])} ({error})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        raise ValueError(f"{wanted}{_told(words[0])}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{wanted}{_told(words[0])}")
    return value


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = [name.partition("=") for name in _names(words)]
    if bad := ["".join(pair) for pair in pairs if not all(pair)]:
        raise ValueError(f"pairs name=column are wanted, e.g. `text=sentence`, not {_told(bad[0])}")
    return {name: value for name, _, value in pairs}


def method_text(mapping: Mapping[str, Any]) -> str:
    """The text form of a YAML mapping {word: {argument: value}}.

    Example:
        >>> method_text({"dora": None, "pissa": {"niter": 16}})
        'dora+pissa(niter=16)'
    """
    parts = []
    for word, arguments in mapping.items():
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(
                f"{_told(str(word))} takes a mapping of its arguments, not {_told(str(arguments))}"
            )
        inside = ", ".join(f"{name}={value!r}" for name, value in (arguments or {}).items())
        parts.append(f"{word}({inside})" if inside else str(word))
    return "+".join(parts)


def choice(*allowed: str) -> Kind:
    """One word out of `allowed`."""

    def read(words: Sequence[str]) -> str:
        if words[0] not in allowed:
            hint = nearest(words[0], allowed)
            raise ValueError(f"{_told(words[0])} is none of {', '.join(allowed)}.{hint}")
        return words[0]

    return Kind("{" + ",".join(allowed) + "}", read)


def _first(words: Sequence[str]) -> str:
    return words[0]


def _paths(words: Sequence[str]) -> tuple[str, ...]:
    if not words or "" in words:
        raise ValueError("one or more files, folders or hub ids are wanted")
    return tuple(words)


TEXT = Kind("TEXT", _first)
PATH = Kind("PATH", _first)
FOLDER = _Where("PATH", _first)
PATHS = Kind("PATH ...", _paths, nargs="*")
METHOD = Kind("METHOD", _first, mapping=method_text)
WHOLE = Kind("INT", _whole)
NUMBER = Kind("FLOAT", _number)
NAMES = Kind("NAME ...", _names, nargs="*")
MODULES = Kind("NAMES|REGEX|all-linear", _modules, nargs="*")
WHOLES = Kind("INT ...", _wholes, nargs="*")
JSON = Kind("JSON", _json, mapping=dict)
PAIRS = Kind("NAME=COLUMN ...", _pairs, nargs="*", mapping=dict)
RESUME = Kind("[PATH]", lambda words: words[0] if words else "last", nargs=(0, 1))
DTYPE = choice("auto", "float32", "bfloat16", "float16")

_hint: Any = lambda text: "" if text == "-" else f"(default: {text})"  # noqa: E731
HINT = tyro.conf.arg(help_behavior_hint=_hint)


def kinds(options: type) -> dict[str, Kind | None]:
    """{field: its kind} of a class of options; None: a switch."""
    hints = get_type_hints(options, include_extras=True)
    found: dict[str, Kind | None] = {}
    for f in dataclasses.fields(options):
        marks = getattr(hints[f.name], "__metadata__", ())
        own = [m for m in marks if isinstance(m, Kind)]
        if own or f.type == "bool":
            found[f.name] = own[0] if own else None
    return found


# -- the options ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunOptions(abc.ABC):
    """What every training run can be told.

    Every further field of transformers' TrainingArguments is an option under its own name, e.g.
    `--weight-decay 0.01`, `--save-steps 50`, `--optim adamw_torch`.

    Args:
        method: words joined by `+`, e.g. `dora+olora`, `pissa(niter=16)`; `full` trains every
            weight. `lorica methods` lists them.
        r: rank of what trains. Default: the method's own, else 16.
        lora_alpha: numerator of the scale. Default: the method's own.
        lora_dropout: probability that an input feature of the update is dropped.
        lora_dropout_on: `update` (carried factors too) or `delta` (the trained ones alone, PEFT's
            form).
        target_modules: names (ends of module paths), one regular expression, or `all-linear`:
            every linear layer but the head.
        exclude_modules: in the same forms, what to leave out.
        layers_to_transform: indices of the blocks to adapt. Default: all.
        rank_pattern: {module pattern: r}, over `r`.
        alpha_pattern: {module pattern: lora_alpha}, over `lora_alpha`.
        learning_rate: peak rate. Default: the method's own.
        modules_learning_rate: peak rate of the modules that train in full beside the targets: those
            to save, a new head; in pre-training embeddings, norms and head. Default: the same.
        lr_scheduler_type: transformers' name of the schedule.
        warmup_ratio: fraction of the steps in which the rate rises from 0.
        max_steps: optimizer steps, instead of passes.
        per_device_train_batch_size: rows a device and forward pass.
        gradient_accumulation_steps: forward passes an optimizer step. The loss weighs tokens (or
            labels) alike, however they fall into passes.
        seed: of every random draw: the start, the order of the data, dropout.
        bf16: compute in bfloat16 (autocast); what trains stays in float32.
        gradient_checkpointing: recompute activations in backward, for memory.
        attn_implementation: transformers' name, e.g. `sdpa`, `eager`. Default: transformers'.
        output_dir: the run's folder.
        resume: go on from a checkpoint: a path, or without one the last of `output_dir`. Options
            left out come from that run's config.yaml, and it goes on where the checkpoint lies.
        overwrite_output_dir: remove the run that is in `output_dir`.
        report_to: where else to log: `tensorboard`, `wandb`, ..., or `none`.
        split: split of the data to train on. Default: train, else everything.
        columns: what the data calls the columns, e.g. `text=sentence`.
    """

    method: Annotated[str | None, METHOD, HINT] = None
    r: Annotated[int | None, WHOLE, HINT] = None
    lora_alpha: Annotated[float | None, NUMBER, HINT] = None
    lora_dropout: Annotated[float | None, NUMBER, HINT] = None
    lora_dropout_on: Annotated[str | None, choice("update", "delta"), HINT] = None
    target_modules: Annotated[str | tuple[str, ...] | None, MODULES, HINT] = None
    exclude_modules: Annotated[str | tuple[str, ...] | None, MODULES, HINT] = None
    layers_to_transform: Annotated[tuple[int, ...] | None, WHOLES, HINT] = None
    rank_pattern: Annotated[dict[str, int] | None, JSON, HINT] = None
    alpha_pattern: Annotated[dict[str, float] | None, JSON, HINT] = None
    learning_rate: Annotated[float | None, NUMBER, HINT] = None
    modules_learning_rate: Annotated[float | None, NUMBER, HINT] = None
    lr_scheduler_type: Annotated[str, TEXT, HINT] = "cosine"
    warmup_ratio: Annotated[float | None, NUMBER, HINT] = None
    num_train_epochs: Annotated[float | None, NUMBER, HINT] = None
    max_steps: Annotated[int | None, WHOLE, HINT] = None
    per_device_train_batch_size: Annotated[int, WHOLE, HINT] = 8
    gradient_accumulation_steps: Annotated[int, WHOLE, HINT] = 1
    seed: Annotated[int, WHOLE, HINT] = 42
    bf16: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: Annotated[str | None, TEXT, HINT] = None
    output_dir: Annotated[str, FOLDER, HINT] = Unsaid("lorica-run")
    resume: Annotated[
        str | None,
        RESUME,
        tyro.conf.arg(help_behavior_hint=_hint, aliases=("--resume-from-checkpoint",)),
    ] = None
    overwrite_output_dir: bool = False
    report_to: Annotated[tuple[str, ...], NAMES, HINT] = ("none",)
    split: Annotated[str | None, TEXT, HINT] = None
    eval_fraction: Annotated[float | None, NUMBER, HINT] = None
    max_length: Annotated[int | None, WHOLE, HINT] = None
    columns: Annotated[dict[str, str] | None, PAIRS, HINT] = None
    further: Annotated[dict[str, Any], tyro.conf.SuppressFixed] = field(default_factory=dict)

    aliases: ClassVar[Mapping[str, str]] = {"resume_from_checkpoint": "resume"}
    # Options that may name files, which config.yaml has from the root on; words that name none.
    paths: ClassVar[Mapping[str, Collection[str]]]
    recipe_names: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "lora_dropout", "lora_dropout_on", "target_modules",
        "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    )  # fmt: skip
    counts: ClassVar[tuple[str, ...]] = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "max_length",
    )  # fmt: skip

    def __post_init__(self) -> None:
        # `null` leaves an option unset, transformers' as well as ours.
        given = {name: value for name, value in self.further.items() if value is not None}
        object.__setattr__(self, "further", given)

    def placed(self: O) -> O:
        """The same with the folder that is meant: a checkpoint that is named goes on where it lies,
        unless a folder was typed."""
        folder = str(self.output_dir)
        if isinstance(self.output_dir, Unsaid) and self.resume not in (None, "last"):
            folder = str(checkpoint_path(self.resume).parent)
        return dataclasses.replace(self, output_dir=folder)

    def recipe_fields(self) -> dict[str, Any]:
        """The fields of `Recipe` that were given."""
        given = {name: getattr(self, name) for name in self.recipe_names}
        return {name: value for name, value in given.items() if value is not None}

    @abc.abstractmethod
    def brings_evaluation(self) -> bool:
        """Whether there is something to evaluate on."""

    def check_run(self) -> None:
        """What can be told from these options alone.

        Raises:
            UsageError: a value out of range, or options that contradict each other.
        """
        for name in self.counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{_flag(name)} {value}`: it is a whole number of at least 1")
            most = MOST_TOKENS if name.endswith("_tokens") else MOST
            if value is not None and value > most:
                raise UsageError(f"`{_flag(name)} {value}`: it is {most:,} at most")
        for name in ("learning_rate", "modules_learning_rate", "num_train_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"`{_flag(name)} {value}`: it is a number above 0")
        if self.num_train_epochs is not None and self.num_train_epochs > MOST:
            raise UsageError(
                f"`--num-train-epochs {self.num_train_epochs:g}`: a run has {MOST:,} passes at most"
            )
        for name in ("output_dir", "resume", *self.paths):
            value = getattr(self, name)
            if value == "" or (isinstance(value, tuple) and "" in value):
                raise UsageError(f"`{_flag(name)} ''`: a path is wanted; leave it out for none")
        self._check_further()
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise UsageError(
                f"`--warmup-ratio {self.warmup_ratio}`: it is a fraction of the steps, at least 0"
                " and below 1; a number of steps is `--warmup-steps`"
            )
        if self.seed < 0 or self.seed >= 2**32:
            raise UsageError(f"`--seed {self.seed}`: it is a whole number from 0 to 4294967295")
        self.contradict("max_steps", "num_train_epochs", "the length of a run is given once")
        self.contradict("eval_data", "eval_fraction", "evaluation rows come from one place")
        if self.resume is not None and self.overwrite_output_dir:
            raise UsageError(
                "`--resume` and `--overwrite-output-dir` contradict each other: leave one of the"
                " two out"
            )
        if self.warmup_ratio is not None and "warmup_steps" in self.further:
            raise UsageError(
                "`--warmup-ratio` and `--warmup-steps` say the same thing; leave one of the two out"
            )

    def _check_further(self) -> None:
        """Values that transformers would take, and stumble over in the midst of the run."""
        for name, value in self.further.items():
            typed = f"{value:g}" if isinstance(value, float) else value
            told = f"`{_flag(name)} {typed}`"
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{told}: a finite number is wanted")
            counts = isinstance(value, (int, float)) and not isinstance(value, bool)
            if counts and name in _AT_LEAST and value < _AT_LEAST[name]:
                least = _AT_LEAST[name]
                raise UsageError(f"{told}: it is a whole number of at least {least}")
            if counts and name in _AT_LEAST and value > MOST:
                raise UsageError(f"{told}: it is {MOST:,} at most")
            if counts and name in ("save_steps", "eval_steps", "logging_steps") and value <= 0:
                never = name.replace("steps", "strategy")
                raise UsageError(
                    f"{told}: it is a number of steps above 0, or a fraction of them; to have none"
                    f" type `{_flag(never)} no`"
                )
            if name in _FILES and isinstance(value, str) and not value.lstrip().startswith("{"):
                if not Path(value).expanduser().is_file():
                    raise UsageError(f"{told}: there is no such file; name one of JSON")
        if self.further.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            raise UsageError(
                f"`--deepspeed {self.further['deepspeed']}`: the package deepspeed is not"
                " installed; install it, or leave the option out"
            )

    def refuse_late(self, remedy: str, **more: bool) -> None:
        """Options that speak of evaluations, where there is nothing to evaluate on."""
        if self.brings_evaluation():
            return
        late = more | {name: name in self.further for name in _NEEDS_EVALUATION}
        for name in [name for name, given in late.items() if given]:
            raise UsageError(
                f"`{_flag(name)}` needs something to evaluate on: give {remedy} too, or leave it"
                " out"
            )

    def contradict(self, one: str, other: str, why: str) -> None:
        """Raises where both were given."""
        a, b = getattr(self, one), getattr(self, other)
        if a is not None and b is not None:
            raise UsageError(
                f"`{_flag(one)} {a}` and `{_flag(other)} {b}` were both given, and {why}; leave"
                " one of the two out"
            )


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """First in `--help`."""

    model: Annotated[str | None, PATH, HINT] = None
    data: Annotated[str | None, PATH, HINT] = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions, _Tuned):
    """Fine-tune a model on a data set through an update of the method's form.

    A YAML file of the same names (underscores) may stand first; flags override it. Every further
    field of transformers' TrainingArguments is an option under its own name, e.g. `--weight-decay
    0.01`, `--save-steps 50`, `--optim adamw_torch`.

    Args:
        model: folder or hub id of a transformers model. Default: the one that the adapter names,
            else the embedded one.
        data: file, folder or hub id; its columns decide what it is. Embedded tasks are
            `lorica:new`, `lorica:old` and `lorica:new+old`. Default: `lorica:new`.
        method: words joined by `+`, e.g. `dora+olora`, `pissa(niter=16)`; `full` trains every
            weight. `lorica methods` lists them. Default: lora.
        modules_to_save: modules that train in full and are saved with the adapter. A fresh head is
            added by itself.
        bias: `none`, `lora_only` (biases of adapted layers train) or `all`.
        adapter: start from this adapter (Lorica's or PEFT's) and its method.
        ignore_base_hash: with `adapter`, take another base than it was trained on.
        num_train_epochs: passes over the data. Default: 3, unless `max_steps` is given.
        per_device_train_batch_size: examples a device and forward pass.
        dtype: of the frozen weights. `auto` keeps the checkpoint's, but float16 becomes float32 on
            a CPU, which computes it badly (the values stay exactly what they were).
        eval_data: file, folder or hub id to evaluate on.
        eval_split: its split, or without `eval_data` that of `data`.
        eval_fraction: hold out this fraction of the rows of `data`.
        max_samples: train on at most so many rows.
        max_length: tokens a row. Default: 1024, or less where the model ends before.
        header: names of the columns of a csv or tsv file without a header line; `_` drops one.
        task: what is learnt: causal-lm, sequence-classification, token-classification or
            seq2seq-lm. Default: from the data's columns.
        packing: `none`, `best_fit` (several whole examples a row) or `wrapped` (running text cut so
            that rows are full). Examples of a row never see each other.
        chat_template: `plain`, `chatml`, a file, Jinja text, or `none`. Default: the tokenizer's.
        train_on: `completion` (answers), `all`, or roles, e.g. `assistant`.
        early_stopping_patience: stop after so many evaluations without a better one.
    """

    modules_to_save: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    bias: Annotated[str | None, choice("none", "lora_only", "all"), HINT] = None
    adapter: Annotated[str | None, PATH, HINT] = None
    ignore_base_hash: bool = False
    dtype: Annotated[str, DTYPE, HINT] = "auto"
    eval_data: Annotated[str | None, PATH, HINT] = None
    eval_split: Annotated[str | None, TEXT, HINT] = None
    max_samples: Annotated[int | None, WHOLE, HINT] = None
    header: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    task: Annotated[str | None, choice(*TASKS), HINT] = None
    packing: Annotated[str, choice("none", "best_fit", "wrapped"), HINT] = "none"
    chat_template: Annotated[str | None, TEXT, HINT] = None
    train_on: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    early_stopping_patience: Annotated[int | None, WHOLE, HINT] = None

    paths: ClassVar[Mapping[str, Collection[str]]] = dict.fromkeys(
        ("model", "data", "eval_data", "adapter"), ()
    )
    recipe_names: ClassVar[tuple[str, ...]] = (
        *RunOptions.recipe_names, "modules_to_save", "bias",
    )  # fmt: skip
    counts: ClassVar[tuple[str, ...]] = (
        *RunOptions.counts, "max_samples", "early_stopping_patience",
    )  # fmt: skip

    def brings_evaluation(self) -> bool:
        """Whether there are evaluation rows; the embedded data brings its own."""
        sources = (self.eval_data, self.eval_split, self.eval_fraction)
        brings = self.data is None or is_embedded(self.data)
        return brings or any(source is not None for source in sources)

    def check(self) -> None:
        """What can be told from the options alone.

        Raises:
            UsageError: a value out of range, or options that contradict each other.
        """
        self.check_run()
        self.contradict("eval_split", "eval_fraction", "evaluation rows come from one place")
        fresh = self.resume is None  # else the run's own config.yaml tells what was changed
        if fresh and self.adapter is not None and (self.method is not None or self.recipe_fields()):
            given = (["method"] if self.method is not None else []) + list(self.recipe_fields())
            raise UsageError(
                f"`{_flag(given[0])}` was given with `--adapter {self.adapter}`, whose own file"
                " says how it was made; leave it out"
            )
        if self.ignore_base_hash and self.adapter is None:
            raise UsageError("`--ignore-base-hash` has no effect without `--adapter`; leave it out")
        self.refuse_late(
            "`--eval-data`, `--eval-split` or `--eval-fraction`",
            early_stopping_patience=self.early_stopping_patience is not None,
        )


@dataclass(frozen=True, kw_only=True)
class _Scratch:
    """First in `--help`."""

    model_config: Annotated[str, TEXT, HINT] = "llama-1m"
    data: Annotated[tuple[str, ...] | None, PATHS, HINT] = None
    eval_data: Annotated[tuple[str, ...] | None, PATHS, HINT] = None
    tokenizer: Annotated[str | None, PATH, HINT] = None
    vocab_size: Annotated[int | None, WHOLE, HINT] = None


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions, _Scratch):
    """Train a causal language model from random weights on running text.

    Documents are joined by the end-of-text token and cut into full rows; a row is attended to
    causally as a whole, over the documents' seams, as in the papers. Everything trains: what the
    method has no update for (embeddings, norms, head, biases) in place. The result is an ordinary
    transformers model in `model/`. A YAML file of the same names (underscores) may stand first;
    flags override it.

    Args:
        model_config: a shape (llama-1m, -4m, -9m, -20m, -60m, -130m, -250m, -350m, -1b), or a
            config.json of any causal language model of transformers, its folder or hub id.
        data: files, folders or hub ids of text, in this order: .txt, or a column `text`. Default:
            the embedded tasks as text.
        eval_data: the same, to evaluate on.
        tokenizer: folder or hub id of one. Default: a byte-level BPE trained on the data, saved
            with the run.
        vocab_size: of the tokenizer that is trained, or with `tokenizer` of the model. Default: the
            shape's.
        method: words joined by `+`, e.g. `relora(every=1000)`, `lora`; `lorica methods` lists them.
            Default: full, ordinary training.
        r: rank of what trains. Default: a quarter of the model's width, as in the papers.
        learning_rate: peak rate. Default: the rule's or the schedule's own, else 1e-3.
        lr_scheduler_type: transformers' name of the schedule; cosine goes down to 0.
        warmup_ratio: fraction of the steps in which the rate rises from 0. Default: 0.05.
        num_train_epochs: passes over the data. Default: 1, unless `max_steps` or `max_tokens` is
            given.
        max_tokens: train on so many tokens (rounded up to a whole step), instead of passes.
        eval_split: split of `eval_data` to evaluate on, or without it that of `data`.
        eval_fraction: hold out this fraction of the rows, the same for every method.
        max_eval_tokens: evaluate on so many tokens (whole rows), from the start. Default: all.
        max_length: tokens a row. Default: 256, or less where the model ends before.
        documents: what a document of a .txt file is: `file`, `paragraph` (between blank lines) or
            `line`. Default: file.
        streaming: read `data`, one hub id or folder, as the run goes on, never as a whole; the
            tokenizer is trained on its beginning.
        dry_run: print what would train, the counts and the bytes, and stop.
    """

    max_tokens: Annotated[int | None, WHOLE, HINT] = None
    eval_split: Annotated[str | None, TEXT, HINT] = None
    max_eval_tokens: Annotated[int | None, WHOLE, HINT] = None
    documents: Annotated[str | None, choice("file", "paragraph", "line"), HINT] = None
    streaming: bool = False
    dry_run: bool = False

    paths: ClassVar[Mapping[str, Collection[str]]] = {
        "model_config": SHAPES, "data": (), "eval_data": (), "tokenizer": (),
    }  # fmt: skip
    counts: ClassVar[tuple[str, ...]] = (
        *RunOptions.counts, "max_tokens", "max_eval_tokens", "vocab_size",
    )  # fmt: skip

    def brings_evaluation(self) -> bool:
        """Whether there is text to evaluate on; the embedded data brings its own."""
        sources = (self.eval_data, self.eval_split, self.eval_fraction)
        brings = all(map(is_embedded, self.data or ()))
        return brings or any(source is not None for source in sources)

    def check(self) -> None:
        """What can be told from the options alone.

        Raises:
            UsageError: a value out of range, or options that contradict each other.
        """
        self.check_run()
        self.contradict("max_tokens", "max_steps", "the length of a run is given once")
        self.contradict("max_tokens", "num_train_epochs", "the length of a run is given once")
        self.contradict("eval_split", "eval_fraction", "evaluation rows come from one place")
        self.refuse_late(
            "`--eval-data`, `--eval-split` or `--eval-fraction`",
            max_eval_tokens=self.max_eval_tokens is not None,
        )
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        if self.data is None or len(self.data) != 1:
            raise UsageError(
                "`--streaming` reads one source: name one hub id or folder in `--data`"
            )
        if self.max_steps is None and self.max_tokens is None:
            raise UsageError(
                "`--streaming` has no end that is known beforehand: give `--max-steps` or"
                " `--max-tokens`"
            )
        if self.further.get("dataloader_num_workers"):
            raise UsageError(
                "`--dataloader-num-workers` has no effect with `--streaming`, which one process"
                " reads in order; leave it out"
            )
        if self.eval_split is not None and self.eval_data is None and self.max_eval_tokens is None:
            raise UsageError(
                "`--eval-split` of streamed data is read once at the start, and nobody knows how"
                " long it is: give `--max-eval-tokens` too"
            )
        for name in ("eval_fraction", "documents"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"`{_flag(name)}` has no effect with `--streaming`, which never sees all of the"
                    " data; leave it out"
                    + (
                        "; evaluation text comes from `--eval-data` or `--eval-split`"
                        if name[0] == "e"
                        else ""
                    )
                )


MOST = 10**9  # steps, passes, rows: whoever types more has slipped
MOST_TOKENS = 10**15
_AT_LEAST = {
    "per_device_eval_batch_size": 1, "eval_accumulation_steps": 1, "torch_empty_cache_steps": 1,
    "dataloader_num_workers": 0,
}  # fmt: skip
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
_NEEDS_EVALUATION = (
    "eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size",
)  # fmt: skip


def checkpoint_path(resume: str | None) -> Path:
    """The folder that `--resume PATH` names, with its name even from within."""
    path = Path(resume or "").expanduser()
    return path.resolve() if path.name in ("", "..") else path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def masking(chat_template: str | None, train_on: tuple[str, ...] | None) -> dict[str, Any]:
    """The arguments of `lorica.data.prepare` that these two options mean; left out, none.

    Example:
        >>> masking(None, ("completion",))
        {'train_on': 'completion'}
    """
    how: dict[str, Any] = {}
    if chat_template is not None:
        how["chat_template"] = chat_template
    if train_on is not None:
        plain = len(train_on) == 1 and train_on[0] in ("completion", "all")
        how["train_on"] = train_on[0] if plain else frozenset(train_on)
    return how
