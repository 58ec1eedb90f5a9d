"""`torch.linalg` and `Tensor.tolist` with types: torch declares none for either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_linalg: Any = torch.linalg  # Any: its functions are built in C, without signatures
LinAlgError: type[RuntimeError] = _linalg.LinAlgError  # a decomposition that doesn't converge


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (..., n) in rising order, eigenvectors (..., n, n)) of symmetric X.

    Raises:
        ValueError: X has values that are not finite.
    """
    try:
        values, vectors = _linalg.eigh(X)
    except LinAlgError as error:
        if bool(X.isfinite().all()):
            raise
        raise ValueError(
            "the products of a factor with itself are not finite any more, so training has"
            " diverged; go back to an earlier checkpoint and lower the learning rate"
        ) from error
    return values, vectors


def eigvalsh(X: Tensor) -> Tensor:
    """Eigenvalues (..., n) of symmetric X, in rising order."""
    return _linalg.eigvalsh(X)


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin (U (..., m, k), S (..., k), Vᵀ (..., k, n)) with k = min(m, n)."""
    U, S, Vh = _linalg.svd(X, full_matrices=False)
    return U, S, Vh


def sketched_svd(X: Tensor, probe: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of X (m, n) with their vectors, by a randomised range finder:
    (U (m, k), S (k,), Vᵀ (k, n)); exact where k is min(m, n).

    Args:
        probe: (n, k), random; a few columns more than the components that are wanted.
        niter: power iterations, each re-orthonormalised.
    """
    basis, _ = qr(X @ probe.to(X))  # (m, k)
    for _ in range(niter):
        basis, _ = qr(X @ qr(X.T @ basis)[0])
    U, S, Vh = svd(basis.T @ X)
    return basis @ U, S, Vh


def svdvals(X: Tensor) -> Tensor:
    """Singular values (..., k), the largest first."""
    return _linalg.svdvals(X)


def qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Thin (Q (..., m, k), R (..., k, n)) with k = min(m, n)."""
    Q, R = _linalg.qr(X)
    return Q, R


def cholesky(X: Tensor) -> tuple[Tensor, Tensor]:
    """(L (..., n, n), whether it failed (...): 0 where it did not) of symmetric X."""
    root, failed = _linalg.cholesky_ex(X)
    return root, failed


def vector_norm(
    X: Tensor,
    *,
    dim: int | tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """2-norm over `dim`, of all entries by default; computed in `dtype`, default that of X."""
    return _linalg.vector_norm(X, dim=dim, dtype=dtype)


@torch.no_grad()
def all_finite(X: Tensor) -> bool:
    """Whether no entry is an infinity or not-a-number. Reads X once, makes nothing of its size
    (8-bit floats aside), and waits for the device."""
    if not X.numel():
        return True
    low, high = (X.float() if X.itemsize == 1 else X).aminmax()  # either is NaN where an entry is
    return bool(low.isfinite() & high.isfinite())


# weight -> its version when it was read. Any: torch leaves the class untyped
_seen_finite: Any = WeakTensorKeyDictionary()


def loaded_finite(W: Tensor) -> bool:
    """`all_finite` of a weight that was just loaded; the next `finite_weight` need not read it."""
    finite = all_finite(W)
    if finite and not W.is_inference():
        _seen_finite[W] = W._version
    return finite


def finite_weight(W: Tensor) -> bool:
    """`all_finite` of a weight; one that was found so as it was loaded is not read again, once."""
    version: int | None = _seen_finite.pop(W, None)
    return (version is not None and W._version == version) or all_finite(W)


def floats(X: Tensor) -> list[float]:
    """A vector (n,) as Python floats; waits for the device."""
    plain: Any = X  # Any: torch types `tolist` as a bare `list`
    return plain.tolist()


def ints(X: Tensor) -> list[int]:
    """A vector (n,) of whole numbers as Python ints; waits for the device."""
    plain: Any = X  # Any: as above
    return plain.tolist()
