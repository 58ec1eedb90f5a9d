"""What an error quotes, cut to what a person reads."""

from __future__ import annotations

import re

_LONG = re.compile(r"([^\s]{500})[^\s]{500,}")


def cut(text: str) -> str:
    """The text, of whose words none is longer than 1,000 characters.

    Example:
        >>> len(cut("a" * 9000))
        503
    """
    return _LONG.sub(r"\1...", text)
