"""Chat templates: from messages to text, and which of it is trained.

What is trained of a turn is found by rendering the conversation up to it: the text before an
assistant's turn (with the generation prompt, as when generating) is the start of the text that has
the turn, and the turn is what comes after. So the model is trained on what it will be asked for.

Many templates write earlier turns differently once later ones follow: they drop the reasoning, or
an end mark. Such a conversation becomes several examples, each with the text that generation would
see at its turns. A template that marks the assistant's part with `{% generation %}` decides by its
marks what is trained of a turn.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, cached_property
from os.path import commonprefix
from pathlib import Path
from string import ascii_letters
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorica.data.bounded import MEMORY, Account, Exceeded, bounded
from lorica.data.samples import ASSISTANT, DOCUMENT, USER, Flag, Piece, Ranges
from lorica.data.turns import READ, REASONING, ROLES
from lorica.data.words import excerpt, listing
from lorica.text import clear_errors, nearest, one_line, shorten, to_path

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
_FLAGS = "-_0^#"  # of strftime's codes: `%-d`
_THINK = "<think>"
_MOST = 10_000_000  # characters of a template, and of a conversation that it has written
_STAND_INS = ("Qx7", "Zk9")  # contents that share no beginning and no end

COMPLETION = frozenset({ASSISTANT})


@dataclass(frozen=True)
class Template:
    """A chat template: `text=None` is the tokenizer's own."""

    name: str
    text: str | None
    marked: bool  # has {% generation %} blocks


@dataclass(frozen=True)
class Format:
    """How examples become pieces for one tokenizer.

    Attributes:
        tokenizer: the model's.
        template: of conversations, or None.
        roles: those trained; None for all.
        start: what the tokenizer puts before every text (BOS), or nothing.
        now: the time that templates print. Default: the clock's.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    roles: frozenset[str] | None
    start: tuple[int, ...]
    now: datetime | None = None

    def trains(self, role: str) -> bool:
        return self.roles is None or role in self.roles

    # -- begin and end ---------------------------------------------------------------------------

    def begin(self, text: str) -> Piece:
        """What the tokenizer puts before every text, unless the text begins with it."""
        mark = self._start_text
        return Piece(False, ids=() if mark and text.startswith(mark) else self.start)

    def end(self, trained: bool, text: str) -> Piece:
        """EOS after `text`, unless the tokenizer has none or the text ends with it."""
        eos, mark = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        if not isinstance(eos, int) or (mark and text.endswith(str(mark))):
            return Piece(trained)
        return Piece(trained, ids=(eos,))

    def bare(self, text: str, *, start: bool = True, end: bool = True) -> str:
        """The text without the white space before a BOS and after an EOS of its own."""
        mark = self._start_text
        if start and mark and text.lstrip().startswith(mark):
            text = text.lstrip()
        eos = self.tokenizer.eos_token
        if end and eos and text.rstrip().endswith(str(eos)):
            text = text.rstrip()
        return text

    def within(self, text: str) -> str:
        """A turn in a plain format without a BOS that one of its texts begins with."""
        mark = self._start_text
        return re.sub(rf"(?<=:[ \n])\s*{re.escape(mark)}\s*", "", text) if mark else text

    @cached_property
    def _start_text(self) -> str:
        return "".join(map(str, self.tokenizer.convert_ids_to_tokens(list(self.start))))

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        return tuple(map(str, self.tokenizer.all_special_tokens))

    @cached_property
    def _ends(self) -> tuple[str, str]:
        """What the template writes before a first user's text, and after an assistant's."""
        user, answer = _STAND_INS
        turns = [{"role": USER, "content": user}, {"role": ASSISTANT, "content": answer}]
        try:
            text = self._text(turns, None, prompt=False)
        except ValueError:  # it wants a conversation of another kind
            return "", ""
        return text.partition(user)[0].strip(), text.rpartition(answer)[2].strip()

    def _undoubled(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages without the begin and end tokens that the template writes itself."""
        head, tail = self._ends
        bos = str(self.tokenizer.bos_token or "")
        made = list(messages)
        first = made[0]["content"].lstrip()
        if bos and head.startswith(bos) and first.startswith(bos):
            made[0] = {**made[0], "content": first.removeprefix(bos).lstrip()}
        mark = next((mark for mark in self._marks if tail.startswith(mark)), "")
        for i, message in enumerate(made):
            said = message["content"].rstrip()
            if mark and message["role"] == ASSISTANT and said.endswith(mark):
                made[i] = {**message, "content": said.removesuffix(mark)}
        return made

    def _spelt(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> list[dict[str, Any]]:
        """The messages with the arguments of calls as the template takes them: most want mappings,
        some, such as DeepSeek's, JSON text as OpenAI has it."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        texts = [_with_text_arguments(message) for message in messages]
        try:
            self._text(messages, tools, prompt=False)
        except ValueError:
            with contextlib.suppress(ValueError):
                self._text(texts, tools, prompt=False)
                return texts
        return messages

    # -- conversations ---------------------------------------------------------------------------

    def whole(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[Piece]:
        """A conversation in one piece, all of it trained."""
        messages = self._spelt(self._undoubled(messages), tools)
        text = self._text(messages, tools, prompt=False)
        self._check_written(messages, tools, text)
        done = text.rstrip()
        if not done.endswith(self._marks):
            last = self.end(True, text) if messages[-1]["role"] == ASSISTANT else Piece(True)
            return [Piece(True, text=text), last]
        return [Piece(True, text=done), Piece(False, text=text[len(done) :])]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        trained_from: int,
        flags: tuple[Flag, ...] = (),
    ) -> list[list[Piece]]:
        """The examples of a conversation; none where no turn of it is trained.

        Args:
            messages, tools: as templates take them.
            trained_from: every message before it is a prompt.
            flags: what each message says of itself; a flag outranks its role.

        Raises:
            ValueError: no template, one that refuses the messages or leaves out a part of them, or
                one whose generation prompt doesn't fit the turn.
        """
        if self.roles is None and all(flag is None or flag is True for flag in flags):
            return [self.whole(messages, tools)]
        messages = self._spelt(self._undoubled(messages), tools)
        whole = self._text(messages, tools, prompt=False)
        self._check_written(messages, tools, whole)
        said = flags or (None,) * len(messages)
        stretches = {i: flag for i, flag in enumerate(said) if isinstance(flag, tuple)}
        wanted = {
            i
            for i, (message, flag) in enumerate(zip(messages, said, strict=True))
            if (flag if flag is not None else i >= trained_from and self.trains(message["role"]))
        }
        examples, done = self._chain(messages, tools, wanted, stretches)
        if not examples:
            return []
        tail = whole[len(done) :] if whole.startswith(done) else ""
        last = max(wanted) == len(messages) - 1
        if last and not tail and not self._template.marked and not done.endswith(self._marks):
            examples[-1].append(self.end(True, done))
        if tail:
            examples[-1].append(Piece(False, text=tail))
        return examples

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[Piece]:
        """A conversation up to the assistant's next turn, with the seams that training has."""
        messages = self._spelt(self._undoubled(messages), tools)
        whole = self._text(messages, tools, prompt=True)
        spoken = {i for i, message in enumerate(messages) if message["role"] == ASSISTANT}
        try:
            examples, done = self._chain(messages, tools, spoken)
        except ValueError:  # an earlier turn that could not be trained can still be read
            examples, done = [], ""
        if not examples or not whole.startswith(done):
            return [Piece(False, text=whole)]
        before = [replace(piece, trained=False) for piece in examples[-1]]
        return [*before, Piece(False, text=whole[len(done) :])]

    def behind(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        """What the template writes after an assistant's turn that follows these messages."""
        answer = _STAND_INS[1]
        turns = [*self._undoubled(messages), {"role": ASSISTANT, "content": answer}]
        text = self._text(turns, tools, prompt=False)
        return text.rpartition(answer)[2] if answer in text else ""

    def _chain(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        wanted: Collection[int],
        stretches: Mapping[int, Ranges] = MappingProxyType({}),
    ) -> tuple[list[list[Piece]], str]:
        """The examples that train these messages, and the text of the last one.

        A turn joins the example before it where the text that generation would see at that turn
        begins with that example; else it begins a new one.
        """
        examples: list[list[Piece]] = [[]]
        done = ""
        for i, message in enumerate(messages):
            if i not in wanted and message["role"] != ASSISTANT:
                continue
            try:
                before, parts = self._turn(messages, tools, i)
            except ValueError:
                if i in wanted:
                    raise
                continue  # the template can't take it apart, and nothing of it is trained
            if not before.startswith(done):
                if not self._template.marked and not done.endswith(self._marks):
                    examples[-1].append(self.end(examples[-1][-1].trained, done))
                examples.append([])
                done = ""
            examples[-1].append(Piece(False, text=before[len(done) :]))
            if i in wanted and i in stretches:
                examples[-1] += self._in_part(messages, tools, i, parts, stretches[i])
            else:
                examples[-1] += [Piece(i in wanted and own, text=text) for text, own in parts]
            done = before + "".join(text for text, _ in parts)
        return [pieces for pieces in examples if any(piece.trained for piece in pieces)], done

    def _turn(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, i: int
    ) -> tuple[str, list[tuple[str, bool]]]:
        """The text before a turn, and the parts of the turn with whether they are its own."""
        after = self._text(messages[: i + 1], tools, prompt=False)
        if messages[i]["role"] != ASSISTANT or self.roles is None:
            before = self._text(messages[:i], tools, prompt=False)
            if not after.startswith(before):
                raise self._misfit(i, before, after)
        else:
            if self._template.marked and (marked := self._by_marks(messages, tools, i)):
                return marked
            before = self._before(messages, tools, i)
            after = self._with_thinking(messages, tools, i, before, after)
        own = after[len(before) :]
        if own.rstrip().endswith(self._marks):  # generation ends there
            own = own.rstrip()
        return before, [(own, True)]

    def _in_part(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        i: int,
        parts: list[tuple[str, bool]],
        ranges: Ranges,
    ) -> list[Piece]:
        """A turn of which stretches of its content are trained, and what ends it.

        Raises:
            ValueError: the template doesn't write the content as it is.
        """
        own = "".join(text for text, _ in parts)
        said = messages[i]["content"]
        content = said if said in own else said.strip()
        ahead = len(said) - len(said.lstrip()) if content != said else 0
        behind = self.behind(messages[:i], tools).rstrip()
        at = len(own.rstrip()) - len(behind) - len(content)
        if not own.startswith(content + behind, max(at, 0)):
            at = own.find(content) if own.count(content) == 1 else -1
        if at < 0:
            raise ValueError(
                f"the chat template ({self._template.name}) doesn't write the content of message "
                f"{i}, {excerpt(said)}, as it is, so the stretches of its `train_detail` can't be "
                'found. Use another template (`chat_template="chatml"`), or say `"train": true`.'
            )
        shift, last = at - ahead, at + len(content)
        wanted = [(max(a + shift, at), min(b + shift, last)) for a, b in ranges]
        wanted = [(a, b) for a, b in wanted if a < b]
        if wanted and last < len(own):
            wanted.append((last, len(own)))
        pieces, first = [], 0
        for text, trains in parts:
            inside = ((max(a - first, 0), min(b - first, len(text))) for a, b in wanted)
            kept = tuple((a, b) for a, b in inside if a < b) if trains else ()
            pieces.append(Piece(bool(kept), text=text, ranges=kept or None))
            first += len(text)
        return pieces

    def _before(self, messages: list[dict[str, Any]], tools: list[Any] | None, i: int) -> str:
        """The text that generation sees before an assistant's turn."""
        if i:
            try:
                return self._text(messages[:i], tools, prompt=True)
            except ValueError:  # e.g. a system message alone
                pass
        turns = ([*messages[:i], {"role": ASSISTANT, "content": word}] for word in _STAND_INS)
        return commonprefix([self._text(each, tools, prompt=False) for each in turns])

    def _with_thinking(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        i: int,
        before: str,
        after: str,
    ) -> str:
        """The text with the turn as generation would write it.

        Some templates cut the reasoning out of a turn, and some begin it in the generation prompt.
        The content has all of it, so the turn is what the content says behind that prompt.

        Raises:
            ValueError: the generation prompt and the turn don't fit each other, or the template
                leaves out the turn's content.
        """
        content = messages[i]["content"].strip()
        shared = commonprefix([before, after])
        begun = before[len(shared) :]  # what the prompt has and the rendered turn lacks
        closed = begun.strip().endswith("</think>") or not begun.strip()
        if not content:
            if not closed:
                raise self._misfit(i, before, after)
            return before + after[len(shared) :]
        if before.rstrip().endswith(_THINK) and after[len(shared) :].count(_THINK) > 0:
            begun = _THINK + before.rpartition(_THINK)[2]  # written twice: by the prompt, too
        shown, answer = after[len(shared) :], content.rpartition("</think>")[2].strip()
        thought = content.partition("</think>")[0].removeprefix("<think>").strip()
        cut_out = "</think>" in content and thought not in shown and _in(answer, shown)
        if cut_out or (begun.strip() and content.startswith(begun.strip())):
            rest = content.removeprefix(begun.strip()) if begun else content
            rest = rest.removeprefix("\n") if begun.endswith("\n") else rest
            return before + rest + self.behind(messages[:i], tools)
        if begun and not (closed and _in(content, shown)):
            raise self._misfit(i, before, after)
        if not _in(content, shown) and not _in(answer, shown):
            raise ValueError(
                f"the chat template ({self._template.name}) leaves out the content of message {i}, "
                f"{excerpt(content)}, and nothing of it would be trained. Use another template "
                '(`chat_template="chatml"`), or take the content out.'
            )
        return before + shown

    def _by_marks(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, i: int
    ) -> tuple[str, list[tuple[str, bool]]] | None:
        """As `_turn`, by the template's {% generation %} marks; None where it marks nothing."""
        text, spans = self._spans(messages[: i + 1], tools)
        earlier = self._spans(messages[:i], tools)[1] if i else []
        spans = [span for span in spans[len(earlier) :] if span[0] < span[1]]
        if not spans:
            return None
        parts: list[tuple[str, bool]] = []
        at = spans[0][0]
        for start, end in spans:
            parts += [(text[at:start], False), (text[start:end], True)]
            at = end
        return text[: spans[0][0]], [(part, own) for part, own in parts if part]

    def _spans(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the (start, end) of what its template marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        marks: dict[str, Any] = dict(self.tokenizer.special_tokens_map)

        def render() -> Any:
            return render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._source(tools),
                return_assistant_tokens_mask=True,
                **marks,
            )

        [texts, spans] = self._guarded(messages, tools, render)
        return texts[0], spans[0]

    def _misfit(self, index: int, before: str, after: str) -> ValueError:
        at = len(commonprefix([before, after]))
        return ValueError(
            f"the chat template ({self._template.name}) renders message {index} in a way that "
            f"changes the text before it: {excerpt(before[at : at + 40])} becomes "
            f"{excerpt(after[at : at + 40])}, so what is trained would not be what generation "
            "sees. Where that is the begin of a thought, write the reasoning into the content "
            "(`<think>...</think>`); else mark the assistant's part in the template with "
            "{% generation %} ... {% endgeneration %}, or use another template "
            '(`chat_template="chatml"`).'
        )

    # -- the template ------------------------------------------------------------------------------

    @property
    def _template(self) -> Template:
        if self.template is None:
            raise ValueError(
                "messages need a chat template, and this tokenizer has none. Give "
                f"`chat_template` as one of {listing(BUILT_IN)}, as a file with a Jinja template, "
                "or as its text."
            )
        return self.template

    @property
    def dated(self) -> bool:
        """Whether the template prints the time."""
        return self.template is not None and "strftime_now" in self._source(None)

    def _check_written(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str
    ) -> None:
        """Refuses what the template would leave out without a word: tools, calls, unknown keys."""
        name = self._template.name
        if tools and self._text(messages, None, prompt=False) == whole:
            raise ValueError(
                f"the chat template ({name}) doesn't write the `tools` of this row. Use one that "
                'does (`chat_template="chatml"`), or drop the column.'
            )
        for i, message in enumerate(messages):
            for key in message.keys() - READ:
                if message[key] in (None, "", [], {}):  # nothing; false and 0 say something
                    continue
                gone = REASONING if key in REASONING else (key,)
                bare = {name: value for name, value in message.items() if name not in gone}
                others = [*messages[:i], bare, *messages[i + 1 :]]
                try:
                    if self._text(others, tools, prompt=False) != whole:
                        continue
                except ValueError:  # the template can't do without it
                    continue
                # A template may write it only until later turns follow.
                upto = (
                    self._text(each[: i + 1], tools, prompt=False) for each in (messages, others)
                )
                if len(set(upto)) == 1:
                    raise ValueError(
                        f"message {i} has the key `{key}` ({excerpt(message[key])}), which the "
                        f"chat template ({name}) doesn't write, and which is no flag: it would be "
                        "lost. Remove it from the data, or use a template that writes it."
                    )

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        if not messages and not prompt:
            return ""

        def render() -> Any:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,  # type: ignore[arg-type]
                chat_template=self._source(tools),
                tokenize=False,
                add_generation_prompt=prompt,
            )

        return str(self._guarded(messages, tools, lambda: [render()])[0])

    def _source(self, tools: list[Any] | None) -> str:
        """The template's text, with a clock of its own where the time is fixed."""
        text = self._template.text
        if text is None:
            text = str(self.tokenizer.get_chat_template(tools=tools))  # type: ignore[arg-type]
        dated = self.now is not None and "strftime_now" in text
        return _clock(self.now) + text if dated and self.now is not None else text

    @cached_property
    def _account(self) -> Account:
        """Of the template, over all conversations."""
        return Account(_MOST)

    def _guarded(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, render: Callable[[], Any]
    ) -> Any:
        """What `render` returns, the text (or a list with it) in front, within bounds."""
        try:
            with self._account.bounded():
                made = render()
            text = made[0] if isinstance(made[0], str) else made[0][0]
            if len(text) > _MOST:
                raise Exceeded(f"its text has {len(text):,} characters")
            text.encode()  # halves of surrogate pairs: no tokenizer takes them
            given = sum(len(str(message.get("content") or "")) for message in messages)
            why = self._account.book(len(text), given, len(messages) + len(tools or ()))
        except Exception as error:  # a template can raise whatever Python does
            made, why = None, _reason(error)
        if why is not None:
            roles = [str(message["role"]) for message in messages]
            raise ValueError(
                f"the chat template ({self._template.name}) refuses the messages of"
                f" {listing(roles)}: {why}. Correct the conversation, give a message that is not"
                ' to be trained `"train": false`, or use another template'
                ' (`chat_template="chatml"`).'
            )
        return made


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls' arguments as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        text = {"arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
        spelt = {**function, **text}
        calls.append({**call, "function": spelt} if "function" in call else spelt)
    return {**message, "tool_calls": calls}


def _reason(error: Exception) -> str:
    """What is wrong with a template that raised this, in one line."""
    import jinja2

    if isinstance(error, Exceeded):
        return str(error)
    if isinstance(error, MemoryError):
        return f"it wants more than {MEMORY >> 20:,} MiB of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without an end"
    if isinstance(error, UnicodeError):
        return "it holds half a surrogate pair, which is no text"
    said = one_line(error, 300)
    return said if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"


def _in(part: str, text: str) -> bool:
    """Whether a text has the part, white space and JSON's escapes aside."""
    bare = "".join(text.split())
    return any("".join(form.split()) in bare for form in (part, json.dumps(part)[1:-1]))


@cache
def _clock(now: datetime) -> str:
    """A macro in the place of the machine's clock, as transformers hands templates no functions.

    It ends in the newline that `trim_blocks` takes away, so the template behind it begins a line.
    """
    codes = [flag + letter for flag in ("", *_FLAGS) for letter in ascii_letters]
    table = {"%%": "%", **{f"%{code}": now.strftime(f"%{code}") for code in codes}}
    return (
        "{% macro strftime_now(format) %}"
        f"{{% set table = {table!r} %}}{{% set s = namespace(text='', code='') %}}"
        "{% for c in format %}"
        "{% if s.code %}{% set s.code = s.code ~ c %}"
        "{% if s.code in table %}{% set s.text = s.text ~ table[s.code] %}{% set s.code = '' %}"
        f"{{% elif c not in '{_FLAGS}' %}}"
        "{% set s.text = s.text ~ s.code %}{% set s.code = '' %}{% endif %}"
        "{% elif c == '%' %}{% set s.code = c %}"
        "{% else %}{% set s.text = s.text ~ c %}{% endif %}"
        "{% endfor %}{{ s.text ~ s.code }}{% endmacro %}\n"
    )


@clear_errors()
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
        path = to_path(chosen)
        if not path.is_file():
            names = [*BUILT_IN, "none"]
            raise ValueError(
                f"`chat_template={shorten(chosen)}` is no file, no Jinja text (it has no braces), "
                f"and none of {listing(names)}.{nearest(chosen, names)}"
            )
        name, text = path.name, _template_file(path)
    _parse(name, text)
    return Template(name, text, bool(_MARKED.search(text)))


def _template_file(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it can't be read, is no UTF-8, or is far longer than any template.
    """
    try:
        if path.stat().st_size > _MOST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, of {_MOST:,} at most")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        why = "it is no UTF-8 text" if isinstance(error, UnicodeError) else why
        raise ValueError(
            f"cannot read the chat template {path}: {why}. Name a file with a Jinja template, or a"
            f" built-in one: {listing(BUILT_IN)}."
        ) from None


def _parse(name: str, text: str) -> None:
    """Syntax errors of a template, before any row is read."""
    import jinja2

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    where = ""
    try:
        with bounded():
            plain.encode()
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        return
    except jinja2.TemplateSyntaxError as error:
        where, why = f", line {error.lineno},", one_line(error, 300)
    except Exception as error:  # as in rendering it
        why = _reason(error)
    raise ValueError(
        f"The chat template ({name}){where} is not valid Jinja: {why}. Correct it, or use a"
        f" built-in one: {listing(BUILT_IN)}."
    )


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
    return frozenset(ROLES.get(role, role) for role in train_on)


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


def check_spoken(asked: frozenset[str] | None, seen: Collection[str], where: str) -> None:
    """Says which roles there are, where no turn of any row is trained."""
    if asked is not None and not asked & set(seen):
        found = sorted(set(seen) - {DOCUMENT})
        raise ValueError(
            f"No message of {where} is one of {listing(sorted(asked))}, so none is trained: the "
            f"roles found are {listing(found)}. Name those to train on, "
            f"`train_on={{{', '.join(map(repr, found[:1]))}}}`, or correct the roles in the data."
        )
