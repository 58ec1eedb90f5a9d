"""Checks of hyperparameters, one line each in a choice's `__post_init__`.

    whole(self, "every", least=1, say="whole optimizer steps, at least 1, e.g. 1000")

Each raises a ValueError that quotes what was given as a user types it, says what is allowed, and
what to type instead.
"""

from __future__ import annotations

import math
import sys
from typing import TypeGuard

from lorica.methods.choice import Choice


def is_whole(value: object, least: int = 1, most: float = math.inf) -> TypeGuard[int]:
    """Whether it is a whole number within these bounds; True and False are none.

    Example:
        >>> is_whole(3), is_whole(0), is_whole(True), is_whole(3.0)
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> TypeGuard[float]:
    """Whether it is a finite number within these bounds; True and False are none.

    Example:
        >>> is_number(0.5), is_number(float("inf")), is_number(10**400), is_number("1")
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # Comparisons, since `math.isfinite` fails on an integer that no float holds.
    return least <= value <= most and abs(value) <= sys.float_info.max


def refused(choice: Choice, field: str, say: str) -> ValueError:
    """The error for a value that is not allowed: `name(field=value)`, and what is."""
    return ValueError(f"`{choice.name}({field}={_value(choice, field)!r})`: {say}")


def whole(
    choice: Choice, field: str, *, least: int = 1, most: float = math.inf, optional: bool = False,
    say: str,
) -> None:  # fmt: skip
    """The field is a whole number from `least` to `most`.

    Args:
        optional: None is allowed too.
        say: what is allowed, with its unit and an example to type.
    """
    value = _value(choice, field)
    if not (is_whole(value, least, most) or (optional and value is None)):
        raise refused(choice, field, say)


def number(
    choice: Choice, field: str, *, least: float = -math.inf, most: float = math.inf,
    above: float = -math.inf, below: float = math.inf, optional: bool = False, say: str,
) -> None:  # fmt: skip
    """The field is a finite number with least <= value <= most and above < value < below.

    Args:
        optional, say: see `whole`.
    """
    value = _value(choice, field)
    within = is_number(value, least, most) and above < value < below
    if not (within or (optional and value is None)):
        raise refused(choice, field, say)


def one_of(choice: Choice, field: str, *allowed: object) -> None:
    """The field is one of these values."""
    value = _value(choice, field)
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise refused(choice, field, f"allowed: {', '.join(map(repr, allowed))}")


def without_effect(choice: Choice, field: str, default: object, why: str) -> None:
    """The field is at its default, for it would have no effect here.

    Args:
        why: what it belongs to, e.g. "it belongs to pruning".
    """
    if _value(choice, field) != default:
        raise refused(choice, field, f"it has no effect here: {why}; leave it out")


def _value(choice: Choice, field: str) -> object:
    return getattr(choice, field)
