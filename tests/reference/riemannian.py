"""Scaled gradients of Riemannian Preconditioned LoRA (arXiv 2402.02347), then an inner rule."""

from __future__ import annotations

import torch

from reference import adamw, sgd


def scaled(A, B, gA, gB, delta):
    """Ā = (BᵀB + δI)⁻¹ ∂A (r, in), B̄ = ∂B (AAᵀ + δI)⁻¹ (out, r)."""
    damping = delta * torch.eye(A.shape[0], dtype=A.dtype)
    return torch.linalg.pinv(B.T @ B + damping) @ gA, gB @ torch.linalg.pinv(A @ A.T + damping)


def pair_step(A, B, gA, gB, state, *, lr, decay, delta=1e-2, inner="adamw", **betas):
    rule = {"adamw": adamw, "sgd": sgd}[inner]
    return rule.pair_step(A, B, *scaled(A, B, gA, gB, delta), state, lr=lr, decay=decay, **betas)
