"""Bone: all blocks of r inputs share one matrix.

    y = x Wᵀ + (Σ_j x^(j)) D     D (r, out), zeros;  x^(j) the j-th block of r consecutive inputs
    ΔW[o, i] = D[i mod r, o];    ΔW = Dᵀ [I I … I], cut to (out, in)
    ∂L/∂D = [I I … I] Gᵀ         with G = ∂L/∂W'

A last block that is not full is padded with zeros. The paper has had three titles: its first
versions call the formula of `bat` "Bone"; from the fourth version on, "Bone" is the formula here,
which the last version calls MiSS_e and PEFT `MISS` (earlier `BONE`). Section 4.2 of the paper
describes r blocks of size in/r, but sums blocks of size r; the authors' code does the latter, and
so does this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import Site
from lorica.methods.deltas._blocks import Blocks, BlockSum, mode_of, peft_form
from lorica.methods.deltas.base import PeftForm


@dataclass(frozen=True, kw_only=True)
class Bone(Blocks):
    """Block sums: one matrix D (r, out) for every block of r inputs.

    ΔW repeats itself along the inputs with period r, so its rank is at most r; r·out parameters per
    layer, and the first product is a sum. Merging is exact. There is no scale before ΔW, so
    `lora_alpha` is an error. The authors take r = 64 (128 on 13B) where LoRA has 36 (64). A chain
    of restarts gains nothing: every link has the same r·out dimensions. PEFT's `MISS` type is this
    delta by default; `miss` is the form that shares along the outputs.

    Default rate 2e-5, the authors' on 7B; a gain of √(in/r) sits in the sum.

    Cost: r·out parameters per layer; the first product is a sum, so a step is cheaper than LoRA's.
    When: speed matters more than the last tenth of a point.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> delta = lorica.attach(model, "bone", r=4, verbose=False).layers["0"].update.delta
        >>> tuple(delta.D.shape)
        (4, 6)

    Reference:
        @inproceedings{kang2026miss,
          title = {MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
                   Structure},
          author = {Kang, Jiale and Yin, Qingyu},
          booktitle = {ICLR}, year = {2026}, eprint = {2409.15371}
        }
    """

    gives: ClassVar[frozenset[str]] = frozenset(
        {"factors", "weight", "lookup", "sharded", "wrapped"}
    )

    def build(self, site: Site) -> BlockSum:
        return BlockSum(site, site.out_features)

    def peft_form(self) -> PeftForm:
        return peft_form(True)

    @classmethod
    def from_peft(cls, data: Mapping[str, object]) -> Bone | None:
        return cls() if mode_of(data) is True else None
