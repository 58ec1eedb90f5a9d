"""LoftQ: start from what quantisation took away.

    E = W − Q (out, in), the unquantised weight less the quantised one's values;  E = U S Vᵀ
    B₀ = U_r √(S_r/s) (out, r),   A₀ = √(S_r/s) V_rᵀ (r, in)

so that Q + s·B₀A₀ is the matrix nearest to W that differs from Q by rank r, for every s. Nothing is
subtracted: the adapted model starts nearer to the unquantised model than the quantised one is.

The paper alternates: with the factors found, it quantises W − s·B₀A₀ anew, takes the SVD of what is
left, and so on, T times. Here the base keeps its bytes, so this is its T = 1: for a given Q the SVD
is the best there is, and a further round would be of another base. PEFT's
`replace_lora_weights_loftq` does the same, for s = 1.

A component that is zero (of a layer that isn't quantised, all are) starts as in LoRA: the row of A
is drawn, the column of B is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair
from lorica.methods.inits.base import AbstractInit
from lorica.methods.optional import StartsFromUnquantised
from lorica.tensors.dtensor_ops import draw
from lorica.tensors.linalg import svd, vector_norm


@dataclass(frozen=True, kw_only=True)
class Loftq(StartsFromUnquantised, AbstractInit):
    """Largest components of the quantisation error as the start, on a quantised base: the model
    starts nearer to the unquantised one.

    `lorica.attach` reads the unquantised weights from the checkpoint that the model was quantised
    from, one at a time. Where that isn't on this machine, or holds packed weights itself, give them
    as `unquantised=`.

    Cost: an SVD per layer at the start; nothing in training.
    When: 4 bits and fewer, where the quantised model is clearly worse than the published one.

    Raises:
        ValueError: no target is quantised; a layer's unquantised weight can't be found, or isn't
            what it was quantised from.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
        >>> exact = model[0].weight.detach().clone()
        >>> _ = model[0].weight.data.mul_(4).round_().div_(4)  # rounded to quarters
        >>> given = {"0": exact}
        >>> _ = lorica.attach(model, "loftq", r=6, unquantised=given, verbose=False)
        >>> torch.allclose(model(torch.eye(8)).T, exact, atol=1e-6)
        True

    Reference:
        @inproceedings{li2024loftq,
          title = {LoftQ: LoRA-Fine-Tuning-aware Quantization for Large Language Models},
          author = {Li, Yixiao and Yu, Yifan and Liang, Chen and He, Pengcheng and Karampatziakis,
                    Nikos and Chen, Weizhu and Zhao, Tuo},
          booktitle = {ICLR}, year = {2024}, eprint = {2310.08659}
        }
    """

    reads_weight: ClassVar[bool] = True
    experts: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})  # nothing is frozen beside it
    withdraws: ClassVar[frozenset[str]] = frozenset({"restarts"})

    def fill_from(
        self, seen: Tensor, weight: Tensor, pair: Pair, generator: torch.Generator
    ) -> None:
        r, least = pair.A.shape[0], torch.finfo(weight.dtype).eps * vector_norm(weight)
        U, S, Vh = svd(seen - weight)
        found = S[:r] > least
        root = (S[:r] / pair.scale).sqrt() * found
        pair.B.copy_(U[:, :r] * root)
        pair.A.copy_(root[:, None] * Vh[:r])
        if pair.E is not None:
            pair.E.copy_(torch.where(found[:, None], 1.0, pair.E))
        rest = ~found
        if pair.lookup:  # the lookup reads A's columns
            pair.B[:, rest] = draw(pair.B.shape, generator).to(pair.B)[:, rest]
        else:
            drawn = draw(pair.A.shape, generator, bound=pair.A.shape[1] ** -0.5)
            pair.A[rest] = drawn.to(pair.A)[rest]
