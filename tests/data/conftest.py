"""Fixtures of the data tests: small tokenizers made on the spot, and the shared data."""

from __future__ import annotations

from pathlib import Path

import pytest

TEXT = [
    "once upon a time there was a little red fox who lived in a little red house",
    "Question: what is two plus two?\nAnswer: two plus two is four\n\n",
    "the user said: 'hello there', and the assistant said: 'hello to you'.",
    "### Instruction:\nwrite a line\n\n### Response:\nhere is a line",
]


def _wrap(backend):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _with_bos(backend) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )


@pytest.fixture(scope="session")
def _bytes_backend():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


@pytest.fixture
def tokenizer(_bytes_backend):
    """Byte-level BPE that puts <s> before a text, as Llama's; no chat template."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(_bytes_backend.to_str())
    _with_bos(backend)
    return _wrap(backend)


@pytest.fixture
def marking_tokenizer():
    """As SentencePiece: a word's start is marked, a text's start too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<pad>", "<s>", "</s>"],
            initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n"],
            show_progress=False,
        ),
    )
    _with_bos(backend)
    return _wrap(backend)


@pytest.fixture
def word_tokenizer():
    """An encoder's: lower-case words, [CLS] text [SEP] pair [SEP] with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "the", "un", "##believ"]
    vocab = {word: i for i, word in enumerate([*words, "##able"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data that stands beside the repository."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def story_tokenizer(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "tinystories-656k")
