"""LoRA-RITE (arXiv 2410.20625), one pair after the other, in tall factors: Â = Aᵀ (in, r), B̂ = B.

The bases come from a QR decomposition, R is inverted by `pinv`: another basis than the library's,
which has to give the same steps.
"""

from __future__ import annotations

import torch


def decay_of(beta, k):
    """b(k) = β(1 − βᵏ)/(1 − βᵏ⁺¹)."""
    return beta * (1 - beta**k) / (1 - beta ** (k + 1))


def rms(x):
    return x.square().mean().sqrt()


def root(V, rho, eps):
    """(V + ρI)^(−1/2) by eigenvalues, those below 0 taken for 0."""
    w, U = torch.linalg.eigh(V)
    return U @ torch.diag(1 / ((w.clamp_min(0) + rho).sqrt() + eps)) @ U.T


def side(X, g, Q, R_plus, own, *, lr, decay, betas, eps, escape):
    """One factor X (d, r) with its unmagnified gradient g (d, k), in the partner's basis Q."""
    k = own.setdefault("k", 0)
    n = Q.shape[1]
    V = own.setdefault("V", torch.zeros(n, n, dtype=X.dtype))
    M = own.setdefault("M", torch.zeros(X.shape[0], n, dtype=X.dtype))
    rho = own.setdefault("rho", 0.0)
    P = Q.T @ own.setdefault("Q", torch.zeros_like(Q))
    b1, b2 = (decay_of(beta, k) for beta in betas)
    moved = P @ V @ P.T
    moved = (moved + moved.T) / 2
    if escape:
        old, new = torch.linalg.eigvalsh(V), torch.linalg.eigvalsh(moved)
        e = min(max(0.0, float((old - new).max())), max(0.0, float(V.trace() - moved.trace())))
        rho = b2 * (rho + e)
    V = (1 - b2) * g.T @ g / X.shape[0] + b2 * moved
    S = g @ root((V + V.T) / 2, rho, eps)
    M = (1 - b1) * S + b1 * M @ P.T
    own.update(k=k + 1, V=V, M=M, Q=Q, rho=rho)
    return X - lr * (M @ R_plus.T + decay * X)


def step(
    pairs, gradients, state, *, lr, decay=0.0, betas=(0.9, 0.999), eps=1e-6, clip=1.0, skip=0.0,
    escape=False,
):  # fmt: skip
    """New [(A, B)] from [(A, B)] and [(∂A, ∂B)]; `state` starts as an empty dict."""
    parts = []
    for (A, B), (gA, gB) in zip(pairs, gradients, strict=True):
        QA, RA = torch.linalg.qr(A.T)
        QB, RB = torch.linalg.qr(B)
        RA_plus, RB_plus = torch.linalg.pinv(RA), torch.linalg.pinv(RB)
        parts.append((gA.T @ RB_plus, gB @ RA_plus, QA, QB, RA_plus, RB_plus))
    if skip:
        parts = [
            (*(torch.zeros_like(g) if rms(g) > skip else g for g in p[:2]), *p[2:]) for p in parts
        ]
    norm = float(sum(g.square().sum() for p in parts for g in p[:2])) ** 0.5
    factor = clip / norm if clip and norm > clip else 1.0
    out = []
    options = {"lr": lr, "decay": decay, "betas": betas, "eps": eps, "escape": escape}
    for i, ((A, B), (gA, gB, QA, QB, RA_plus, RB_plus)) in enumerate(
        zip(pairs, parts, strict=True)
    ):
        own = state.setdefault(i, ({}, {}))
        new_A = side(A.T, gA * factor, QB, RB_plus, own[0], **options).T
        new_B = side(B, gB * factor, QA, RA_plus, own[1], **options)
        out.append((new_A, new_B))
    return out


def pair_step(A, B, gA, gB, state, *, lr, decay, **options):
    return step([(A, B)], [(gA, gB)], state, lr=lr, decay=decay, **options)[0]
