"""What trains: the method and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from lorica.run.options.kinds import HINT, JSON, METHOD, MODULES, NUMBER, WHOLE, WHOLES, choice


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The method and the fields of its recipe.

    Args:
        method: method names joined by `+`, e.g. `dora+olora` or `pissa(niter=16)`; `full`
            trains every weight. `lorica methods` lists them.
        r: rank of the trained update. Default: the method's own, usually 16.
        lora_alpha: alpha in the scale, e.g. s = alpha / r for LoRA. Default: the method's own.
        lora_dropout: probability of dropping an input feature of the update.
        lora_dropout_on: `update`: dropout applies to the frozen factors too; `delta`: to the
            trained factors only, as in PEFT.
        target_modules: layers to adapt: names (the end of a module path), one regular
            expression, or `all-linear` for every linear layer except the output head.
        target_parameters: expert tensors to adapt, by the end of their path, e.g.
            `mlp.experts.down_proj`. Default: all of them beside `all-linear`, otherwise none.
        exclude_modules: layers to leave out, in the same forms as `--target-modules`.
        layers_to_transform: indices of the transformer blocks to adapt. Default: all.
        rank_pattern: {module pattern: r}, overrides `r` for the layers that match.
        alpha_pattern: {module pattern: lora_alpha}, overrides `lora_alpha` for the layers that
            match.
    """

    method: Annotated[str | None, METHOD, HINT] = None
    r: Annotated[int | None, WHOLE, HINT] = None
    lora_alpha: Annotated[float | None, NUMBER, HINT] = None
    lora_dropout: Annotated[float | None, NUMBER, HINT] = None
    lora_dropout_on: Annotated[str | None, choice("update", "delta"), HINT] = None
    target_modules: Annotated[str | tuple[str, ...] | None, MODULES, HINT] = None
    target_parameters: Annotated[tuple[str, ...] | None, MODULES, HINT] = None
    exclude_modules: Annotated[str | tuple[str, ...] | None, MODULES, HINT] = None
    layers_to_transform: Annotated[tuple[int, ...] | None, WHOLES, HINT] = None
    rank_pattern: Annotated[dict[str, int] | None, JSON, HINT] = None
    alpha_pattern: Annotated[dict[str, float] | None, JSON, HINT] = None

    recipe_names: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "lora_dropout", "lora_dropout_on", "target_modules",
        "target_parameters", "exclude_modules", "layers_to_transform", "rank_pattern",
        "alpha_pattern",
    )  # fmt: skip

    def recipe_fields(self) -> dict[str, Any]:
        """The fields of `Recipe` that were given; of switches, those that are on."""
        given = {name: getattr(self, name) for name in self.recipe_names}
        return {n: value for n, value in given.items() if value is not None and value is not False}
