"""DoRA: magnitude and direction of each weight row are trained separately, with any ΔW.

    V = W + ΔW (out, in);  c = row norms of V (out,);  g = m / c;  W' = diag(g) V
    y = g ∘ (x Vᵀ) + b                                        the bias is not scaled
    ∂L/∂V = diag(g) G with c held constant (`detach`), ∂L/∂m = rowsum(G ∘ V) / c

The paper writes the matrix as (in, out); in torch's layout the norm runs over the inputs, with one
magnitude per output feature, as in the authors' code and PEFT. For an embedding the magnitude has
one entry per output dimension.

Dropout: `update` is y = g ∘ (x Wᵀ + ΔW(drop x)) + b, the meaning of `lora_dropout` everywhere else.
`authors` is y = x Wᵀ + b + (g − 1) ∘ (drop(x) Wᵀ) + g ∘ ΔW(drop x), the authors' and PEFT's form,
which drops the magnitude's correction too and needs a second product with W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.interfaces import BaseLike, KernelLike, Site, UpdateLike
from lorica.methods.combine.base import AbstractCombine, CombineChoice
from lorica.methods.fields import one_of


class DoraCombine(AbstractCombine):
    roles: ClassVar[dict[str, str]] = {"m": "magnitude"}

    def __init__(self, site: Site, *, detach: bool, drop_correction: bool) -> None:
        super().__init__()
        ones = torch.ones(site.shape(site.out_features), dtype=site.dtype, device=site.device)
        self.m = nn.Parameter(ones)
        self.detach = detach
        self.drop_correction = drop_correction

    @torch.no_grad()
    def start(self, base: BaseLike, update: UpdateLike) -> None:
        # The same function as in forward, so that g is exactly 1 and the start exact.
        self.m.copy_(self._norms(base, update)[0])

    def _norms(
        self, base: BaseLike, update: UpdateLike, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """c (out,), and V where it was formed and is kept. An embedding's V would be too large,
        and autograd would save a V with gradients."""
        if self.detach and not update.lookup:
            return update.formed_norms(base, keep=keep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            return update.row_norms(base), None

    def gain(self, base: BaseLike, update: UpdateLike) -> Tensor:
        """g = m / c (out,); a row of zeros has c = 0 and remains a row of zeros."""
        return self._over(self._norms(base, update)[0])

    def _over(self, c: Tensor) -> Tensor:
        c = c.to(self.m.dtype)  # rounded as m was at the start
        c = c.clamp_min(torch.finfo(c.dtype).tiny)
        return self.m / (c.detach() if self.detach else c)  # forward mode differentiates all else

    def forward(self, x: Tensor, base: BaseLike, update: UpdateLike, kernel: KernelLike) -> Tensor:
        if self.drop_correction and update.dropping:
            return self._authors(x, base, update, self.gain(base, update))

        def gain(forms: bool) -> tuple[Tensor, Tensor | None]:
            c, v = self._norms(base, update, keep=forms)
            return self._over(c), v

        return kernel.product(x, base, update, gain=gain)

    def _authors(self, x: Tensor, base: BaseLike, update: UpdateLike, g: Tensor) -> Tensor:
        dropped, keep = update.drop(x)

        def frozen(z: Tensor, mask: Tensor | None) -> Tensor:
            y, still = base.product(z), update.undropped_part(z)
            y = y if still is None else y + still
            return y if mask is None else y * mask

        y = frozen(x, None)
        moving = update.dropped_part(dropped, base, keep)
        y = (y + (g - 1) * frozen(dropped, keep) + g * moving).to(y.dtype)
        bias = base.bias()
        return y if bias is None else y + bias.to(y.dtype)

    def effective(self, base: BaseLike, update: UpdateLike) -> tuple[Tensor, Tensor | None]:
        delta = update.weight(base)
        v = base.weight().to(delta.dtype) + delta
        return self.gain(base, update).to(v.dtype)[..., None] * v, base.bias()


@dataclass(frozen=True, kw_only=True)
class Dora(CombineChoice):
    """Weight-decomposed adaptation: W' = diag(m / ‖W + ΔW‖) (W + ΔW), with any delta that has a
    weight.

    m starts at the row norms of W + ΔW, so the function is kept; it trains at the factors' rate
    without weight decay, which would pull the row norms to 0.

    Cost: one parameter per output; each forward needs the row norms of W + ΔW and backward the
    layer's output, about 3 % of a step; nothing after merging.
    When: low ranks, where the paper found the largest gap to LoRA; try half of LoRA's rank first.

    Args:
        detach: treat the norm as a constant in backward (default, the authors' choice: less memory,
            about equal accuracy). False gives the exact gradient, orthogonal to each row of V.
        dropout: `update` (default) or `authors`, see the equations above the class.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("dora(dropout='authors')").text()
        "dora(dropout='authors')"

    Reference:
        @inproceedings{liu2024dora,
          title = {DoRA: Weight-Decomposed Low-Rank Adaptation},
          author = {Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and
                    Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Chen, Min-Hung},
          booktitle = {ICML}, year = {2024}, eprint = {2402.09353}
        }
    """

    detach: bool = True
    dropout: str = "update"

    needs: ClassVar[frozenset[str]] = frozenset({"wrapped", "weight"})
    peft_flags: ClassVar[Mapping[str, object] | None] = {"use_dora": True}
    peft_tensors: ClassVar[Mapping[str, str]] = {"m": "lora_magnitude_vector"}
    experts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of(self, "dropout", "update", "authors")
        one_of(self, "detach", True, False)

    def serves_experts(self) -> bool:
        return self.dropout == "update"  # the authors' form needs a second product with W

    # Authors: slightly below LoRA's rate; 1e-4 in their LLaMA3-8B runs.
    default_learning_rate: ClassVar[float | None] = 1e-4

    def build(self, site: Site) -> DoraCombine:
        return DoraCombine(site, detach=self.detach, drop_correction=self.dropout == "authors")
