"""Words with a tag each (named entities, parts of speech)."""

from __future__ import annotations

from lorica.data.samples import Row, Tagged
from lorica.data.shapes import Shape


def tagged(row: Row) -> Tagged:
    words = row.items("tokens", lambda word: isinstance(word, str), "texts")
    tags = row.items("tags", lambda tag: isinstance(tag, str | int), "texts or integers")
    if len(words) != len(tags):
        raise row.error(
            "tags", f"{len(words)} tokens need {len(words)} tags, and there are {len(tags)}"
        )
    return Tagged(words, tags)


shape = Shape(
    name="tokens-tags",
    columns={"tokens": ("words",), "tags": ("ner_tags", "labels")},
    readers={"token-classification": tagged},
    label="tags",
)
