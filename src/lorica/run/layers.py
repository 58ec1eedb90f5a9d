"""What trained in each layer, for result.json."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lorica.formats.describe import norm
from lorica.model.adapters import Adapters
from lorica.model.layer import AdaptedLayer


@torch.no_grad()
def layers(adapters: Adapters) -> list[dict[str, Any]]:
    """Every adapted layer, in model order.

    Keys: `name` (module path), `out`, `in`, `experts` (0: a single matrix), `r` (0: the update has
    none), `live` (how many of the r rank-one terms are not zero: methods that prune leave fewer),
    `scale`, `parameters` (that train), and `norm`, the Frobenius norm of ΔW. `live` and `norm` are
    None where the update has no factors, has some for each expert, or is sharded.

    Example:
        >>> import torch, lorica
        >>> adapters = lorica.attach(
        ...     torch.nn.Sequential(torch.nn.Linear(8, 4)), "lora", r=2, verbose=False)
        >>> layers(adapters)[0]["parameters"], layers(adapters)[0]["norm"]
        (24, 0.0)
    """
    return [
        {
            "name": name,
            "out": layer.site.out_features,
            "in": layer.site.in_features,
            "experts": layer.site.experts,
            "r": layer.site.r,
            "live": None,
            "scale": layer.site.scale,
            "parameters": sum(p.numel() for _, p, _ in layer.trained()),
            "norm": None,
        }
        | _of_factors(layer)
        for name, layer in adapters
    ]


def _of_factors(layer: AdaptedLayer) -> dict[str, Any]:
    """What the factors of the update tell."""
    if layer.site.experts or any(isinstance(p, DTensor) for _, p, _ in layer.trained()):
        return {}
    own, whole = layer.update.delta.factors(), layer.update.factors()
    if own is None or whole is None:
        return {}
    terms = own.A.float().norm(dim=1) * own.B.float().norm(dim=0)
    return {"live": int((terms > 0).sum()), "norm": norm(whole)}
