"""AdamW where each row of A and each column of B is a parameter of its own."""

from __future__ import annotations

import torch

from reference import adamw


def pair_step(A, B, gA, gB, state, *, lr, decay, **betas):
    """`state` starts empty; `del state["A", i]` lets rank i of A start anew."""
    rows = [
        adamw.step(A[i], gA[i], state.setdefault(("A", i), {}), lr=lr, decay=decay, **betas)
        for i in range(A.shape[0])
    ]
    columns = [
        adamw.step(B[:, i], gB[:, i], state.setdefault(("B", i), {}), lr=lr, decay=decay, **betas)
        for i in range(A.shape[0])
    ]
    return torch.stack(rows), torch.stack(columns, dim=1)
