"""Turns PEFT's ADALORA files into plain LORA files: Λ goes into A, s into each layer's alpha.

    ΔW = (α/(r₀ + 1e-5))·B·(A ∘ E)        A (k, in), E (k, 1), B (out, k), k ≤ r₀ = `init_r`

The divisor is `init_r` for any rank that is left; `r` and `use_rslora` have no effect there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.methods.fields import is_number, is_whole

_KEYS = tuple(f".lora_{side}" for side in "AEB")
# How PEFT trained the ranks, which the plain LORA file doesn't need, and what has no effect there.
_TRAINING = {
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step", "use_rslora",
}  # fmt: skip


def as_plain(
    data: Mapping[str, Any],  # Any: a JSON file's values
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # Any: as above
    """Configuration and tensors of the LORA file that computes the same; see `ReadsAsLora`."""
    init_r, alpha = data.get("init_r"), data.get("lora_alpha")
    if not is_whole(init_r):
        raise ValueError(f"`init_r` is {init_r!r}, and has to be a whole number of at least 1")
    if not is_number(alpha):
        raise ValueError(f"`lora_alpha` is {alpha!r}, and has to be a number")
    scale = (alpha if alpha > 0 else init_r) / (init_r + 1e-5)
    paths = sorted(key.removesuffix(_KEYS[0]) for key in tensors if key.endswith(_KEYS[0]))
    out = {key: value for key, value in tensors.items() if not key.endswith(_KEYS)}
    ranks: dict[str, int] = {}
    for path in paths:
        A, B = _factors(path, tensors)
        out[f"{path}.lora_A.weight"], out[f"{path}.lora_B.weight"] = A, B
        ranks["^" + path.removeprefix("base_model.model.").replace(".", r"\.")] = len(A)
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else init_r
    others = {name: r for name, r in ranks.items() if r != usual}
    plain = {key: value for key, value in data.items() if key not in _TRAINING}
    return {
        **plain,
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": scale * usual,
        "rank_pattern": others,
        "alpha_pattern": {name: scale * r for name, r in others.items()},
        "init_lora_weights": True,  # no start of this type touches the base
    }, out


def _factors(path: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A ∘ E (k, in) and B (out, k) of one layer; where no rank is left, rank 1 with B = 0."""
    found = [tensors.get(path + key) for key in _KEYS]
    if any(t is None or t.ndim != 2 for t in found):
        raise ValueError(f"{path}: the file needs a matrix each of {', '.join(_KEYS)}")
    A, E, B = found
    assert A is not None and E is not None and B is not None
    if E.shape != (len(A), 1) or B.shape[1] != len(A):
        shapes = ", ".join(str(tuple(t.shape)) for t in (A, E, B))
        raise ValueError(f"{path}: {', '.join(_KEYS)} are {shapes}, which is no triple product")
    if len(A):
        return A * E, B
    return torch.full((1, A.shape[1]), A.shape[1] ** -0.5, dtype=A.dtype), B.new_zeros(len(B), 1)
