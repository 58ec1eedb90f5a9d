"""Generate text with a model: plain, adapted or merged."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from lorica.cli._model import ModelOptions, Source
from lorica.cli._outcome import Outcome
from lorica.run.options import (
    HINT,
    NAMES,
    NUMBER,
    PAIRS,
    PATH,
    TEXT,
    WHOLE,
    Kind,
    UsageError,
)
from lorica.text import printable

if TYPE_CHECKING:
    from lorica.inference.generate import Answer, Decoding, Prompt, Prompter

logger = logging.getLogger("lorica")

EXIT = "/exit"
# What a verb says as it runs goes to standard error, so an answer grows there; it isn't said twice
# where standard output is the same terminal. Asked here: within `run` there is no telling.
_TERMINAL = sys.stdout is not None and sys.stdout.isatty()
_TEXTS = Kind("TEXT ...", tuple, nargs="*")  # as they are: a comma or a space may be one
_STDOUT = re.compile(r"/dev/stdout|/(dev|proc/self)/fd/1")
_HANDED = re.compile(r"/dev/std\w+|/(dev|proc/\w+)/fd/.*")  # names of what is open already
_EACH = tyro.conf.arg(help_behavior_hint="(may be given again)")


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Generate answers to a prompt, to the prompts of a data file, or in a chat.

    A single answer to `--prompt` is shown while it is generated. `--file` writes one line of JSON
    per answer, with the prompt, the completion, and the file's own answer as a reference.

    Args:
        prompt: text to continue; with `chat_template`, the user's message.
        file: data file with prompts (answers are optional), a .txt file with one prompt per
            line, or embedded tasks (`lorica:new`). The prompts are built as in training.
        chat: a conversation: each line of standard input is a message, and `/exit` ends it.
        output: write the JSON lines of `file` here instead of to standard output.
        merged: merge the adapter into the base before generating.
        stream: show a single answer while it is generated, if standard error is a terminal.
        max_new_tokens: maximum tokens per answer. Default: 256, or what the model has room for.
        do_sample: sample, which temperature, top_k and top_p also switch on. Otherwise the most
            likely token is taken.
        temperature: divides the logits. Default: 1.
        top_k: sample from this many most likely tokens; 0 means all. Default: 50.
        top_p: sample from the most likely tokens whose probabilities add up to this. Default:
            1.
        repetition_penalty: values above 1 make tokens that have already appeared less likely.
            Default: 1.
        num_beams: width of a beam search.
        num_return_sequences: answers per prompt.
        stop_strings: an answer ends before the first of these strings.
        seed: seed for sampling.
        chat_template: `plain`, `chatml`, a file, Jinja text, or `none`. Default: the
            tokenizer's template.
        batch_size: prompts per batch.
        columns: rename columns of the file, e.g. `prompt=question` if the prompts are in
            `question`.
        header: column names for a csv or tsv file without a header line; `_` drops a column.
        max_samples: answer at most this many prompts of the file, the first ones.
    """

    prompt: Annotated[tuple[Annotated[str, TEXT], ...], tyro.conf.UseAppendAction, _EACH] = ()
    file: Annotated[str | None, PATH, HINT] = None
    chat: bool = False
    output: Annotated[str | None, PATH, HINT] = None
    merged: bool = False
    stream: bool = True
    max_new_tokens: Annotated[int | None, WHOLE, HINT] = None
    do_sample: bool = False
    temperature: Annotated[float | None, NUMBER, HINT] = None
    top_k: Annotated[int | None, WHOLE, HINT] = None
    top_p: Annotated[float | None, NUMBER, HINT] = None
    repetition_penalty: Annotated[float | None, NUMBER, HINT] = None
    num_beams: Annotated[int, WHOLE, HINT] = 1
    num_return_sequences: Annotated[int, WHOLE, HINT] = 1
    stop_strings: Annotated[tuple[str, ...], _TEXTS, HINT] = ()
    seed: Annotated[int, WHOLE, HINT] = 42
    chat_template: Annotated[str | None, TEXT, HINT] = None
    batch_size: Annotated[int, WHOLE, HINT] = 8
    columns: Annotated[dict[str, str] | None, PAIRS, HINT] = None
    header: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    max_samples: Annotated[int | None, WHOLE, HINT] = None

    smaller: ClassVar[str] = (
        "type a smaller `--batch-size`, `--num-return-sequences`, `--num-beams` or"
        " `--max-new-tokens`"
    )

    def check(self) -> None:
        """What can be told from the options alone.

        Raises:
            UsageError: no prompt, or two sources of them; an option without effect.
        """
        given = {"prompt": bool(self.prompt), "file": self.file is not None, "chat": self.chat}
        named = [f"`--{name}`" for name, is_given in given.items() if is_given]
        if len(named) != 1:
            raise UsageError(
                f"{' and '.join(named) or 'nothing to answer'} was given: prompts come from one of"
                " `--prompt TEXT`, `--file FILE` and `--chat`"
            )
        for name in ("output", "columns", "header", "max_samples"):
            if getattr(self, name) is not None and self.file is None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"`{flag}` has no effect without `--file`; leave it out")
        for name in ("merged", "ignore_base_hash"):
            if getattr(self, name) and self.adapter is None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"`{flag}` has no effect without `--adapter`; leave it out")
        for name in ("batch_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"`{flag} {value}`: it is a whole number of at least 1")
        if self.chat and self.num_return_sequences > 1:
            raise UsageError(
                f"`--num-return-sequences {self.num_return_sequences}`: a conversation goes on from"
                " one answer; leave it out"
            )


def run(options: Options) -> Outcome:
    options.check()
    from lorica.inference.generate import Decoding, Prompter, language_task

    names = Decoding.__dataclass_fields__
    try:
        decoding = Decoding(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UsageError(str(error)) from None
    source = options.source()
    ask = Prompter(source.tokenizer, language_task(source.config), options.chat_template)
    work = _Work(options, source, ask, decoding)
    if options.chat:
        return work.chat()
    return work.texts() if options.prompt else work.file()


@dataclass(frozen=True)
class _Work:
    options: Options
    source: Source
    ask: Prompter
    decoding: Decoding

    # -- prompts given on the command line ---------------------------------------------------------

    def texts(self) -> Outcome:
        texts = list(self.options.prompt)
        if self.options.chat_template in (None, "none"):
            prompts = self.ask.texts(texts, [f"`--prompt {text}`" for text in texts])
        else:
            prompts = [self.ask.messages([_turn("user", text)], text) for text in texts]
        alone = len(texts) == self.decoding.num_return_sequences == 1
        live = alone and self._live()
        answers = self.answer(prompts, _say if live else None)
        data = self._data(prompts, answers)
        if live:
            _say("\n")
            if _TERMINAL:
                return Outcome(data)
        if len(texts) == self.decoding.num_return_sequences == 1:
            return Outcome(data, (answers[0][0].text,))
        shown = [
            f"> {text}\n{answer.text}\n"
            for text, several in zip(texts, answers, strict=True)
            for answer in several
        ]
        return Outcome(data, tuple(shown))

    def _live(self) -> bool:
        """Whether there is somebody to see an answer grow. Beams only show at their end."""
        options = self.options
        wanted = options.stream and not options.json and self.decoding.num_beams == 1
        return wanted and sys.stderr.isatty()

    # -- a data file -------------------------------------------------------------------------------

    def file(self) -> Outcome:
        from lorica.cli._model import chosen_data
        from lorica.data import read
        from lorica.data.formats import suffix_of

        options = self.options
        file, split = chosen_data(options.file, None)
        named = options.columns is not None or options.header is not None
        lines = suffix_of(Path(file))[0] == ".txt" and not named
        dataset = read(
            file,
            split=split,
            columns=options.columns,
            header=options.header,
            max_samples=options.max_samples,
            txt_split="line" if lines else None,
        )
        if lines:
            prompts = self.ask.texts(dataset["text"], dataset["__where__"])
        else:
            prompts = self.ask.rows(dataset)
        if options.output is None:
            data = self._data(prompts, self.answer(prompts))
            return Outcome(data, tuple(_rows(data)))
        path = Path(os.path.expanduser(options.output))
        with _place(path) as write:
            answers = self.answer(prompts)
            data = self._data(prompts, answers)
            rows = _rows(data)
            write("".join(row + "\n" for row in rows))
        done = sum(answer.finished for several in answers for answer in several)
        return Outcome(
            {**data, "output": str(path)},
            (f"{len(rows):,} answers ({done:,} finished) written to {path}",),
        )

    # -- a conversation ----------------------------------------------------------------------------

    def chat(self) -> Outcome:
        self.ask.messages([_turn("user", "?")])  # no template: said before anything is loaded
        model = self._model()
        messages: list[dict[str, Any]] = []
        said: list[str] = []
        live = self._live()
        for text in _turns():
            messages.append(_turn("user", text))
            prompt = self.ask.messages(messages, f"turn {len(messages)} of the conversation")
            [[answer]] = self._generate(model, [prompt], _say if live else None)
            said.append(answer.text.strip())
            messages.append(_turn("assistant", said[-1]))
            if live:
                _say("\n")
            elif sys.stderr.isatty() and not self.options.json:
                _say(said[-1] + "\n")
        shown = () if _TERMINAL and sys.stderr.isatty() else tuple(said)
        return Outcome({**self._about(), "messages": messages}, shown)

    # -- answers -----------------------------------------------------------------------------------

    def _model(self) -> Any:
        options = self.options
        return self.source.load(
            self.ask.task,
            dtype=options.dtype,
            check_base=not options.ignore_base_hash,
            merged=options.merged,
            quantization=options.quantization_config(),
        ).model

    def answer(self, prompts: list[Prompt], on_text: Any = None) -> list[list[Answer]]:
        return self._generate(self._model(), prompts, on_text)

    def _generate(self, model: Any, prompts: list[Prompt], on_text: Any) -> list[list[Answer]]:
        from lorica.cli._model import progress
        from lorica.data.fidelity import LIMIT, text_loss
        from lorica.inference.generate import generate

        loss = text_loss(self.source.tokenizer, (prompt.text for prompt in prompts))
        if loss.share > LIMIT:
            logger.warning(f"the tokenizer loses {loss}: the model does not see them")
        return generate(
            model,
            self.source.tokenizer,
            prompts,
            self.decoding,
            batch_size=self.options.batch_size,
            on_text=on_text,
            on_batch=progress("answers") if len(prompts) > self.options.batch_size else None,
        )

    def _about(self) -> dict[str, Any]:
        adapter = self.source.adapter
        return {
            "model": self.source.model,
            "adapter": None if adapter is None else str(adapter),
            "merged": self.options.merged,
        }

    def _data(self, prompts: list[Prompt], answers: list[list[Answer]]) -> dict[str, Any]:
        rows = [
            {
                "prompt": prompt.text,
                "completion": answer.text,
                **({} if prompt.reference is None else {"reference": prompt.reference}),
                "tokens": len(answer.ids),
                "stopped": answer.stopped,
            }
            for prompt, several in zip(prompts, answers, strict=True)
            for answer in several
        ]
        return {**self._about(), "answers": rows}


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _say(text: str) -> None:
    """To the person at the terminal, at once."""
    sys.stderr.write(printable(text))
    sys.stderr.flush()


def _turns() -> Iterator[str]:
    """The user's turns: lines of standard input that aren't blank."""
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    while True:
        if asks:
            _say("> ")
        line = sys.stdin.readline()
        if not line or line.strip() == EXIT:
            if asks and not line:
                _say("\n")
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _rows(data: dict[str, Any]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in data["answers"]]


@contextlib.contextmanager
def _place(path: Path) -> Iterator[Callable[[str], None]]:
    """What writes a text to `path`. That it can is found out first, before an hour of answers.

    Raises:
        UsageError: it can't.
    """
    if _STDOUT.fullmatch(str(path)):
        raise UsageError(
            f"`--output {path}`: without `--output` the answers go to standard output; leave it out"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"`--output {path}` "
            + ("is a folder" if path.is_dir() else f"lies in {path.parent}, which does not exist")
            + "; name a file in a folder that is there"
        )
    try:
        handle = _opened(path)
    except OSError as error:
        if error.errno == errno.ENXIO:
            why = "nobody reads from it; start what reads it before this"
        else:
            why = f"{error.strerror}; name a file in a folder that you may write to"
        raise UsageError(f"`--output {path}` cannot be written: {why}") from None
    try:
        yield partial(_write, path, handle)
    finally:
        if handle is not None:
            os.close(handle)


def _opened(path: Path) -> int | None:
    """A handle of what is written straight into: pipes and devices, which are never replaced, and a
    file whose folder takes no other. None: `path` is replaced by a finished file, as it can be."""
    if _HANDED.fullmatch(str(path)) or (path.exists() and not path.is_file()):
        # Not waiting: a pipe that nobody reads from would be waited for without end.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        os.set_blocking(handle, True)
        return handle
    aside = _aside(path)
    try:
        aside.touch(exist_ok=False)
        aside.unlink()
    except OSError:
        if not path.is_file():
            raise
        return os.open(path, os.O_WRONLY)
    return None


def _aside(path: Path) -> Path:
    """Beside the file itself, where `path` is a link to it."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name[:40]}.{os.getpid()}.unfinished")


def _write(path: Path, handle: int | None, text: str) -> None:
    """A file is whole or as it was, wherever it can be replaced."""
    data = text.encode("utf-8", "backslashreplace")  # half a surrogate pair, as JSON writes it
    try:
        if handle is None:
            _replace(Path(os.path.realpath(path)), _aside(path), data)
            return
        if stat.S_ISREG(os.fstat(handle).st_mode) and not _HANDED.fullmatch(str(path)):
            os.ftruncate(handle, 0)
        with open(handle, "wb", closefd=False) as file:
            file.write(data)
    except OSError as error:
        raise OSError(
            f"the answers could not be written to {path}: {error.strerror}; name another file with"
            " `--output`, or leave it out"
        ) from None


def _replace(path: Path, aside: Path, data: bytes) -> None:
    try:
        aside.write_bytes(data)
        try:
            aside.replace(path)
        except OSError:  # a file that is mounted there by itself, as containers have it
            path.write_bytes(data)
    finally:
        aside.unlink(missing_ok=True)
