"""Orthogonality: a penalty that keeps each factor's directions orthonormal.

    mean (default)   γ·1/(2K) Σ_k ( ‖B_kᵀB_k − I‖ + ‖A_kA_kᵀ − I‖ )       Frobenius norms
    sum              γ·Σ_k ( ‖B_kᵀB_k − I‖² + ‖A_kA_kᵀ − I‖² )

over the K pairs that train at present, A (r, in), B (out, r). The paper writes the sum of squares;
the authors' code and PEFT take the mean of norms, which does not grow with the number of layers,
and the published weights (0.1 to 0.5) belong to it. PEFT adds it in evaluation too; here it is
added in training only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from lorica.methods.fields import number, one_of
from lorica.methods.objectives.base import AbstractObjective, Context
from lorica.tensors.linalg import vector_norm
from lorica.tensors.matmul import no_autocast


def _whole(p: Tensor) -> Tensor:
    """All of p; in backward a shard gets the mean over the processes, as for the task's loss."""
    if not isinstance(p, DTensor):
        return p
    mesh = p.device_mesh
    full = p.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return full.detach() + (full - full.detach()) / mesh.size()


def _distance(rows: Tensor) -> Tensor:
    """‖RRᵀ − I‖ for R (r, n), in at least float32."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gram = rows @ rows.T  # (r, r)
    return vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


@dataclass(frozen=True, kw_only=True)
class Orthogonality(AbstractObjective):
    """A penalty on pairs of factors that are not orthonormal, so that no two ranks are alike.

    With a trained diagonal between the factors (`svd`) the diagonal decides the size of an update;
    without one the penalty keeps the factors, and so the update, at unit size.

    Cost: an r × r product per factor and step.
    When: ranks duplicate each other; as part of `adalora`.

    Args:
        weight: γ > 0; default 0.1, the authors' on most tasks (0.3 and 0.5 on some; PEFT's is 0.5).
        form: `mean` (default) or `sum`, see the equations above the class.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("svd+orthogonality(weight=0.3)").objectives[0].weight
        0.3

    Reference:
        @inproceedings{zhang2023adalora,
          title = {Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning},
          author = {Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis,
                    Nikos and He, Pengcheng and Cheng, Yu and Chen, Weizhu and Zhao, Tuo},
          booktitle = {ICLR}, year = {2023}, eprint = {2303.10512}
        }
    """

    weight: float = 0.1
    form: str = "mean"

    needs: ClassVar[frozenset[str]] = frozenset({"pair"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})

    def __post_init__(self) -> None:
        say = "a number above 0, e.g. `weight=0.1`; without the penalty, leave the method out"
        number(self, "weight", above=0, say=say)
        one_of(self, "form", "mean", "sum")

    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        device = task_loss.device
        found: list[Tensor] = []
        with no_autocast(device.type):
            for name, pair in context.adapters.pairs():
                layer = context.adapters.layers[name]
                # Each factor may be frozen for now, and must then get no gradient from here either.
                frozen = {id(layer.get_parameter(n)) for n in layer.frozen_for_now}
                if id(pair.A) not in frozen:
                    found.append(_distance(_whole(pair.A)).to(device))
                if id(pair.B) not in frozen:
                    found.append(_distance(_whole(pair.B).T).to(device))
            if not found:
                return task_loss
            distances = torch.stack(found)
            penalty = distances.mean() if self.form == "mean" else distances.square().sum()
        return task_loss + context.share * self.weight * penalty
