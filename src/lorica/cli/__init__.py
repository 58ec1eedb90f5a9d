"""The command line: one file per command, found by walking this folder.

A command's file holds `Options` (a dataclass that inherits `VerbOptions`) and `run(options) ->
Outcome`. The first line of its docstring is its line in `lorica --help`. Heavy packages are
imported inside `run`, so `--help` and a misspelt option answer at once.

Exit status: 0 success, 1 failure, 2 wrong usage, 128 + the signal's number if a signal stopped the
command (130 after Ctrl-C, 143 after SIGTERM). With `--json`, standard output holds one JSON object
and nothing else (`{"error": ...}` after a failure); progress and logs go to standard error.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import pkgutil
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from lorica import __version__
from lorica.cli._outcome import as_json, write
from lorica.cli._parse import parse
from lorica.run.options import UsageError
from lorica.run.stopping import Stopped, terminable
from lorica.text import Styled, clear_errors, cut, nearest, no_memory, printable

__all__ = ["main", "verbs"]


def verbs() -> tuple[str, ...]:
    """The verbs there are, in alphabetical order, without importing them."""
    found = (info.name for info in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    Args:
        argv: the words after `lorica`. Default: those of this process.

    Example:
        >>> from lorica.cli import main
        >>> main(["--version"])
        lorica 0.1.0
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _spelt_out():
            status = _verb(words)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except (OSError, _Unheard) as error:
        # What is left to write goes nowhere, instead of failing again at the end of the process.
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        cause = error.__cause__ or error
        if not isinstance(cause, BrokenPipeError):  # `lorica methods | head`
            why = getattr(cause, "strerror", None) or cause
            with contextlib.suppress(OSError):
                print(
                    f"lorica: standard output cannot be written to ({why}), so the result was not"
                    " said; send it to a place that takes it",
                    file=sys.stderr,
                )
        return 1


class _Unheard(Exception):
    """Standard output did not take what a verb has to say; the cause tells why."""


def _verb(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lorica {__version__}")
        return 0
    wants_json = "--json" in words
    smaller = ""
    try:
        if words[0] not in verbs():
            raise UsageError(
                f"`{words[0]}` is no verb of lorica; the verbs: {', '.join(verbs())}."
                + nearest(words[0], verbs())
            )
        verb: Any = importlib.import_module(f"{__name__}.{words[0]}")
        with clear_errors():
            options = parse(verb.Options, words[1:], prog=f"lorica {words[0]}")
        smaller = options.smaller
        with _logging(), _clean_stdout(), terminable(), clear_errors():
            outcome = verb.run(options)
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            try:
                write(outcome, json=options.json)
                if sys.stdout is not None:
                    sys.stdout.flush()
            except OSError as error:
                raise _Unheard from error
    except _Unheard:
        raise
    except Stopped as stop:
        return _failed(str(stop), 128 + stop.number, wants_json)
    except SystemExit as stop:  # the parser's own answers: help (0) or an error it has printed (2)
        status = stop.code if isinstance(stop.code, int) else 2
        if status and wants_json:
            print(as_json({"error": "wrong usage, see standard error", "status": status}))
        return status
    except KeyboardInterrupt:
        return _failed("interrupted", 128 + signal.SIGINT, wants_json)
    except Exception as error:
        if os.environ.get("LORICA_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        told = _message(error, smaller)
        return _failed(told, 2 if isinstance(error, UsageError) else 1, wants_json)
    return outcome.status


def _overview() -> str:
    lines = ["usage: lorica VERB [OPTIONS]", "", __doc_line__, ""]
    for name in verbs():
        # The summary is read from the source: importing every verb would cost time.
        spec = importlib.util.find_spec(f"{__name__}.{name}")
        assert spec is not None and spec.origin is not None
        with open(spec.origin, encoding="utf-8") as file:
            summary = file.readline().strip().strip('"').rstrip(".")
        lines.append(f"  {name:<10}{summary}")
    lines += ["", "`lorica VERB --help` lists a verb's options. LORICA_DEBUG=1 shows tracebacks."]
    return "\n".join(lines)


__doc_line__ = "Train transformers through low-rank updates: methods that compose."


def _failed(message: str, status: int, wants_json: bool) -> int:
    message = cut(message)
    print(f"lorica: {message}", file=sys.stderr)
    if wants_json and os.environ.get("RANK", "0") == "0":
        print(as_json({"error": message, "status": status}))
    return status


def as_flags(message: str) -> str:
    """A message of the library with its arguments as they are typed on the command line.

    Example:
        >>> as_flags("Type `shape='text'` or `columns={'text': 'review', 'label': 'stars'}`.")
        'Type `--shape text` or `--columns text=review label=stars`.'
    """
    return _ARGUMENT.sub(_as_flag, message)


_ARGUMENT = re.compile(
    r"`(chat_template|columns|header|max_lost_text|packing|shape|task|train_on|txt_split)=([^`]+)`"
)


def _as_flag(found: re.Match[str]) -> str:
    try:
        value = ast.literal_eval(found[2])
    except (ValueError, SyntaxError):  # not an argument that can be typed
        return found[0]
    if isinstance(value, dict):
        words = [f"{key}={name}" for key, name in value.items()]
    elif isinstance(value, (list, tuple, set)):
        words = [str(part) for part in (sorted(value) if isinstance(value, set) else value)]
    else:
        words = [str(value)]
    name = "documents" if found[1] == "txt_split" else found[1]
    return f"`--{name.replace('_', '-')} {shlex.join(words)}`"


def _message(error: Exception, smaller: str) -> str:
    """One message for people: our own errors as they are, others with their kind."""
    if smaller and no_memory(error):
        why = (str(error) or type(error).__name__).splitlines()[0]
        return f"memory ran out: {why}. Free some, or {smaller} (LORICA_DEBUG=1 shows where)"
    if isinstance(error, (ValueError, OSError)) and str(error):
        return as_flags(str(error))
    return f"{type(error).__name__}: {error} (LORICA_DEBUG=1 shows where)"


class _Printable(logging.Formatter):
    """Messages may quote data; `Styled` ones have been made printable already."""

    def format(self, record: logging.LogRecord) -> str:
        styled = isinstance(record.msg, Styled) and not record.args
        return record.msg if styled else printable(super().format(record))


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Lorica's own messages go to standard error, as they are."""
    logger = logging.getLogger("lorica")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def _spelt_out() -> Iterator[None]:
    """A character that standard output's encoding lacks becomes `\\u0394`, which is JSON too."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    before = out.errors
    out.reconfigure(errors="lorica.spelt")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            out.reconfigure(errors=before)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("lorica.spelt", _spelt)


@contextlib.contextmanager
def _clean_stdout() -> Iterator[None]:
    """What a library prints while a verb runs goes to standard error, from C too."""
    kept = None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be none
        if sys.stdout.fileno() == 1:
            sys.stdout.flush()
            kept = os.dup(1)
            os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
