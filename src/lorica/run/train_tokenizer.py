"""A tokenizer for a model from scratch: given, or a byte-level BPE trained on the data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"  # stands between documents, and starts a text that has no beginning
SMALLEST = 257  # the bytes and the end


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of at most `vocabulary` tokens: the end of text, 256 bytes, and the merges.

    The same texts give the same tokenizer. A small text may not have so many merges.

    Args:
        texts: in parts of any length; no merge goes over a part's end.
        vocabulary: at least 257.

    Raises:
        ValueError: fewer.

    Example:
        >>> made = train_tokenizer(["the cat and the dog"] * 3, 260)
        >>> len(made), made.decode(made("the cat")["input_ids"])
        (260, 'the cat')
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST:
        raise ValueError(
            f"`--vocab-size {vocabulary}`: a byte-level tokenizer has {SMALLEST} tokens at least"
            " (256 bytes and the end of text). Common values are 2048 to 32000"
        )
    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def write(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it; the folder is complete or absent."""
    from lorica.formats.atomic_folder import writing

    with writing(folder, overwrite=True, marks=("tokenizer.json",)) as aside:
        tokenizer.save_pretrained(aside)
