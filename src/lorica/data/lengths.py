"""How long a row of tokens may be for a model and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# RoBERTa and what was made after it: the first token's position is the padding's id and one.
_COUNT_FROM_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip


def longest(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a row may have.

    Args:
        config: the model's.
        tokenizer: the model's.

    Returns:
        The smaller of what the two allow; None where there is no limit, or neither states one.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import GPT2Config
        >>> longest(GPT2Config(n_positions=64), SimpleNamespace(model_max_length=512))
        64
    """
    has = vars(config)
    places: Any = has.get("max_position_embeddings")
    if "relative_attention_num_buckets" in has and places is None:
        return None  # T5's positions are distances; the length in its files is its pre-training's
    if isinstance(places, int) and config.model_type in _COUNT_FROM_PADDING:
        padding = config.pad_token_id
        places -= (1 if padding is None else padding) + 1
    known = [places, has.get("n_positions"), tokenizer.model_max_length]
    return min((n for n in known if isinstance(n, int) and 0 < n < 10**9), default=None)
