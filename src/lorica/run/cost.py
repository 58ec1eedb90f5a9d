"""What pre-training would train and hold, from shapes alone: `lorica pretrain --dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lorica
from lorica.model.summary import Summary
from lorica.recipe.recipe import Recipe
from lorica.run import model_configs
from lorica.run.from_scratch import METHOD, scratch_recipe, settled
from lorica.run.load_model import load_tokenizer
from lorica.run.options import PretrainOptions
from lorica.run.start import quieten
from lorica.text import human

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Cost:
    """What a method trains of a model, in elements and bytes; nothing here is measured.

    Attributes:
        parameters: of the plain model.
        trainable: elements that train.
        gradient_bytes: what data-parallel processes exchange at every step: a gradient for each
            trainable element.
        optimizer_bytes: the rule's state of them.
        schedule_bytes: what schedules keep between steps, e.g. spare vectors; where it lies is an
            argument of the schedule.
        weight_bytes: all weights that are held, trained or not.
    """

    method: str
    parameters: int
    trainable: int
    gradient_bytes: int
    optimizer_bytes: int
    schedule_bytes: int
    weight_bytes: int
    summary: Summary

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "summary": self.summary.as_dict()}

    def __str__(self) -> str:
        share = 1 - self.trainable / max(self.parameters, 1)
        kept = f", {human(self.schedule_bytes)} of schedules' state" if self.schedule_bytes else ""
        less = f" ({share:.1%} less)" if share > 0 else ""
        return (
            f"{self.summary}\n{self.parameters:,} parameters, {self.trainable:,} train{less}\n"
            f"a step: {human(self.gradient_bytes)} of gradients to exchange between processes\n"
            f"held: {human(self.weight_bytes)} of weights, {human(self.optimizer_bytes)} of the"
            f" optimizer's state{kept}"
        )


def cost(
    config: str | PretrainedConfig,
    method: str | Recipe = METHOD,
    *,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Cost:
    """What pre-training would train and hold, from shapes alone (on the meta device).

    Args:
        config: a word of `lorica.run.model_configs`, a config.json, or a configuration.
        method: text form or recipe.
        trust_remote_code: run code that the model brings, or names.
        **fields: of `Recipe`, e.g. `r=512`.

    Example:
        >>> found = cost("llama-1b", "lora", r=512)
        >>> found.parameters, found.trainable
        (1339492352, 609720320)
    """
    name = config if isinstance(config, str) else type(config).__name__
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    plan = model_configs.find(config, **trust).config if isinstance(config, str) else config
    recipe = Recipe.parse(method, **fields)
    recipe = recipe if recipe.whole else Recipe.parse(recipe, train_rest=True)
    with torch.device("meta"):
        model = model_configs.build(plan, name, dtype=torch.float32, **trust)
    parameters = count(model)
    summary = lorica.attach(model, recipe, verbose=False).summary
    summary.defaults.pop("learning_rate", None)
    memory = summary.memory
    return Cost(
        method=recipe.text(),
        parameters=parameters,
        trainable=summary.trainable,
        gradient_bytes=memory["gradients"],
        optimizer_bytes=memory["optimizer"],
        schedule_bytes=memory.get("schedules", 0),
        weight_bytes=memory["base"] + memory["trained"] + memory["frozen factors"],
        summary=summary,
    )


def count(model: nn.Module) -> int:
    """Elements of a model's parameters, each once."""
    return sum(p.numel() for p in model.parameters())


def dry_run(options: PretrainOptions) -> Cost:
    """What the run that the options describe would train and hold; reads no data, writes nothing.

    Without a tokenizer that is given, the vocabulary is `vocab_size` or the shape's.

    Raises:
        UsageError, ValueError: as `pretrain`, as far as it is known without the data.
    """
    options.check()
    quieten()
    recipe = scratch_recipe(options)
    shape = model_configs.find(options.model_config, trust_remote_code=options.trust_remote_code)
    tokenizer = (
        None
        if options.tokenizer is None
        else load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    )
    config = settled(shape, options, tokenizer)
    return cost(config, recipe, trust_remote_code=options.trust_remote_code)
