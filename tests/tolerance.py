"""How far two computations of one value may lie apart, from sizes and dtype.

Equality to the bit holds where the same kernels run in the same order. A sum taken in another order
(another vector width, blocking or number of threads, a fused multiply-add, a product formed as a
whole or by its factors) rounds elsewhere, and which of these a machine does is its own affair.
"""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype, terms: int, size: float = 1.0, steps: int = 1) -> float:
    """The most that rounding can put between two computations of one value.

    A chain of k roundings is off by at most k·u·size (u = eps / 2, to first order in u), so two of
    them lie at most k·eps·size apart.

    Args:
        terms: roundings that one result has behind it: terms of its sums, one after the other,
            and products between them.
        size: bound of the sum of the terms' absolute values; 1 for a relative error.
        steps: how often one result goes into the next.

    Example:
        >>> rounding(torch.float32, terms=8, size=2.0) == 8 * 2.0 * 2.0**-23
        True
    """
    return terms * steps * torch.finfo(dtype).eps * size
