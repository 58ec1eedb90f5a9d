"""A prompt and its completion, as two texts or as two lists of messages.

Texts are joined as they are, with no template around them and no space between them; the text of
`system`, where there is one, leads them with a blank line behind it.
"""

from __future__ import annotations

from lorica.data.samples import ASSISTANT, USER, Chat, Exchange, Row, SourceTarget
from lorica.data.shapes import Shape
from lorica.data.turns import tools_of, turns_of, with_system


def exchange(row: Row) -> Exchange | Chat:
    if isinstance(row.values["prompt"], list):
        prompt, asked = with_system(row, turns_of(row, "prompt"))
        completion, answered = turns_of(row, "completion")
        flags = (*(asked or (None,) * len(prompt)), *(answered or (None,) * len(completion)))
        given = flags if asked or answered else ()
        return Chat([*prompt, *completion], tools_of(row), trained_from=len(prompt), flags=given)
    prompt, completion = (row.text(name, numbers=True) for name in ("prompt", "completion"))
    system = row.optional("system")
    asked = (("system", f"{system}\n\n"), (USER, prompt)) if system else ((USER, prompt),)
    return Exchange((*asked, (ASSISTANT, completion)))


def source_target(row: Row) -> SourceTarget:
    prompt, system = row.text("prompt", numbers=True), row.optional("system")
    source = f"{system}\n\n{prompt}" if system else prompt
    return SourceTarget(source, row.text("completion", numbers=True))


shape = Shape(
    name="prompt-completion",
    columns={"prompt": ("input",), "completion": ("output", "response", "answer")},
    optional={"system": ("system_prompt",), "tools": ()},
    readers={"causal-lm": exchange, "seq2seq-lm": source_target},
)
