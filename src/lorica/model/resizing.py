"""`model.resize_token_embeddings` while adapters are attached.

It makes new tables out of those that it finds. Where an adapter has taken the place of one, it
would fail in the middle with words about classes, so the call is an error that says the order.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from lorica.model.heads import within
from lorica.model.token_rows import embedding_paths

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters

_NAME = "resize_token_embeddings"


def install(adapters: Adapters) -> None:
    """Refuse it on a transformers model of which a table of tokens was replaced."""
    model, replaced = adapters.model, [*adapters.layers, *adapters.saved, *adapters.tables]
    if isinstance(model, PreTrainedModel):
        tables = [path for path in embedding_paths(model) if within(path, replaced)]
        if tables:  # not a closure, which copies of the model would share
            vars(model)[_NAME] = functools.partial(_refuse, type(model).__name__, tables)


def remove(adapters: Adapters) -> None:
    vars(adapters.model).pop(_NAME, None)


def _refuse(
    model: str, tables: list[str], new_num_tokens: object = None, *_: object, **__: object
) -> None:
    raise ValueError(
        f"`resize_token_embeddings({new_num_tokens})` of this {model}: {' and '.join(tables)} train"
        " with adapters, which have the sizes of now. Resize first and attach then:"
        " `lorica.detach(model)` (or `lorica.merge(model)`), `model.resize_token_embeddings(...)`,"
        " `lorica.attach(model, ...)`"
    )
