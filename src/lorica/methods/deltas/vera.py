"""VeRA: two trained vectors per layer around a frozen random pair that all layers share.

    y = x Wᵀ + λ_b ∘ ((λ_d ∘ (x Aᵀ)) Bᵀ)     A (r, in), B (out, r), frozen; λ_d (r,), λ_b (out,)
    ΔW = diag(λ_b) B diag(λ_d) A
    ∂L/∂λ_b[o] = Σ_i G[o, i] (B diag(λ_d) A)[o, i]          with G = ∂L/∂W'
    ∂L/∂λ_d[j] = Σ_o,i G[o, i] λ_b[o] B[o, j] A[j, i]

There is one A (r, largest in) and one B (largest out, r) for the whole model; a layer reads the
first `in` columns of A and the first `out` rows of B. λ_b starts at 0 and λ_d at 0.1, so ΔW = 0.

The paper draws A and B from Kaiming's distribution and does not say which of the two. PEFT takes
the uniform one, U(±√(6/fan_in)), first A and then B from one generator, and this file draws the
same numbers. Where layers have different ranks, which neither has, a layer reads the first r rows
of A and the first r columns of B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice, PeftForm
from lorica.methods.fields import is_number, is_whole, refused, whole
from lorica.methods.optional import SharesTensors
from lorica.tensors.dtensor_ops import read_full, shard_of, zero_

PEFT_TYPE = "VERA"
LAST_KEY = 2**63 - 1  # of a generator


class VeraDelta(AbstractDelta):
    """λ_b and λ_d of one layer; `lorica.attach` hands it the shared A and B."""

    roles: ClassVar[dict[str, str]] = {"lambda_b": "diagonal", "lambda_d": "diagonal"}

    def __init__(self, site: Site, d_initial: float) -> None:
        super().__init__()
        dtype, device = site.dtype, site.device
        zeros = torch.zeros(site.out_features, dtype=dtype, device=device)
        self.lambda_b = nn.Parameter(zeros)
        self.lambda_d = nn.Parameter(torch.full((site.r,), d_initial, dtype=dtype, device=device))
        self.site = site
        self.d_initial = d_initial

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        # Both vectors go onto B, so that backward keeps x Aᵀ (..., r) and nothing as wide as y.
        A, B = self._right(), self._left()
        if self.site.lookup:
            return F.linear(F.embedding(x, A.T), B)
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def weight(self, base: BaseLike) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        return Factors(self._right(), self._left())

    def _right(self) -> Tensor:
        """A (r, in)."""
        return self.read_shared("A")[: self.site.r, : self.site.in_features]

    def _left(self) -> Tensor:
        """diag(λ_b) B diag(λ_d) (out, r)."""
        B = self.read_shared("B")[: self.site.out_features, : self.site.r]
        return read_full(self.lambda_b)[:, None] * B * read_full(self.lambda_d)

    def restart(self, link: int, generator: torch.Generator) -> None:
        zero_(self.lambda_b)
        with torch.no_grad():
            shard_of(self.lambda_d)[0].fill_(self.d_initial)


@dataclass(frozen=True, kw_only=True)
class Vera(DeltaChoice, SharesTensors):
    """Vector-based random matrix adaptation: two trained vectors around a random pair that all
    layers share.

    out + r trained parameters per layer. `r` is the width of the projection and may exceed the
    layer's size; ΔW has rank at most min(r, in, out). Merging is exact. There is no scale before
    ΔW, so `lora_alpha` is an error. The pair is saved once, not once per layer; PEFT's `VERA` files
    are read and written. A chain of restarts meets the same pair at every link. Under FSDP2 and DDP
    every process holds the whole pair. Not to be confused with LoRA whose A is frozen (`lorafa`),
    which trains all of B.

    Default r 256, PEFT's. Default rate 4e-3, the paper's for instruction tuning, ten times its rate
    for LoRA.

    Cost: out + r parameters per layer; a step costs more than LoRA's, since r is larger.
    When: many adapters of one base have to be stored, or fewer parameters than LoRA's of rank 1.

    Args:
        d_initial: where λ_d starts, not 0; default 0.1, the paper's.
        projection_prng_key: seed of A and B, at least 0; default 0, PEFT's. The recipe's `seed`
            plays no part: adapters with the same key share one pair.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> adapters = lorica.attach(model, "vera", r=16, verbose=False)
        >>> adapters.summary.trainable
        42
        >>> {name: tuple(t.shape) for name, t in adapters.state_dict().items() if "shared" in name}
        {'shared.A': (16, 8), 'shared.B': (6, 16)}

    Reference:
        @inproceedings{kopiczko2024vera,
          title = {VeRA: Vector-based Random Matrix Adaptation},
          author = {Kopiczko, Dawid J. and Blankevoort, Tijmen and Asano, Yuki M.},
          booktitle = {ICLR}, year = {2024}, eprint = {2310.11454}
        }
    """

    d_initial: float = 0.1
    projection_prng_key: int = 0

    gives: ClassVar[frozenset[str]] = frozenset({"factors", "weight", "lookup", "wrapped"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"matrices"})  # vectors train
    takes: ClassVar[frozenset[str]] = frozenset({"r", "lora_dropout", "rank_pattern"})
    preset: ClassVar[Mapping[str, str]] = {"scales": "constant"}
    requires: ClassVar[frozenset[str]] = frozenset({"scales"})
    default_r: ClassVar[int | None] = 256
    default_learning_rate: ClassVar[float | None] = 4e-3

    def __post_init__(self) -> None:
        if not is_number(self.d_initial) or self.d_initial == 0:
            raise refused(
                self, "d_initial", "a number other than 0, where nothing trains; e.g. 0.1"
            )
        whole(
            self, "projection_prng_key", least=0, most=LAST_KEY,
            say="a seed, a whole number of at least 0, e.g. 0",
        )  # fmt: skip

    def most_r(self, in_features: int, out_features: int) -> int | None:
        return None

    def build(self, site: Site) -> VeraDelta:
        return VeraDelta(site, self.d_initial)

    def peft_form(self) -> PeftForm:
        return PeftForm(
            peft_type=PEFT_TYPE,
            tensors={"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},
            shared={"A": "base_model.vera_A", "B": "base_model.vera_B"},
            shared_in_file="save_projection",
            dropout="vera_dropout",
            bias="vera_only",
            transposed="fan_in_fan_out",
            fields={
                "d_initial": self.d_initial, "projection_prng_key": self.projection_prng_key,
                "save_projection": True, "init_weights": True,
            },
        )  # fmt: skip

    @classmethod
    def from_peft(cls, data: Mapping[str, object]) -> Vera | None:
        own = cls()
        d_initial = data.get("d_initial", own.d_initial)
        key = data.get("projection_prng_key", own.projection_prng_key)
        if data.get("peft_type") != PEFT_TYPE:
            return None
        if not is_number(d_initial) or d_initial == 0 or not is_whole(key, 0, LAST_KEY):
            return None
        return cls(d_initial=float(d_initial), projection_prng_key=key)

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        r = max(site.r for site in sites)
        own = torch.Generator("cpu").manual_seed(self.projection_prng_key)
        A = _kaiming(r, max(site.in_features for site in sites), own)
        B = _kaiming(max(site.out_features for site in sites), r, own)
        return {"A": A, "B": B}


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) from U(±√(6/columns)), in float32 on the CPU."""
    bound = math.sqrt(6 / columns)
    empty = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    return empty.uniform_(-bound, bound, generator=generator)
