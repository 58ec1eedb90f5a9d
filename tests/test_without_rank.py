"""A delta may have no rank: one that doesn't take `r`, here a factor for each output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice
from lorica.methods.scales.constant import Constant
from models import llama, logits, perturb, train


class RowScaleDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"l": "diagonal"}

    def __init__(self, site):
        super().__init__()
        self.l = nn.Parameter(torch.zeros(site.out_features, dtype=site.dtype, device=site.device))

    def forward(self, x, base):
        return base.product(x) * self.l

    def weight(self, base):
        return self.l[:, None] * base.weight()

    def restart(self, link, generator):
        nn.init.zeros_(self.l)


@dataclass(frozen=True, kw_only=True)
class RowScale(DeltaChoice):
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    gives: ClassVar[frozenset[str]] = frozenset({"weight", "wrapped"})
    takes: ClassVar[frozenset[str]] = frozenset({"lora_dropout"})

    def build(self, site):
        return RowScaleDelta(site)


def test_it_trains_and_merges():
    model = llama().double()
    adapters = lorica.attach(model, Recipe(delta=RowScale(), scale=Constant()), verbose=False)
    assert {layer.site.r for _, layer in adapters} == {0}
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 2)
    perturb(adapters, 0.1)
    before = logits(model)
    lorica.merge(model)
    torch.testing.assert_close(logits(model), before)


def test_the_summary_shows_no_rank():
    adapters = lorica.attach(llama(), Recipe(delta=RowScale(), scale=Constant()), verbose=False)
    assert "adapted      4 weights of shape 32 x 32, s=1" in adapters.summary.details()


def test_a_rank_given_all_the_same_is_an_error():
    with pytest.raises(ValueError, match="`r=8` has no effect"):
        Recipe(delta=RowScale(), scale=Constant(), r=8)
