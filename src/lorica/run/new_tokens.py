"""New tokens of a run: into the tokenizer, into the model's tables, and into the recipe.

A new row starts as the mean of the rows of the tokens that the text was split into before. Nothing
is drawn, so a resumed run and one that reads the adapter begin with the same model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorica.text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorica.recipe.recipe import Recipe


class NewTokens(NamedTuple):
    """Tokens that a tokenizer was given.

    Attributes:
        ids: one for each, ascending.
        pieces: for each, the ids that its text had before.
    """

    ids: list[int]
    pieces: list[list[int]]

    @property
    def vocabulary(self) -> int:
        """Rows that a table must have for them."""
        return self.ids[-1] + 1


def add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> NewTokens:
    """Give the tokenizer these tokens; text that holds one is never split within it.

    Raises:
        ValueError: a token that it has already, or that comes twice.
    """
    words: Any = tokenizer
    known = words.get_vocab()
    for token in tokens:
        if token in known:
            raise ValueError(
                f"`--add-tokens {shorten(token)[1:-1]}`: the tokenizer has this token already (its"
                f" id is {known[token]}); leave it out. In Python"
                f" `trainable_token_indices=[{known[token]}]` trains its row"
            )
    if len({*tokens}) < len(tokens):
        twice = next(t for t in tokens if [*tokens].count(t) > 1)
        raise ValueError(f"`--add-tokens` names {shorten(twice)} twice; name it once")
    pieces = [words(t, add_special_tokens=False)["input_ids"] for t in tokens]
    unknown = {words.unk_token_id}
    words.add_tokens([*tokens])
    ids = words.convert_tokens_to_ids([*tokens])
    both = sorted(zip(ids, pieces, strict=True))
    return NewTokens([i for i, _ in both], [[p for p in q if p not in unknown] for _, q in both])


def grow(model: PreTrainedModel, vocabulary: int) -> None:
    """Give the model's tables rows up to this vocabulary; the new ones are zeros."""
    import torch

    from lorica.model.token_rows import vocabulary_tables

    before = [len(model.get_submodule(t).get_parameter("weight")) for t in vocabulary_tables(model)]
    if not before or min(before) >= vocabulary:
        return
    mode = model.training
    with torch.random.fork_rng(devices=[]):  # transformers draws new rows
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.train(mode)
    with torch.no_grad():
        for path, rows in zip(vocabulary_tables(model), before, strict=True):
            for p in model.get_submodule(path).parameters():  # a head's bias, too
                p[rows:].zero_()


def start(model: PreTrainedModel, new: NewTokens) -> None:
    """Give the model's tables rows for new tokens, and these rows their start."""
    import torch

    from lorica.model.token_rows import vocabulary_tables

    grow(model, new.vocabulary)
    with torch.no_grad():
        for path in vocabulary_tables(model):
            table = model.get_submodule(path).get_parameter("weight")
            mean = table[: new.ids[0]].float().mean(0)
            for i, pieces in zip(new.ids, new.pieces, strict=True):
                own = table[pieces].float().mean(0) if pieces else mean
                table[i] = own.to(table.dtype)


def trained_by(recipe: Recipe, model: PreTrainedModel, new: NewTokens) -> Recipe:
    """The recipe that trains their rows, too; the same one where it trains the tables anyway."""
    from lorica.model.targets import matches
    from lorica.model.token_rows import vocabulary_tables

    tables = vocabulary_tables(model)
    left = [t for t in tables if not any(matches(s, t) for s in recipe.modules_to_save)]
    if not recipe.delta.wraps or recipe.train_rest or not left:
        return recipe
    return dataclasses.replace(recipe, trainable_token_indices=(*new.ids,))


def fit_adapter(model: PreTrainedModel, adapter: str | Path) -> None:
    """Give the model the rows that an adapter has values for, if it was trained on a larger
    vocabulary."""
    from lorica.formats.adapter_file import AdapterFile
    from lorica.model.token_rows import embedding_paths

    grow(model, AdapterFile.read(adapter).vocabulary(embedding_paths(model)))


def vocabulary_with(
    model: str, config: Any, adapter: str | Path | None, *, trust_remote_code: bool = False
) -> int | None:
    """Rows that the table of a model has with an adapter, before its weights are read."""
    from lorica.formats.adapter_file import AdapterFile
    from lorica.model.token_rows import embedding_paths
    from lorica.run.load_model import empty_model

    own: int | None = getattr(config.get_text_config(), "vocab_size", None)
    if adapter is None or own is None:
        return own
    empty = empty_model(model, trust_remote_code=trust_remote_code)
    return max(own, AdapterFile.read(adapter).vocabulary(embedding_paths(empty)))
