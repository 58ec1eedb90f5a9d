"""What a model from random weights starts with: its recipe, its rate, and its vocabulary.

`lorica.recipe` and transformers are imported inside the functions: importing this module costs
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorica.run import model_configs
from lorica.run.options import PretrainOptions, UsageError
from lorica.run.recipe import recipe_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lorica.recipe.recipe import Recipe

METHOD = "full"
LEARNING_RATE = 1e-3  # SwitchLoRA's for ordinary training, at every size


def scratch_recipe(options: PretrainOptions) -> Recipe:
    """The recipe that the options ask for, under which everything trains; left out, its rank is a
    quarter of the model's width, as in the papers.

    Raises:
        UsageError: there is none.
    """
    from lorica.methods.optional import StartsFromUnquantised

    options = replace(options, method=options.method or METHOD)
    recipe = recipe_of(options)
    fixed = any(choice.only_r is not None for choice in recipe.choices)
    if "r" in recipe.takes and options.r is None and not fixed:
        config = model_configs.find(
            options.model_config, trust_remote_code=options.trust_remote_code
        ).config.get_text_config()
        width: Any = getattr(config, "hidden_size", None)
        options = options if width is None else replace(options, r=max(1, width // 4))
        recipe = recipe_of(options)
    if isinstance(recipe.init, StartsFromUnquantised):
        raise UsageError(
            f"`{recipe.text()}` starts from what quantisation takes away, and pre-training starts"
            " from random weights, which nothing quantises; leave it out"
        )
    return recipe if recipe.whole else recipe_of(options, train_rest=True)


def scratch_rate(recipe: Recipe) -> tuple[float, str]:
    """The default rate and what chose it: the rule or a schedule, which shape a whole run, or
    ordinary training. The rates of starts, scales and forms are for fine-tuning a checkpoint.

    Example:
        >>> from lorica.recipe.recipe import Recipe
        >>> scratch_rate(Recipe.parse("lora"))
        (0.001, 'pre-training')
    """
    for axis in ("rules", "schedules"):
        rated = [(c.default_learning_rate, c.name) for c in recipe.of(axis)]
        if found := [(rate, name) for rate, name in rated if rate is not None]:
            return min(found)
    return LEARNING_RATE, "pre-training"


def settled(
    shape: model_configs.Plan, options: PretrainOptions, tokenizer: PreTrainedTokenizerBase | None
) -> PretrainedConfig:
    """The shape's configuration with the tokenizer's vocabulary and special tokens.

    Args:
        tokenizer: given, or trained; None: there is none yet.

    Raises:
        UsageError: the vocabulary is too small for it.
    """
    text: Any = shape.config.get_text_config()
    size = 0 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    fixed = shape.fixed or tokenizer is None
    given = options.vocab_size if fixed or options.tokenizer is not None else None
    text.vocab_size = given or (shape.vocabulary if fixed else size)
    if text.vocab_size < size:
        what = (
            f"`--vocab-size {given}`"
            if given
            else f"the vocabulary of `--model-config {options.model_config}`, {text.vocab_size:,},"
        )
        raise UsageError(
            f"{what} is too small for the tokenizer `{options.tokenizer}`, which has {size:,}"
            f" tokens; type `--vocab-size {size}`"
        )
    if tokenizer is not None:
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, end
        # An embedding that pads never trains, so the end of text must not be it.
        text.pad_token_id = None if pad == end else pad
    return shape.config
