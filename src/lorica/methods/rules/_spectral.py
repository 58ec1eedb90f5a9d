"""Gram matrices of thin factors, inverted safely.

A factor is held wide, Y (n, r, d): n of equal shape at once. Everything here is (n, r, r) and in
float64, so the Gram matrix loses no more of float32 factors than a QR of them would: a singular
value counts as zero below r·eps of the largest, as in `torch.linalg.pinv`. Shared by the pair rules
of this axis; no method by itself.
"""

# The papers' symbols are upper case.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import torch
from torch import Tensor

from lorica.tensors.linalg import cholesky, eigh, eigvalsh
from lorica.tensors.matmul import rounds_float32


def product(X: Tensor, Y: Tensor) -> Tensor:
    """X @ Y with all digits of its dtype. Where products of float32 are rounded to TF32 it is taken
    in float64: what these rules divide by loses its small directions with the last digits."""
    if X.dtype is torch.float32 and rounds_float32(X.device.type):
        return (X.double() @ Y.double()).to(X.dtype)
    return X @ Y


def gram(Y: Tensor) -> Tensor:
    """Y Yᵀ (n, r, r) in float64."""
    Y = Y.double()
    return Y @ Y.mT  # (n, r, d)·(n, d, r)


def _cut(largest: Tensor, dtype: torch.dtype, r: int) -> Tensor:
    """Below this an eigenvalue of a Gram matrix is rounding of factors of `dtype`."""
    info = torch.finfo(dtype)
    share = (r * info.eps) ** 2 + r * torch.finfo(torch.float64).eps
    return (largest * share).clamp_min(info.tiny)


def whiten(Y: Tensor) -> Tensor:
    """W (n, r, r) with orthonormal rows in W·Y, zero rows where Y lacks rank.

    With Yᵀ = Q R: W·Y = Qᵀ, and the pseudo-inverse R⁺ = Wᵀ.
    """
    values, vectors = eigh(gram(Y))
    kept = values > _cut(values[:, -1:], Y.dtype, Y.shape[1])
    roots = torch.where(kept, values, 1).rsqrt() * kept
    return (roots[:, :, None] * vectors.mT).to(Y.dtype)


def damped_inverse(Y: Tensor, delta: float, *, relative: bool = False) -> Tensor:
    """(Y Yᵀ + δI)⁻¹ (n, r, r), a pseudo-inverse where that is singular.

    Args:
        relative: δ counts in units of the Gram matrix' mean eigenvalue, tr(Y Yᵀ)/r.
    """
    matrix, r = gram(Y), Y.shape[1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal += delta * (diagonal.mean(-1, keepdim=True) if relative else 1)
    root, failed = cholesky(matrix)
    pivots = root.diagonal(dim1=-2, dim2=-1)
    safe = pivots.amin(-1).square() > r * _cut(pivots.amax(-1).square(), Y.dtype, r)
    if bool((safe & (failed == 0)).all()):
        return torch.cholesky_inverse(root).to(Y.dtype)
    values, vectors = eigh(matrix)
    kept = values > _cut(values[:, -1:], Y.dtype, r)
    inverse = torch.where(kept, values, 1).reciprocal() * kept
    return ((vectors * inverse[:, None, :]) @ vectors.mT).to(Y.dtype)


def symmetric(V: Tensor) -> Tensor:
    return (V + V.mT) / 2


def inverse_root(V: Tensor, shift: Tensor | float, eps: float) -> Tensor:
    """(V + shift·I)^(−1/2) (n, r, r) of symmetric V, its eigenvalues clamped at 0; eps is added to
    the roots, and one of 0 is left out."""
    values, vectors = eigh(V.double())
    roots = (values.clamp_min(0)[:, None, :] + shift).sqrt() + eps
    inverse = torch.where(roots > 0, roots, torch.inf).reciprocal()
    return ((vectors * inverse) @ vectors.mT).to(V.dtype)


def largest_fall(old: Tensor, new: Tensor) -> Tensor:
    """(n, 1, 1): by how much an ordered eigenvalue falls from old to new at most; not below 0, nor
    above the trace's fall."""
    fall = eigvalsh(old.double()) - eigvalsh(new.double())
    most = fall.amax(-1).minimum(fall.sum(-1)).clamp_min(0)
    return most.to(old.dtype)[:, None, None]
