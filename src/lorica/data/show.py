"""One example, the way the model will see it: what is trained and what is only read."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from typing import TYPE_CHECKING

from lorica.data.collate import IGNORED
from lorica.data.tokenise import Prepared
from lorica.text import Styled, one_line, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAINED, _READ, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def show_example(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    *,
    index: int = 0,
    max_tokens: int = 400,
    color: bool | None = None,
) -> str:
    """Row `index` as text for a terminal, its trained tokens green and the others dim; what the
    data hold of escape sequences is spelt out.

    Without colour trained tokens stand in `[[ ]]`. For classification the label follows the text;
    for an encoder-decoder source and target follow each other.

    Args:
        prepared: what `prepare` returned.
        tokenizer: the one it was prepared with.
        index: of the row.
        max_tokens: at most so many tokens are shown.
        color: Default: whether standard error is a terminal and `NO_COLOR` is not set.
    """
    if not 0 <= index < len(prepared.dataset):
        raise ValueError(
            f"`index` is {index}, and there are {len(prepared.dataset)} rows: 0 to "
            f"{len(prepared.dataset) - 1}."
        )
    terminal = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    colored = terminal if color is None else color
    return Styled(_shown(prepared, tokenizer, index, max_tokens, colored))


def _shown(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    max_tokens: int,
    color: bool,
) -> str:
    row = prepared.dataset[index]
    ids, labels = row["input_ids"], row["labels"]
    classes = prepared.labels
    if not isinstance(labels, list):
        assert classes is not None
        name = labels if classes.regression else one_line(classes.names[labels])
        return f"{_text(tokenizer, ids[:max_tokens])}{_more(ids, max_tokens)}\n-> {name}"
    if len(labels) != len(ids) or prepared.report.task == "seq2seq-lm":
        shown = [
            _text(tokenizer, part[:max_tokens]) + _more(part, max_tokens) for part in (ids, labels)
        ]
        return f"{shown[0]}\n-> {_marked(shown[1], True, color)}"
    if classes is not None:
        return _tagged(tokenizer, ids[:max_tokens], labels, classes.names, color)
    starts = [i for i, place in enumerate(row.get("position_ids", [0])) if place == 0]
    ends = [*starts[1:], len(ids)]
    parts = [
        _masked(tokenizer, ids[a : min(b, max_tokens)], labels[a : min(b, max_tokens)], color)
        for a, b in zip(starts, ends, strict=True)
        if a < max_tokens
    ]
    return "\n--- next example of the row ---\n".join(parts) + _more(ids, max_tokens)


def _more(ids: list[int], shown: int) -> str:
    return f" ... ({len(ids) - shown} more tokens)" if len(ids) > shown else ""


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return printable(str(tokenizer.decode(ids, skip_special_tokens=False)))


def _marked(text: str, trained: bool, color: bool) -> str:
    if color:
        return f"{_TRAINED if trained else _READ}{text}{_PLAIN}"
    return f"[[{text}]]" if trained else text


def _masked(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], color: bool
) -> str:
    shown, text, end = [], "", 0
    for trained, run in groupby(labels, key=lambda label: label != IGNORED):
        end += len(list(run))
        # Of the growing text, not of the run alone: decoding a run drops its leading space.
        whole = _text(tokenizer, ids[:end])
        new = whole[len(text) :] if whole.startswith(text) else _text(tokenizer, ids[:end])
        shown.append(_marked(new, trained, color))
        text = whole
    return "".join(shown)


def _tagged(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    labels: list[int],
    names: tuple[str, ...],
    color: bool,
) -> str:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return " ".join(
        printable(str(token))
        + (_marked(one_line(names[label]), True, color) if label != IGNORED else "")
        for token, label in zip(tokens, labels, strict=False)
    )
