"""Chat templates: from messages to text, and which of it is trained.

What belongs to a message is found by rendering the conversation up to it: the text before an
assistant's turn (with the generation prompt, as when generating) must be the start of the text that
has the turn, and the turn is what comes after. A template that rewrites earlier turns is refused
instead of being masked wrongly, unless it marks the assistant's part with `{% generation %}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.data.samples import ASSISTANT, DOCUMENT, Piece, Row
from lorica.data.words import excerpt, kind_of, listing
from lorica.text import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = {
    # For models that know no chat format: words instead of special tokens.
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize }}: "
        "{{ message['content'] }}{% if message['tool_calls'] %}"
        "{{ message['tool_calls'] | tojson }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    # OpenAI's chat markup. A tokenizer without its two marks spells them out.
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{{ message['content'] }}{% if message['tool_calls'] %}"
        "{{ message['tool_calls'] | tojson }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
_TOOLS = "{% if tools %}{{ 'Tools: ' }}{{ tools | tojson }}{{ '\\n\\n' }}{% endif %}"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

COMPLETION = frozenset({ASSISTANT})


@dataclass(frozen=True)
class Template:
    """A chat template: `text=None` is the tokenizer's own."""

    name: str
    text: str | None
    marked: bool  # has {% generation %} blocks


@dataclass(frozen=True)
class Format:
    """How examples become pieces for one tokenizer: template, marks, and the roles trained."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    roles: frozenset[str] | None  # None: all
    start: tuple[int, ...]  # what the tokenizer puts before every text (BOS), or nothing

    def trains(self, role: str) -> bool:
        return self.roles is None or role in self.roles

    def begin(self) -> Piece:
        return Piece(False, ids=self.start)

    def end(self, trained: bool, text: str) -> Piece:
        """EOS after `text`, unless the tokenizer has none or the text ends with it."""
        eos, mark = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        if not isinstance(eos, int) or (mark and text.endswith(str(mark))):
            return Piece(trained)
        return Piece(trained, ids=(eos,))

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, trained_from: int
    ) -> list[Piece]:
        """The pieces of a conversation; every message before `trained_from` is a prompt."""
        if self.template is None:
            raise ValueError(
                "messages need a chat template, and this tokenizer has none. Give "
                f"`chat_template` as one of {listing(BUILT_IN)}, as a file with a Jinja template, "
                "or as its text."
            )
        if self.template.marked and self.roles == COMPLETION and not trained_from:
            return [self._by_marks(messages, tools)]
        pieces: list[Piece] = []
        done = ""
        for index in range(trained_from, len(messages)):
            role = messages[index]["role"]
            if not self.trains(role):
                continue
            before = self._text(messages[:index], tools, prompt=role == ASSISTANT)
            after = self._text(messages[: index + 1], tools, prompt=False)
            self._starts(before, done, index)
            self._starts(after, before, index)
            pieces.append(Piece(self.roles is None, text=before[len(done) :]))
            pieces.append(Piece(True, text=after[len(before) :]))
            done = after
        whole = self._text(messages, tools, prompt=False)
        self._starts(whole, done, len(messages) - 1)
        rest = whole[len(done) :]
        if rest:
            pieces.append(Piece(self.roles is None, text=rest))
        elif pieces and not done.rstrip().endswith(tuple(self.tokenizer.all_special_tokens)):
            pieces.append(self.end(True, done))
        return pieces

    def _starts(self, text: str, start: str, index: int) -> None:
        if text.startswith(start):
            return
        at = next(i for i, c in enumerate(start) if text[i : i + 1] != c)
        assert self.template is not None
        raise ValueError(
            f"the chat template ({self.template.name}) renders message {index} in a way that "
            f"changes the text before it: {excerpt(start[at : at + 40])} becomes "
            f"{excerpt(text[at : at + 40])}, so what is trained can't be told from the rest. Mark "
            "the assistant's part in the template with {% generation %} ... {% endgeneration %}, "
            'or use another (`chat_template="chatml"`).'
        )

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        if not messages and not prompt:
            return ""
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def _by_marks(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Piece:
        made = self._apply(
            messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = tuple(bool(mark) for mark in made["assistant_masks"])
        return Piece(True, ids=tuple(made["input_ids"]), mask=mask)

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, **how: Any) -> Any:
        import jinja2

        assert self.template is not None
        if self.template.text is not None:
            how["chat_template"] = self.template.text
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"the chat template ({self.template.name}) refuses the messages of "
                f"{listing(message['role'] for message in messages)}: {error}. Mend the "
                'conversation, or use another template (`chat_template="chatml"`).'
            ) from error


def template_of(
    tokenizer: PreTrainedTokenizerBase, chosen: str | None, *, starts: bool
) -> Template | None:
    """The template meant by `chat_template`.

    Args:
        tokenizer: its own template is used if none is chosen and it has one.
        chosen: `None`, the name of a built-in one (`plain`, `chatml`), `"none"` to use no template
            even if the tokenizer has one, the path of a file, or the Jinja text.
        starts: whether the tokenizer puts BOS before texts; a built-in template then does too.

    Raises:
        ValueError: if `chosen` is none of these.
    """
    if chosen is None:
        if tokenizer.chat_template is None:
            return None
        own = tokenizer.get_chat_template()
        return Template("the tokenizer's", None, bool(_MARKED.search(own)))
    if chosen == "none":
        return None
    if chosen in BUILT_IN:
        bos = "{{ bos_token }}" if starts else ""
        return Template(chosen, bos + _TOOLS + BUILT_IN[chosen], False)
    name, text = "given", chosen
    if "{" not in chosen:
        path = Path(chosen).expanduser()
        if not path.is_file():
            names = [*BUILT_IN, "none"]
            raise ValueError(
                f"`chat_template={chosen!r}` is no file, no Jinja text (it has no braces), and "
                f"none of {listing(names)}.{nearest(chosen, names)}"
            )
        name, text = path.name, path.read_text(encoding="utf-8")
    _parse(name, text)
    return Template(name, text, bool(_MARKED.search(text)))


def _parse(name: str, text: str) -> None:
    """Syntax errors of a template, before any row is read."""
    import jinja2

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template ({name}), line {error.lineno}, is not valid Jinja: {error}. Mend "
            f"it, or use a built-in one: {listing(BUILT_IN)}."
        ) from error


def roles_of(train_on: str | Collection[str]) -> frozenset[str] | None:
    """The roles that `train_on` means; None for all.

    Example:
        >>> roles_of("all") is None, sorted(roles_of({"assistant", "tool"}))
        (True, ['assistant', 'tool'])
    """
    if train_on == "all":
        return None
    if train_on == "completion":
        return COMPLETION
    if isinstance(train_on, str) or not train_on:
        words = ("completion", "all")
        raise ValueError(
            f"`train_on={train_on!r}` is none of {listing(words)}, nor a set of roles."
            f"{nearest(str(train_on), words)} For roles type, for example, "
            '`train_on={"assistant", "tool"}`.'
        )
    return frozenset(train_on)


def check_roles(asked: frozenset[str] | None, seen: Collection[str], where: str) -> None:
    """Refuses roles to train on that no row has."""
    absent = sorted((asked or frozenset()) - set(seen))
    if absent and asked != COMPLETION:
        raise ValueError(
            f"`train_on` names {listing(absent)}, and no row of {where} has "
            f"{'that role' if len(absent) == 1 else 'those roles'}: there are "
            f"{listing(sorted(set(seen) - {DOCUMENT}))}.{nearest(absent[0], seen)} Leave it out to "
            "train on completions."
        )


def as_list(row: Row, column: str) -> list[dict[str, Any]]:
    """A column that is a list of objects, or its JSON text; null entries of objects are dropped."""
    value = row.values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise row.error(column, f"as a text it must be JSON ({error})") from error
    if not isinstance(value, list) or not value:
        raise row.error(column, "it must be a list of objects, at least one")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise row.error(column, f"entry {number} is {kind_of(item)}, and must be an object")
    return [_dense(item) for item in value]


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The functions a conversation may call, in the form that templates take."""
    value = row.values.get("tools")
    return as_list(row, "tools") if value not in (None, "", [], "[]") else None


def messages_of(row: Row, column: str) -> list[dict[str, Any]]:
    """The column's messages, checked and in the form that templates take."""
    return [_message(row, column, i, item) for i, item in enumerate(as_list(row, column))]


def _message(row: Row, column: str, number: int, item: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(item.get("role"), str):
        raise row.error(
            column, f"message {number}, {excerpt(item)}, must have a `role` such as `user`"
        )
    made = dict(item)
    content = item.get("content", "" if item.get("tool_calls") else None)
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = None if None in parts else "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise row.error(column, f"message {number}, {excerpt(item)}, must have a text as `content`")
    made["content"] = content
    if item.get("tool_calls"):
        made["tool_calls"] = [_called(row, column, number, call) for call in item["tool_calls"]]
    return made


def _called(row: Row, column: str, number: int, call: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object (OpenAI's files hold them as JSON text)."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise row.error(
            column,
            f"message {number} has the tool call {excerpt(call)}, which must be like "
            '{"function": {"name": "f", "arguments": {}}}',
        )
    return {**call, "function": {**function, "arguments": arguments}, "type": "function"}


def _dense(value: Any) -> Any:
    """Without the nulls that Arrow fills in for keys another object of the column has."""
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items() if item is not None}
    return [_dense(item) for item in value] if isinstance(value, list) else value
