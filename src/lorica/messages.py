"""What an error quotes, cut to what a person reads."""

from __future__ import annotations

import re

_LONG = re.compile(r"([^\s]{500})[^\s]{500,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def cut(text: str) -> str:
    """The text, of whose words none is longer than 1,000 characters, with control characters as
    Python writes them: a terminal obeys them.

    Example:
        >>> len(cut("a" * 9000))
        503
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], _LONG.sub(r"\1...", text))
