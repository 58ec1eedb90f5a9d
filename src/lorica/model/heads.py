"""Which modules train in full without being named in `modules_to_save`, and why.

1. The head of a model for classification, regression or question answering: all that it has outside
   its backbone. A checkpoint seldom has weights for it, and where it has, it was trained for
   another task. Output embeddings and projectors belong to the pretrained model and are no heads.
2. Modules for which the checkpoint had no weights, where the caller says so with the `missing_keys`
   that transformers reported on loading. Output embeddings are left out: a checkpoint without them
   is usually not the one that was meant.

Nothing is read off the parameters: a copied, replaced or converted module says nothing about where
its values came from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn
from transformers import PreTrainedModel

from lorica.recipe.recipe import Recipe
from lorica.tensors.modules import named_modules

# Endings of transformers' class names; a class from elsewhere follows them too.
_TASKS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForNextSentencePrediction", "ForImageClassification",
    "ForVideoClassification", "ForAudioClassification", "ForAudioFrameClassification",
)  # fmt: skip
NO_WEIGHTS = "the checkpoint has no weights for it"


def within(path: str, roots: Collection[str]) -> bool:
    """Whether a path is one of `roots` or lies below one."""
    return any(path == r or path.startswith(r + ".") for r in roots)


def topmost(paths: Collection[str]) -> list[str]:
    """The paths that lie below no other."""
    return [p for p in paths if not within(p, [q for q in paths if q != p])]


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, of a transformers model that has one."""
    if not isinstance(model, PreTrainedModel):
        return None
    get: Callable[[], nn.Module | None] = model.get_output_embeddings
    return get()


def head_names(model: nn.Module) -> set[str]:
    """Paths of the head: the output embeddings, and what a transformers model has outside its
    backbone."""
    if not isinstance(model, PreTrainedModel):
        return set()
    names = {id(m): n for n, m in named_modules(model)}
    outputs = output_embeddings(model)
    heads = {names[id(outputs)]} if id(outputs) in names else set[str]()
    backbone = model.base_model
    if backbone is not model:
        root = names[id(backbone)]
        heads |= {n for n in names.values() if n and not within(n, [root])}
    return heads


def task_head(model: nn.Module) -> list[str]:
    """Topmost modules of the head of a model for classification, regression or question
    answering; none of any other model."""
    if not isinstance(model, PreTrainedModel):
        return []
    if not any(cls.__name__.endswith(_TASKS) for cls in type(model).__mro__):
        return []
    if model.base_model is not model:
        found = head_names(model)
    else:  # no module holds the backbone alone: T5ForQuestionAnswering, WhisperForAudio...
        parts = {n: m for n, m in named_modules(model) if n and "." not in n}
        pretrained = (PreTrainedModel, nn.Embedding)
        found = {n for n, m in parts.items() if not isinstance(m, pretrained)}
    modules = dict(named_modules(model))
    found = {n for n in found if next(modules[n].parameters(), None) is not None}
    return [n for n in modules if n in set(topmost(found))]


def without_weights(model: nn.Module, missing_keys: Collection[str]) -> list[str]:
    """Topmost modules whose parameters were all missing from the checkpoint, but for the output
    embeddings."""
    missing, outputs = set(missing_keys), output_embeddings(model)
    found: list[str] = []
    for name, module in named_modules(model):
        own = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if name and own and not within(name, found) and missing.issuperset(own):
            if all(m is not outputs for m in module.modules()):
                found.append(name)
    return found


def in_full(model: nn.Module, missing_keys: Collection[str] = ()) -> dict[str, str]:
    """{module path: why it trains in full} of what no option names."""
    head = dict.fromkeys(task_head(model), f"the head of a {type(model).__name__}")
    bare = dict.fromkeys(without_weights(model, missing_keys), NO_WEIGHTS)
    both = {**head, **bare}
    top = set(topmost(both))
    return {n: both[n] for n, _ in named_modules(model) if n in top}


def refuse_missing(
    model: nn.Module, missing_keys: Collection[str], recipe: Recipe, adapted: Collection[str],
    saved: Collection[str],
) -> None:  # fmt: skip
    """Refuse parameters that the checkpoint had no values for and that would not train: whatever is
    made of them now, the next process draws others.

    Args:
        missing_keys: as transformers reported them; those of buffers are let pass.
        adapted, saved: paths of the layers that are adapted and of the modules that train in full.

    Raises:
        ValueError: naming them.
    """
    if recipe.whole or recipe.train_rest or not missing_keys:
        return
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    frozen: list[str] = []
    for key in sorted(parameters.intersection(missing_keys)):
        owner, _, leaf = key.rpartition(".")
        trains = within(owner, saved) or (owner in adapted and not recipe.delta.wraps)
        if leaf == "bias":
            trains |= recipe.bias == "all" or (recipe.bias != "none" and owner in adapted)
        if not trains:
            frozen.append(key)
    if frozen:
        owners = topmost(dict.fromkeys(key.rpartition(".")[0] for key in frozen))
        some = ", ".join(frozen[:6]) + (", ..." if len(frozen) > 6 else "")
        raise ValueError(
            f"the checkpoint has no weights for {some}, which would stay frozen at the random"
            " values that this process drew. Train them in full with"
            f" `modules_to_save={owners[:6]}`, or load a checkpoint that has them"
        )
