"""Models and tokenizers of transformers, loaded for a task, with errors that fit one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorica.run.new_tokens import fit_adapter
from lorica.text import clear_errors, parse_json, refusal, to_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorica.data import Labels
    from lorica.model.adapters import Adapters

# task -> (transformers' auto class, ending of the class names of that task)
AUTO = {
    "causal-lm": ("AutoModelForCausalLM", "ForCausalLM"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
    "sequence-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "token-classification": ("AutoModelForTokenClassification", "ForTokenClassification"),
}


class FromCheckpoint(NamedTuple):
    """A loaded model.

    Attributes:
        missing_keys: names of parameters and buffers that the checkpoint had no values for.
    """

    model: PreTrainedModel
    missing_keys: frozenset[str]

    def drawn(self, adapters: Adapters | None) -> list[str]:
        """Modules with parameters that neither the checkpoint nor the adapters attached since have
        values for: they hold random draws."""
        named = self.model.named_parameters(remove_duplicate=False)
        have = adapters.base_parameters() if adapters is not None else dict(named)
        owners = (key.rpartition(".")[0] for key in sorted(self.missing_keys & set(have)))
        return [*dict.fromkeys(owners)]


@clear_errors()
def base_name(model: str | None, adapter: str | Path | None = None) -> str:
    """The base that is meant: the one named, else the adapter's own, else the embedded one.

    Raises:
        UsageError: the adapter is a whole model, or doesn't name its base.
    """
    from lorica.embedded import base_path, located
    from lorica.run.options import UsageError

    if model is not None:
        return located(model)
    if adapter is None:
        return str(base_path())
    from lorica import formats

    told = formats.inspect(adapter)
    if told["type"] == "model":
        raise UsageError(
            f"`--adapter {adapter}` is a whole model (`{told['method']}` trains the base itself);"
            f" type `--model {adapter}` instead"
        )
    name = told["base"].get("name")
    if not name:
        raise UsageError(f"`--adapter {adapter}` does not name its base; give it with `--model`")
    return located(name)


@clear_errors()
def read_config(
    name: str, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's configuration.

    Args:
        attn_implementation: what the user asked for in place of the configuration's own.
        trust_remote_code: run code that the model brings, or names.

    Raises:
        ValueError: there is no such folder, or no model in it, or no such model to be had; it asks
            for code that is not trusted.
    """
    from transformers import AutoConfig

    check_source(name)
    check_code(name, attn_implementation, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        classes = config.architectures or []
        if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise ValueError(f"`architectures` is {str(classes)[:80]}, not a list of class names")
    except Exception as error:  # transformers says what is wrong with a file in many ways
        raise ValueError(_cannot("a model", name, error)) from error
    return config


def check_code(name: str, attn_implementation: str | None, trusted: bool) -> None:
    """The configuration asks for no code that is not installed.

    Raises:
        ValueError: it does, and is not trusted; or it can't be read.
    """
    from lorica.formats.foreign_code import read_config_dict, refuse_code

    try:
        config = read_config_dict(name)
    except Exception as error:  # see `read_config`
        raise ValueError(_cannot("a model", name, error)) from error
    if trusted:
        return
    refuse_code(config, f"the config.json of `{name}`", attn_implementation=attn_implementation)


@clear_errors()
def check_source(name: str) -> None:
    """A name that can only mean a folder has to be one."""
    path = to_path(name)
    looks = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if (looks or path.exists()) and not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(
            f"the model `{name}` {what}: a model is a folder with a config.json, or a hub id such"
            " as `org/name`. Check the path (it is taken from the current folder)"
        )
    if not path.is_dir():
        return
    if not (path / "config.json").is_file():
        raise ValueError(
            f"the folder `{name}` holds no model: it has no config.json. Name the folder that"
            " `save_pretrained` wrote"
        )
    for file in path.iterdir():  # transformers passes over some of those that it may not read
        if file.suffix in (".json", ".safetensors", ".jinja") and file.is_file():
            file.open("rb").close()


@clear_errors()
def check_parts(name: str) -> None:
    """The index of a model in several files names files beside it, and nothing else.

    Raises:
        ValueError: a name that leads out of the folder, or no name.
    """
    from lorica.formats.safe_files import read_json
    from lorica.text import shorten

    index = Path(name).expanduser() / "model.safetensors.index.json"
    if not index.is_file():
        return
    parts = read_json(index).get("weight_map")
    bad = [p for p in parts.values() if not _beside(p)] if isinstance(parts, dict) else [parts]
    if bad:
        raise ValueError(
            f"{index}: `weight_map` names {shorten(bad[0])}, which is no file of this folder; the"
            " file was changed. Copy the folder again from where it came"
        )


def _beside(part: Any) -> bool:
    return isinstance(part, str) and part.endswith(".safetensors") and Path(part).name == part


def _cannot(what: str, name: str, error: Exception) -> str:
    if (refused := refusal(error)) is not None:
        return f"cannot load {what} from `{name}`: {refused}"
    reason = " ".join(re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", " ", str(error)).split())
    if not isinstance(error, (OSError, ValueError)) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if "trust_remote_code" in reason:
        reason = (
            "it brings Python code of its own, which is run only where you trust it and type"
            " `--trust-remote-code`"
        )
    reason = reason if len(reason) < 300 else reason[:297] + "..."
    return (
        f"cannot load {what} from `{name}`: {reason.rstrip('.')}. Copy it again from where it came,"
        " or name another"
    )


def empty_model(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules without any weights (on the meta device), from its configuration."""
    import torch
    import transformers

    config = read_config(name, trust_remote_code=trust_remote_code)
    made_for = (config.architectures or [""])[0]
    cls: Any = getattr(transformers, made_for, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        cls = None
    with torch.device("meta"):
        try:
            if cls is None:
                return transformers.AutoModel.from_config(
                    config, trust_remote_code=trust_remote_code
                )
            return cls(config)
        except Exception as error:
            raise ValueError(_cannot("the layers", name, error)) from error


@clear_errors()
def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; where it has no padding token, EOS pads (nothing looks at padding)."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(_cannot("a tokenizer", name, error)) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_labels(config: PretrainedConfig, task: str) -> Labels | None:
    """The classes that a checkpoint's head was trained for; None: it has no head of this task."""
    from lorica.data import Labels

    if not any(name.endswith(AUTO[task][1]) for name in config.architectures or []):
        return None
    if task not in ("sequence-classification", "token-classification"):
        return None
    count: Any = config.num_labels
    named: Any = config.label2id or {}
    if count == 1:
        return Labels()
    if not named or dict(named) == {f"LABEL_{i}": i for i in range(count)}:
        return Labels.from_num_labels(count)
    return Labels.from_label2id(named)


@clear_errors()
def load_model(
    name: str,
    task: str,
    *,
    labels: Labels | None,
    dtype: str,
    attn_implementation: str | None = None,
    widen: bool,
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> FromCheckpoint:
    """The model for a task, on the CPU.

    Args:
        labels: the classes of a classification; a head of that size is made where the checkpoint
            has none.
        dtype: `auto` keeps the checkpoint's.
        attn_implementation: transformers' name of it; None: the checkpoint's own.
        widen: make float32 of a checkpoint's float16 (exact: every float16 is a float32).
        trust_remote_code: run code that the model brings, or names.
        quantization: transformers' configuration of how to quantise the weights; None: they stay
            as the checkpoint has them.
    """
    import torch
    import transformers
    from transformers.utils import logging

    from lorica.model.quantised import quantised

    logging.disable_progress_bar()
    check_code(name, attn_implementation, trust_remote_code)
    check_parts(name)
    auto: Any = getattr(transformers, AUTO[task][0])
    more: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    more = more or {"dtype": "auto"}
    if attn_implementation is not None:
        more["attn_implementation"] = attn_implementation
    if quantization is not None:
        more["quantization_config"] = quantization
    if labels is not None:
        more |= {
            "id2label": labels.id2label,
            "label2id": labels.label2id,
            "problem_type": labels.problem_type,
        }
    loaded = _from_checkpoint(
        auto, f"a model for {task}", name, trust_remote_code=trust_remote_code, **more
    )
    model = loaded.model
    for path, store in quantised(model).items():
        if (flaw := store.flaw()) is not None:
            raise ValueError(
                f"`{name}` can't be used in {store.format} here: of {path!r}, {flaw}. Load it in"
                " int8 (`--load-in-8bit`), or unquantised"
            )
    if dtype == "auto" and widen:
        packed = {id(store.parameter) for store in quantised(model).values()}
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype is torch.float16 and id(tensor) not in packed:
                tensor.data = tensor.data.float()
        model.config.dtype = model.dtype
    return loaded


def _from_checkpoint(kind: Any, what: str, name: str, **more: Any) -> FromCheckpoint:
    """What a class of transformers makes of a checkpoint.

    Args:
        what: it is, for the message.
    """
    try:
        model, told = kind.from_pretrained(name, output_loading_info=True, **more)
    except Exception as error:
        raise ValueError(_cannot(what, name, error)) from error
    check_finite(model, name)
    return FromCheckpoint(model, frozenset(told["missing_keys"]))


def check_finite(model: PreTrainedModel, name: str) -> None:
    """The weights are numbers, so that the model's answers can be, too.

    Raises:
        ValueError: naming the first that holds another value.
    """
    from lorica.model.quantised import quantised
    from lorica.tensors.linalg import loaded_finite

    packed = quantised(model)
    ids = {id(store.parameter) for store in packed.values()}
    held: dict[str, Any] = {n: p for n, p in model.named_parameters() if id(p) not in ids}
    for path, store in packed.items():
        held |= {f"{path}.{n}": t for n, t in store.stored().items()}
    bad = [n for n, p in held.items() if not loaded_finite(p)]
    if bad:
        more = f" and {len(bad) - 1} more weights" if len(bad) > 1 else ""
        raise ValueError(
            f"`{name}` holds values that are not finite, in {bad[0]}{more}: the training that made"
            " it had diverged, or a file was changed. Use an earlier checkpoint, or copy it again"
            " from where it came"
        )


def set_padding(model: Any, task: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Tell a classifier of sequences what its batches are padded with: a decoder's looks for the
    last token before the padding, and takes no batch of several rows without."""
    from lorica.data.tokenise import pad_of

    config = model.config.get_text_config()
    asks = task == "sequence-classification" and getattr(config, "pad_token_id", None) is None
    if asks and tokenizer is not None:
        config.pad_token_id = pad_of(tokenizer)


@clear_errors()
def load_base(
    adapter: str, name: str | None, *, trust_remote_code: bool = False, quantization: Any = None
) -> tuple[PreTrainedModel, Any]:
    """The model that an adapter's folder belongs on, in its checkpoint's dtype, and a tokenizer, or
    the processor of a model that reads more than text (None where neither folder has one).

    A model for a task that no verb here trains (images, speech) is loaded by the name of its class.

    Args:
        name: the base; None: the one that the adapter names.
        trust_remote_code: run code that the base brings, or names.
        quantization: transformers' configuration of how to quantise it; None: it stays as it is.
    """
    from lorica.formats.safe_files import locate

    own = locate(adapter)
    name, told, config = find_base(adapter, name, trust_remote_code=trust_remote_code)
    task = _task(told, config)
    if task is None:
        return _by_class(own, name, _class_of(told, config), quantization)
    classes = _head_size(own, task)
    labels = own_labels(config, task)
    if labels is None and classes is not None:
        labels = _labels(own, classes)
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    model = load_model(
        name, task, labels=labels, dtype="auto", widen=False, quantization=quantization, **how
    ).model
    fit_adapter(model, own)
    tokenizer = None
    for folder in (own, Path(name)):
        if not folder.is_dir() or (folder / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(name if folder is not own else str(own), **how)
            break
    set_padding(model, task, tokenizer)
    return model, tokenizer


def find_base(
    adapter: str, name: str | None, *, trust_remote_code: bool = False
) -> tuple[str, dict[str, Any], PretrainedConfig]:
    """(name of the base, what `formats.inspect` says of the adapter, the base's configuration); no
    weights are read.

    Args:
        name: the base; None: the one that the adapter names.

    Raises:
        UsageError: no base is named, or the folder is a whole model.
    """
    from lorica import formats
    from lorica.embedded import located
    from lorica.run.options import UsageError

    told = formats.inspect(adapter)
    name = name or told["base"].get("name")
    if not name:
        raise UsageError(f"`{adapter}` does not name its base; give it with `--model`")
    if told["type"] == "model":
        raise UsageError(
            f"`{adapter}` is a whole model already (`{told['method']}` trains the base itself); use"
            " it as it is"
        )
    name = located(name)
    return name, told, read_config(name, trust_remote_code=trust_remote_code)


_PEFT_TASKS = {
    "CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}  # fmt: skip


def _task(told: dict[str, Any], config: PretrainedConfig) -> str | None:
    """What the adapter was trained for: its model's class says so, or PEFT's task type; None: it is
    a task for which transformers has no such model."""
    task = _named_task(told, config)
    if task is None or not type(config).__module__.startswith("transformers."):
        return task
    import transformers

    auto: Any = getattr(transformers, AUTO[task][0])
    return task if type(config) in auto._model_mapping else None


def _named_task(told: dict[str, Any], config: PretrainedConfig) -> str | None:
    if (found := _PEFT_TASKS.get(told["task_type"] or "")) is not None:
        return found
    for name in (told["base"].get("class"), *(config.architectures or [])):
        for task, (_, ending) in AUTO.items():
            if name is not None and name.endswith(ending):
                # Models of images and text, which have no encoder-decoder, end in that name too.
                if task != "seq2seq-lm" or config.is_encoder_decoder:
                    return task
    return None


def _class_of(told: dict[str, Any], config: PretrainedConfig) -> Any:
    """The class of transformers that the adapter's model has, or its base.

    Raises:
        ValueError: neither names one.
    """
    import transformers

    for name in (told["base"].get("class"), *(config.architectures or [])):
        kind: Any = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise ValueError(
        f"`{told['path']}` does not say what its model does, and neither does the base (its class"
        f" is {(config.architectures or ['unknown'])[0]}, which transformers doesn't have). Load"
        " the two in Python: `lorica.load(model, path)`"
    )


def _by_class(
    adapter: Path, name: str, kind: Any, quantization: Any
) -> tuple[PreTrainedModel, Any]:
    """`load_base` for a class of transformers."""
    from transformers import AutoProcessor

    classes = _classifier(adapter) if kind.__name__.endswith("Classification") else None
    more: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if classes is not None:
        more |= {"num_labels": classes, "ignore_mismatched_sizes": True}
    check_parts(name)
    model = _from_checkpoint(kind, f"a {kind.__name__}", name, dtype="auto", **more).model
    fit_adapter(model, adapter)
    read = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in read):
        return model, None
    try:
        return model, AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(_cannot("a processor", name, error)) from error


def _head_size(adapter: Path, task: str) -> int | None:
    """Outputs of the classifier that lies in the adapter's folder; None: there is none, or the task
    has none."""
    classifies = task in ("sequence-classification", "token-classification")
    return _classifier(adapter) if classifies else None


def _classifier(adapter: Path) -> int | None:
    """Outputs of a classifier in the adapter's folder; None: there is none."""
    from lorica.formats.safe_files import open_tensors

    for file in sorted(adapter.glob("*.safetensors")):
        with open_tensors(file) as tensors:
            for key in tensors.keys():
                whole = key.replace(".copy.", ".")  # of a module that lorica trains in full
                if whole.endswith(("classifier.weight", "score.weight", "out_proj.weight")):
                    return next(iter(tensors.get_slice(key).get_shape()), None)
    return None


def _labels(adapter: Path, classes: int) -> Labels:
    """The classes' names, where the run that wrote the adapter has left them beside it."""
    from lorica.data import Labels

    file = adapter / "labels.json"
    if file.is_file():
        try:
            names: Any = parse_json(file.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            names = None
        texts = isinstance(names, list) and all(isinstance(n, str) and n for n in names)
        count = 0 if classes == 1 else classes  # one output is a regression's
        if not texts or len(set(names)) != len(names) or len(names) != count:
            raise ValueError(
                f"{file} is no list of the {classes} different names that the head of this adapter"
                " has outputs for. Copy the folder again from where it came, or remove that file:"
                " the classes then have numbers"
            )
        return Labels(tuple(names))
    return Labels() if classes == 1 else Labels.from_num_labels(classes)
