"""The data of a pre-training run: text, its tokenizer, and full rows of token ids.

`lorica.data` reads through datasets and transformers, so it is imported inside the functions:
importing this module costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorica.run import model_configs
from lorica.run.config import absolute
from lorica.run.from_scratch import settled
from lorica.run.options import PretrainOptions, UsageError
from lorica.run.options.checks import refuse
from lorica.run.plan import RunData

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lorica.data.stream import Encoded, Text
    from lorica.data.streamed import Streamed

BEGINNING = 20_000_000  # characters of a stream that a tokenizer is trained on
MAX_LENGTH = 256  # GaLore's, and SwitchLoRA's at 130M


@dataclass(kw_only=True)
class PretrainingData(RunData):
    """Rows of running text.

    Attributes:
        sources: files, folders or hub ids.
        config: the model's, with the tokenizer's vocabulary.
        rows_per_step: over all processes.
        rows: (rows, max_length) token ids; None: the data are streamed.
        text: what the rows were cut from; None: the data are streamed.
        streamed: makes rows as the run goes on; None: they are all in memory.
        held: (rows, max_length) token ids to evaluate on, if any.
    """

    sources: tuple[str, ...]
    config: PretrainedConfig
    rows_per_step: int
    rows: np.ndarray | None
    text: Encoded | None
    streamed: Streamed | None
    held: np.ndarray | None

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self.rows_per_step * self.max_length


def read_text(options: PretrainOptions, checkpoint: Path | None, processes: int) -> PretrainingData:
    """Read the text, get a tokenizer, and cut rows.

    Args:
        checkpoint: of the run that is resumed, which has its tokenizer already.
        processes: that train together.

    Raises:
        UsageError: options that do not go with this data or this model.
        ValueError: there is no such data, or too little of it.
    """
    reader = _Reader(options, checkpoint, processes)
    return reader.stream() if options.streaming else reader.read()


class _Reader:
    """What reading in memory and streaming share."""

    def __init__(self, options: PretrainOptions, checkpoint: Path | None, processes: int) -> None:
        from lorica.data.stream import has_txt
        from lorica.embedded.source import BOTH

        self.options, self.checkpoint, self.processes = options, checkpoint, processes
        self.shape = model_configs.find(
            options.model_config, trust_remote_code=options.trust_remote_code
        )
        self.sources: tuple[str, ...] = options.data or (BOTH,)
        self.source = ", ".join(self.sources)
        self.max_length = _max_length(options, self.shape.longest)
        batch = options.per_device_train_batch_size * options.gradient_accumulation_steps
        self.rows_per_step = batch * processes
        evaluated = options.eval_data or ()
        refuse(
            options.documents is not None and not has_txt((*self.sources, *evaluated)),
            f"`--documents {options.documents}` says what a document of a .txt file is, and"
            f" {self.source} is none; leave it out",
        )

    def read(self) -> PretrainingData:
        """All of the data, as rows in memory."""
        text = self.text(self.sources, self.options.split)
        tokenizer, config = self.tokenizer(text.texts())
        ids = text.ids(tokenizer)
        rows, held = ids.rows(self.max_length), None
        self.refuse_short(self.source, ids, len(rows), 1)
        if self.options.eval_fraction is not None:
            rows, held = self.parted(rows, self.options.eval_fraction)
        self.refuse_short(self.source, ids, len(rows), self.rows_per_step)
        # Whole steps only, so that each one weighs, and counts, the same.
        rows = rows[: len(rows) // self.rows_per_step * self.rows_per_step]
        if held is None and self.options.brings_evaluation():
            held = self.held(tokenizer)
        facts = {"data_sha256": hash_ids(rows)}
        return self.data(tokenizer, config, facts, rows=rows, text=ids, streamed=None, held=held)

    def stream(self) -> PretrainingData:
        """The data's beginning; rows are made as the run goes on."""
        streamed = self.opened(self.options.split)
        tokenizer, config = self.tokenizer(streamed.texts(BEGINNING))
        streamed.lay(tokenizer, self.max_length, self.options.seed)
        inner: Any = tokenizer
        form = inner.backend_tokenizer.to_str() if inner.is_fast else str(inner.get_vocab())
        facts = {"tokenizer_sha256": hashlib.sha256(form.encode()).hexdigest()}
        held = self.held(tokenizer) if self.options.brings_evaluation() else None
        return self.data(
            tokenizer, config, facts, rows=None, text=None, streamed=streamed, held=held
        )

    def data(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        facts: dict[str, Any],
        *,
        rows: np.ndarray | None,
        text: Encoded | None,
        streamed: Streamed | None,
        held: np.ndarray | None,
    ) -> PretrainingData:
        if held is not None:
            facts["eval_data_sha256"] = hash_ids(held)
        facts["processes"] = self.processes
        return PretrainingData(
            source=self.source,
            tokenizer=tokenizer,
            max_length=self.max_length,
            facts=facts,
            settled={"data": absolute(self.sources), "max_length": self.max_length},
            evaluates=held is not None,
            measured=False,
            shuffled=streamed is None,
            uniform=True,
            sources=self.sources,
            config=config,
            rows_per_step=self.rows_per_step,
            rows=rows,
            text=text,
            streamed=streamed,
            held=held,
        )

    def text(self, sources: tuple[str, ...], split: str | None) -> Text:
        from lorica.data.stream import Text, has_txt

        options = self.options
        documents = options.documents if has_txt(sources) else None
        return Text.read(sources, split=split, columns=options.columns, documents=documents)

    def opened(self, split: str | None) -> Streamed:
        from lorica.data.streamed import Streamed

        return Streamed(self.source, split=split, columns=self.options.columns)

    def tokenizer(self, texts: Iterable[str]) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
        """The tokenizer that was given, the one of the run that is resumed, or one that is trained
        on these texts; and the configuration that fits it."""
        from lorica.run.load_model import load_tokenizer

        options = self.options
        kept = None if self.checkpoint is None else self.checkpoint.parent / "tokenizer"
        if options.tokenizer is not None:
            tokenizer = load_tokenizer(
                options.tokenizer, trust_remote_code=options.trust_remote_code
            )
        elif kept is not None and kept.is_dir():
            tokenizer = load_tokenizer(str(kept))
            for name in ("is_local", "local_files_only"):  # what transformers notes of reading it
                tokenizer.init_kwargs.pop(name, None)
        else:
            tokenizer = self.trained(texts)
        if not isinstance(tokenizer.eos_token_id, int):
            raise ValueError(
                f"the tokenizer `{options.tokenizer}` has no end-of-text token (eos_token), so"
                " documents would run into each other; give one that has it, or leave"
                " `--tokenizer` out to train one"
            )
        config = settled(self.shape, options, tokenizer)
        if self.shape.own_positions:
            config.max_position_embeddings = self.max_length
        return tokenizer, config

    def trained(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        from lorica.run.train_tokenizer import train_tokenizer

        given = self.options.vocab_size
        wanted = given or self.shape.vocabulary
        tokenizer = train_tokenizer(texts, wanted)
        found = len(tokenizer)
        if given is not None and found < wanted:
            raise ValueError(
                f"`--vocab-size {wanted}`: the text of {self.source} has pairs for {found:,}"
                " tokens only; give at most that, or more text"
            )
        tokenizer.model_max_length = self.max_length
        return tokenizer

    def parted(self, rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on, and the first of a fraction of them to evaluate on; both in the data's
        order."""
        from datasets import Dataset

        from lorica.data import hold_out

        numbers = Dataset.from_dict({"row": range(len(rows))})
        parts = hold_out(numbers, fraction, seed=self.options.seed)
        train, held = (part.with_format("numpy")["row"][:] for part in parts)
        return rows[train], rows[held][: self.most_held()]

    def most_held(self) -> int | None:
        """Rows to evaluate on at most."""
        most = self.options.max_eval_tokens
        return None if most is None else math.ceil(most / self.max_length)

    def held(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """Rows to evaluate on, from a source or a split of their own."""
        from lorica.embedded.source import TEST

        options, split, limit = self.options, self.options.eval_split, self.most_held()
        sources = options.eval_data or self.sources
        if options.streaming and options.eval_data is None:
            streamed = self.opened(split)
            streamed.lay(tokenizer, self.max_length, options.seed)
            return streamed.head(limit or 0)
        if options.eval_data is None and split is None:
            split = TEST  # of the embedded tasks
        ids = self.text(sources, split).ids(tokenizer)
        held = ids.rows(self.max_length)[:limit]
        self.refuse_short(", ".join(sources), ids, len(held), 1)
        return held

    def refuse_short(self, source: str, text: Encoded, rows: int, wanted: int) -> None:
        """Raises ValueError: the text makes fewer rows than are wanted."""
        if rows >= wanted:
            return
        options, length = self.options, self.max_length
        batch = "one row" if wanted == 1 else f"one step ({wanted} rows of {length})"
        smaller = (
            ""
            if wanted == 1
            else f", `--per-device-train-batch-size` ({options.per_device_train_batch_size}) or"
            f" `--gradient-accumulation-steps` ({options.gradient_accumulation_steps})"
        )
        raise ValueError(
            f"the text of {source} is too short: {len(text.ids):,} tokens make {rows} rows of"
            f" {length}, and {batch} needs {wanted * length:,}. Give more text, or a smaller"
            f" `--max-length`{smaller}"
        )


def _max_length(options: PretrainOptions, longest: int | None) -> int:
    length = options.max_length or min(MAX_LENGTH, longest or MAX_LENGTH)
    if length < 2:
        raise UsageError(
            f"`--max-length {length}`: a row needs 2 tokens at least, one to predict the other;"
            " common values are 256 to 1024"
        )
    refuse(
        longest is not None and length > longest,
        f"`--max-length {length}`: `{options.model_config}` ends at {longest} tokens; give at most"
        " that",
    )
    return length


def hash_ids(rows: np.ndarray) -> str:
    """SHA-256 of rows of ids and their shape."""
    import numpy as np

    digest = hashlib.sha256(f"{rows.shape}".encode())
    digest.update(np.ascontiguousarray(rows, dtype="<i4").tobytes())
    return digest.hexdigest()
