# pyright: strict
"""Regular expressions from any source, matched in bounded time.

Python's matcher cannot be stopped, and it takes `(\\w|.)+!` years to find that a name of 60
characters does not end in `!`. So only a plain name, in which nothing repeats, is matched here;
everything else is matched by a process of its own, which the operating system ends. An engine that
takes linear time would need a second path for lookaheads and back-references, which PEFT's files
have.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from lorica.text import shorten

Groups = Sequence[str | None]
"""Of a match: all of it, then its groups."""

PATIENCE = 5.0  # seconds of processor time; an honest pattern takes microseconds a name
LONGEST = 1_000_000  # characters of a pattern; Python compiles half a million a second
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\\.)*\$?")
_CHILD = """
import json, re, signal, sys
expressions, texts, how, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):  # not on Windows
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; its signal has no handler
def groups(match):
    return match and [match[0], *match.groups()]
def last(expression, text):
    match = None
    for match in expression.finditer(text):
        pass
    return match
found = []
for expression in map(re.compile, expressions):
    one = {"last": lambda t: last(expression, t)}.get(how) or getattr(expression, how, None)
    found.append([[i, groups(m)] for i, m in enumerate(map(one, texts)) if m is not None])
json.dump(found, sys.stdout)
"""


class Endless(ValueError):
    """Matching was stopped before it ended."""


def flaw(pattern: str, form: str = "{}") -> str | None:
    """Why this is no regular expression; None: it is one.

    Example:
        >>> flaw("q_proj"), flaw("(q")
        (None, 'missing ), unterminated subpattern at position 0')
    """
    if len(pattern) > LONGEST:
        return f"it has {len(pattern):,} characters, of {LONGEST:,} at most"
    try:
        re.compile(form.format(pattern))
    except (re.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "its groups are nested too deeply"
    return None


def find(
    patterns: Iterable[str],
    texts: Iterable[str],
    *,
    form: str = "{}",
    how: Literal["fullmatch", "match", "last"] = "fullmatch",
) -> dict[str, dict[str, Groups]]:
    """{pattern: {text that matches: groups}}, in the order of both.

    Args:
        patterns: regular expressions, each without a `flaw`.
        texts: e.g. names of modules.
        form: the expression that a pattern becomes, with `{}` in its place.
        how: `fullmatch` and `match` as in `re`; `last` is the last match anywhere in a text.

    Raises:
        Endless: it takes longer than a few seconds and a microsecond per character.

    Example:
        >>> find(["q|v", "o"], ["a.q", "a.o", "v"], form=r"(?:.*\\.)?({})")
        {'q|v': {'a.q': ['a.q', 'q'], 'v': ['v', 'v']}, 'o': {'a.o': ['a.o', 'o']}}
    """
    patterns, texts = list(dict.fromkeys(patterns)), list(dict.fromkeys(texts))
    seconds = PATIENCE + len(patterns) * sum(map(len, texts)) / 1_000_000
    plain = {p for p in patterns if _PLAIN.fullmatch(p)}
    others = [p for p in patterns if p not in plain]
    found = dict(zip(others, _in_process(others, texts, form, how, seconds), strict=True))
    end = time.monotonic() + seconds
    for pattern in patterns:
        if pattern in plain:
            if time.monotonic() > end:
                raise _endless(patterns, texts, seconds)
            found[pattern] = _here(re.compile(form.format(pattern)), texts, how)
    return {pattern: found[pattern] for pattern in patterns}


def matching(pattern: str, texts: Iterable[str]) -> list[str]:
    """The texts that are all of them a match.

    Raises:
        Endless: see `find`.
    """
    return list(find([pattern], texts)[pattern])


def _here(expression: re.Pattern[str], texts: Sequence[str], how: str) -> dict[str, Groups]:
    found: dict[str, Groups] = {}
    for text in texts:
        match = expression.match(text) if how == "match" else expression.fullmatch(text)
        if how == "last":
            match = next(reversed(list(expression.finditer(text))), None)
        if match is not None:
            found[text] = [match[0], *match.groups()]
    return found


def _in_process(
    patterns: Sequence[str], texts: Sequence[str], form: str, how: str, seconds: float
) -> list[dict[str, Groups]]:
    if not patterns or not texts:
        return [{} for _ in patterns]
    job = json.dumps([[form.format(p) for p in patterns], texts, how, seconds])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD], input=job, text=True, capture_output=True,
            timeout=12 * seconds,  # of a clock's: the machine may be busy
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _endless(patterns, texts, seconds) from None
    except OSError as error:
        raise ValueError(
            f"no process could be started to match {_some(patterns)} in"
            f" ({error.strerror or error}); write the names as a list, without patterns"
        ) from None
    if done.returncode < 0:  # ended by the system
        raise _endless(patterns, texts, seconds)
    if done.returncode:
        why = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ValueError(
            f"{_some(patterns)} could not be matched ({shorten(why)}); write the names as a list,"
            " without patterns"
        )
    found: list[list[tuple[int, Groups]]] = json.loads(done.stdout)
    return [{texts[i]: groups for i, groups in hits} for hits in found]


def _endless(patterns: Sequence[str], texts: Sequence[str], seconds: float) -> Endless:
    return Endless(
        f"matching {_some(patterns)} with {len(texts):,} texts or names has not ended after"
        f" {seconds:.2g} s: repeats within repeats take for ever. Write the names as a list, or a"
        " pattern in which one repeat follows another"
    )


def _some(patterns: Sequence[str]) -> str:
    more = f" and {len(patterns) - 4} more" if len(patterns) > 4 else ""
    return ", ".join(map(shorten, patterns[:4])) + more
