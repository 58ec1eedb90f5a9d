"""BA-LoRA from Chang et al. (arXiv 2408.04556, ICLR version), one row and number at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rows(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """Z (N, D): the logits (batch, length, D) of each place that predicts a label."""
    out = []
    for row, wanted in zip(logits, labels.tolist(), strict=True):
        for place in range(len(wanted)):
            target = place + 1 if shifted else place
            if target < len(wanted) and wanted[target] != -100:
                out.append(row[place])
    return torch.stack(out)


def cr(z: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    total = z.new_zeros(())
    for own, other in zip(z, teacher, strict=True):
        p, q = (other / temperature).softmax(0), (own / temperature).softmax(0)
        total = total + (p * (p / q).log()).sum()
    return temperature**2 * total / len(z)


def dr_nlu(z: Tensor) -> Tensor:
    n, d = z.shape
    total = z.new_zeros(())
    for i in range(d):
        for j in range(d):
            if i != j:
                a, b = z[:, i] - z[:, i].mean(), z[:, j] - z[:, j].mean()
                total = total + ((a * b).sum() / (n - 1)) ** 2
    return total / d


def dr_nlg(z: Tensor, top_k: int) -> Tensor:
    total = z.new_zeros(())
    for row in z:
        p = row.sort(descending=True).values[:top_k].softmax(0)
        total = total + (p * p.log()).sum()
    return total / len(z)


def svdr_nlu(z: Tensor, k: int) -> Tensor:
    s = torch.linalg.svd(z, full_matrices=False).S
    return -s[:k].sum() / s.sum()


def svdr_nlg(z: Tensor, k: int) -> Tensor:
    s = torch.linalg.svd(z, full_matrices=False).S
    return -s[:k].sum() / (z * z).sum().sqrt()


def gradient_nlu(z: Tensor, k: int) -> Tensor:
    """∂SVDR/∂Z in closed form."""
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    return -(u[:, :k] @ vh[:k] / s.sum() - s[:k].sum() * (u @ vh) / s.sum() ** 2)


def gradient_nlg(z: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    norm = (z * z).sum().sqrt()
    return -(u[:, :k] @ vh[:k] / norm - s[:k].sum() * z / norm**3)


def factors(step: int, total: int) -> tuple[float, float]:
    """What λ₁, and λ₂ with λ₃, are multiplied with at a step of the run."""
    part = step / total
    late = 0.0 if part < 0.2 else min((part - 0.2) / 0.05, 1.0)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2, late
