"""Configurations to start from: LLaMA's shape in several sizes, or anybody's config.json.

| name | width | ffn | heads | layers | vocabulary | parameters | of |
|---|---|---|---|---|---|---|---|
| llama-1m | 128 | 352 | 4 | 4 | 2,048 | 1.3 M | Lorica |
| llama-4m | 256 | 688 | 4 | 4 | 2,048 | 4.2 M | Lorica |
| llama-9m | 320 | 864 | 5 | 5 | 4,096 | 8.8 M | Lorica |
| llama-20m | 384 | 1024 | 6 | 8 | 8,192 | 20.5 M | Lorica |
| llama-60m | 512 | 1376 | 8 | 8 | 32,100 | 58.2 M | GaLore |
| llama-130m | 768 | 2048 | 12 | 12 | 32,100 | 134.3 M | SwitchLoRA |
| llama-250m | 768 | 2560 | 16 | 24 | 32,100 | 247.5 M | SwitchLoRA |
| llama-350m | 1024 | 2736 | 16 | 24 | 32,100 | 368.2 M | SwitchLoRA |
| llama-1b | 2048 | 5461 | 32 | 24 | 32,100 | 1339.5 M | SwitchLoRA |

RMS norm, rotary positions, SwiGLU, no biases, an untied head. The small ones take the vocabulary of
the tokenizer; those of the papers have T5's 32,100, whatever the tokenizer fills of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorica.run.options import UsageError
from lorica.text import clear_errors, nearest, parse_json, to_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Llama:
    """One line of the table above; `fixed`: the vocabulary is the paper's."""

    width: int
    ffn: int
    heads: int
    layers: int
    vocabulary: int
    fixed: bool = False


PAPERS = 32_100  # T5's vocabulary
SHAPES = {
    "llama-1m": Llama(128, 352, 4, 4, 2_048),
    "llama-4m": Llama(256, 688, 4, 4, 2_048),
    "llama-9m": Llama(320, 864, 5, 5, 4_096),
    "llama-20m": Llama(384, 1024, 6, 8, 8_192),
    "llama-60m": Llama(512, 1376, 8, 8, PAPERS, fixed=True),
    "llama-130m": Llama(768, 2048, 12, 12, PAPERS, fixed=True),
    "llama-250m": Llama(768, 2560, 16, 24, PAPERS, fixed=True),
    "llama-350m": Llama(1024, 2736, 16, 24, PAPERS, fixed=True),
    "llama-1b": Llama(2048, 5461, 32, 24, PAPERS, fixed=True),
}


@dataclass(frozen=True)
class Plan:
    """A configuration before its vocabulary is settled.

    Attributes:
        config: as named.
        vocabulary: the one it brings.
        fixed: whether that stays where the tokenizer has fewer tokens.
        own_positions: whether the row's length is ours to choose.
    """

    config: PretrainedConfig
    vocabulary: int
    fixed: bool
    own_positions: bool

    @property
    def longest(self) -> int | None:
        """Tokens that a row may have; None: as many as one likes."""
        if self.own_positions:
            return None
        text = vars(self.config.get_text_config())
        said = [text.get("max_position_embeddings"), text.get("n_positions")]
        return min((n for n in said if isinstance(n, int) and n > 0), default=None)


@clear_errors()
def find(name: str, *, trust_remote_code: bool = False) -> Plan:
    """The configuration that `name` means: a word of the table, a config.json, a folder or hub id.

    Raises:
        UsageError: no such word, file or folder.
        ValueError: no configuration of a causal language model, or one that contradicts itself.

    Example:
        >>> find("llama-1m").config.num_hidden_layers
        4
    """
    from transformers import LlamaConfig

    if name in SHAPES:
        shape = SHAPES[name]
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_hidden_layers=shape.layers,
            tie_word_embeddings=False,
        )
        return Plan(config, shape.vocabulary, shape.fixed, own_positions=True)
    config = _read(name, trust_remote_code)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    brought = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in known and not (trust_remote_code and brought):
        raise ValueError(
            f"`--model-config {name}` is of the type `{config.model_type}`, of which transformers"
            " has no causal language model; pre-training here predicts the next token. Name a"
            f" decoder's config.json, or one of {', '.join(SHAPES)}"
        )
    vocabulary: Any = config.get_text_config().vocab_size
    return Plan(config, vocabulary, fixed=True, own_positions=False)


def _read(name: str, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    from lorica.formats.foreign_code import refuse_code
    from lorica.run.load_model import read_config

    path = to_path(name)
    if not path.exists() and ("/" not in name or path.suffix == ".json"):
        raise UsageError(
            f"`--model-config {name}` is no shape, file or folder; the shapes:"
            f" {', '.join(SHAPES)}.{nearest(name, SHAPES)}"
        )
    if not path.is_file():
        return read_config(name, trust_remote_code=trust_remote_code)
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        kind = found.pop("model_type")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"cannot read a model's configuration from `{name}` ({type(error).__name__}:"
            f" {one_line(error)}). A config.json of transformers is wanted, with its `model_type`"
        ) from error
    if not trust_remote_code:
        refuse_code(found, name)
    with _told(name):
        return AutoConfig.for_model(kind, **found)


def build(config: PretrainedConfig, name: str, **how: Any) -> PreTrainedModel:
    """The model that a configuration describes, from torch's current random state.

    Raises:
        ValueError: the configuration contradicts itself.
    """
    from transformers import AutoModelForCausalLM

    with _told(name):
        return AutoModelForCausalLM.from_config(config, **how)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever transformers raises, in one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"`--model-config {name}` makes no model: {one_line(error)}. Mend the file"
        ) from error


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raises unless no token sees those after it."""
    import torch

    from lorica.tensors.modules import evaluating

    with evaluating(model), torch.no_grad():
        one, other = (
            model(input_ids=torch.tensor([[1, 2, 3, last]], device=model.device)).logits[0, :3]
            for last in (0, 4)
        )
    # A fresh model's attention moves little, so a leak is small: far above rounding is enough.
    if float((one - other).abs().max()) > 1e-5 * float(one.abs().max()):
        raise ValueError(
            f"`--model-config {name}` makes a {type(model).__name__} whose tokens see those after"
            " them, so there is nothing to predict. Name a decoder's configuration; for an encoder"
            ' such as BERT write `"is_decoder": true` into the file'
        )


def one_line(error: Exception) -> str:
    """What an exception says, short enough for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) < 300 else text[:297] + "...").rstrip(".")
