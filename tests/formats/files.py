"""Helpers of the file tests: PEFT as the oracle, and what it has to say about it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorica
from models import batch, logits

TOLERANCE = 1e-5  # of logits, relative to their largest where that is above 1


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    a, b = a.detach(), b.detach()
    size = max(1.0, float(a.abs().max()))
    assert float((a - b).abs().max()) <= tolerance * size


@torch.no_grad()
def peft_logits(base: nn.Module, folder: Path) -> Tensor:
    """Logits of PEFT's reading of an adapter over a copy of `base`; every key must find its
    place."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # GPT-2's transposed layers, tied heads: PEFT warns about each, and none is an error.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # a pattern that matches nothing
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for a renamed attribute
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        stored = model.load_adapter(str(folder), "default")
    assert not stored.unexpected_keys, stored.unexpected_keys
    assert not stored.missing_keys, stored.missing_keys
    return model(**batch(base)).logits


@torch.no_grad()
def peft_made(base: nn.Module, folder: Path, seed: int = 3, size: float = 0.1, **fields: Any):
    """An adapter made, perturbed and saved by PEFT; its logits and its model."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # a pattern that matches nothing
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for a renamed attribute
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields)).eval()
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
        model.save_pretrained(folder)
        out = model(**batch(base)).logits
    return out, model


def there_and_back(base: nn.Module, theirs: Tensor, folder: Path) -> None:
    """PEFT's files in `folder / "theirs"` load onto the base and give PEFT's logits `theirs`. So
    does PEFT with what is saved of them, and detached the base is as it was."""
    model = copy.deepcopy(base)
    adapters = lorica.load(model, folder / "theirs")
    close(theirs, logits(model))
    out = lorica.save(adapters, folder / "ours")
    close(theirs, peft_logits(base, out))
    lorica.detach(model)
    for (name, p), q in zip(base.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    data = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            data.pop(key, None)
        else:
            data[key] = value
    file.write_text(json.dumps(data))
