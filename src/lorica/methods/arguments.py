"""Checks of what a call in Python was given, before anything is done with it.

    lr = argument("lr", lr, "a learning rate is a number from 0 to 1e18, e.g. 2e-4")

Shared by optimizers and rules; hyperparameters of a method are checked by `fields.py`.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.text import cut, nearest, shorten


def as_number(value: object) -> float | None:
    """A finite real number of Python's or numpy's, or one that a tensor holds; None: it is none,
    as True and text are.

    Example:
        >>> as_number(2), as_number("1e-3"), as_number(float("nan"))
        (2.0, None, None)
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer that no float holds
        return None
    return number if math.isfinite(number) else None


MOST = 1e18  # of rates and the like: products of two of them have to stay within float32


def argument(name: str, value: object, say: str, *, least: float = 0.0) -> float:
    """The argument as a float.

    Args:
        say: what is allowed, with an example to type.

    Raises:
        ValueError: it is no finite number, below `least`, or above `MOST`.
    """
    number = as_number(value)
    if number is None or not least <= number <= MOST:
        raise ValueError(f"`{name}={shorten(value)}`: {say}")
    return number


def whole_argument(name: str, value: object, say: str, *, least: int = 1) -> int:
    """The argument as an int; numpy's are taken, 2.0 and True are no whole numbers.

    Raises:
        ValueError: it is none, or below `least`.
    """
    given: Any = value  # Any: `index` says itself whether it takes it
    number = None
    if not isinstance(value, (bool, Tensor)):
        try:
            number = operator.index(given)
        except TypeError:
            pass
    if number is None or number < least:
        raise ValueError(f"`{name}={shorten(value)}`: {say}")
    return number


def rate(name: str, value: Any) -> Any:  # Any: a tensor stays the one that it is
    """A learning rate: a float, or the tensor that it is held in.

    Raises:
        ValueError: it is none.
    """
    say = "a learning rate is a number from 0 to 1e18, e.g. 2e-4"
    number = argument(name, value, say)
    return value if isinstance(value, Tensor) else number


def refuse_unknown(rule: str, options: Mapping[str, object], allowed: Collection[str]) -> None:
    """Every option is one that the rule's optimizer has.

    Raises:
        ValueError: one is not.
    """
    for given, value in options.items():
        if given not in allowed:
            name = cut(given)
            raise ValueError(
                f"`{name}={shorten(value)}` has no effect with the rule `{rule}`; its optimizer"
                f" takes {', '.join(f'`{k}`' for k in allowed)}{nearest(name, allowed)}. Leave it"
                f" out, or put an argument of the rule into the method, e.g. `{rule}(...)`"
            )
