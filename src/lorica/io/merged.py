"""A merged model on disk: what any program loads, and how far its numbers are from the adapted
model's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.adapters import Adapters
from lorica.attach import merge
from lorica.io.folder import check_free, first, together, writing

MARKS = ("config.json",)
# Rounding errors of independent weights add up as √layers, those of the layers between them come on
# top. Measured over five families, three dtypes and three methods the mean change is at most 2.8 of
# u·√(layers + 4)·rms, u the unit of rounding.
_SLACK, _BETWEEN = 5.0, 4


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What merging did; `as_dict` is JSON-ready.

    `max_change` and `mean_change` are absolute differences of the output (logits) on the sample,
    `explained` is the mean that rounding to `dtype` explains at most, `rms` the size of the output.
    """

    path: Path
    dtype: str
    layers: int
    untied: bool
    max_change: float
    mean_change: float
    rms: float
    explained: float

    @property
    def suspicious(self) -> bool:
        """Whether the change is larger than rounding explains (a change that is no number too)."""
        return not self.mean_change <= self.explained

    def as_dict(self) -> dict[str, Any]:
        data = {**dataclasses.asdict(self), "path": str(self.path)}
        return {**data, "suspicious": self.suspicious}

    def __str__(self) -> str:
        verdict = "MORE than rounding explains" if self.suspicious else "rounding explains it"
        return (
            f"merged {self.layers} layers into {self.path} ({self.dtype}); logits changed by"
            f" {self.mean_change:.2e} on average, {self.max_change:.2e} at most, of a size of"
            f" {self.rms:.2e}: {verdict}"
        )


def merge_to(
    model: nn.Module | Adapters,
    out: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: str = "5GB",
    sample: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Merged:
    """Merge the adapters into the model and write it as an ordinary transformers model.

    The effective weights are formed in float32 and rounded once to the base's dtype. The model in
    memory is merged too. The folder is complete or absent. With several processes all have to call;
    the first one writes.

    Args:
        model: an adapted transformers model, or its handle.
        out: the folder.
        tokenizer: anything with `save_pretrained`, written beside the model.
        max_shard_size: of one file, as transformers writes it.
        sample: keyword arguments of a forward pass on which the change is measured. Default: 32
            tokens drawn from the vocabulary, always the same.
        overwrite: replace a model that is there.

    Raises:
        ValueError: nothing is attached, not a transformers model, the folder is taken, or no sample
            can be made up for this model.

    Example:
        >>> import tempfile, lorica
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=32,
        ...                     bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> _ = lorica.attach(model, "pissa", r=2, verbose=False)
        >>> merge_to(model, tempfile.mkdtemp() + "/out").suspicious
        False
    """
    adapters = model if isinstance(model, Adapters) else Adapters.of(model)
    model, out = adapters.model, Path(out)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"this {type(model).__name__} is no transformers model, so no program would know how to"
            " load a folder of it; merge it in memory with `lorica.merge(model)` and save it as you"
            " save the plain model"
        )
    if first():
        check_free(out, overwrite=overwrite, marks=MARKS)
    sample = dict(sample) if sample is not None else make_sample(model)
    count = len(adapters.layers)
    tied = any(n in adapters.contract.tied for n in [*adapters.layers, *adapters.saved])
    dtype = next((layer.store.parameter.dtype for _, layer in adapters), model.dtype)
    before = outputs(model, sample)
    merge(model)
    after = outputs(model, sample)
    if first():
        with writing(out, overwrite=overwrite, marks=MARKS) as folder:
            # A tie that was broken must not be mended on loading, so every weight has its entry.
            state = {n: t.clone() for n, t in model.state_dict().items()} if tied else None
            model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    together()
    change = (after - before).abs()
    rms = float(before.square().mean().sqrt())
    unit = torch.finfo(dtype).eps / 2
    return Merged(
        path=out,
        dtype=str(dtype).removeprefix("torch."),
        layers=count,
        untied=tied,
        max_change=float(change.max()),
        mean_change=float(change.mean()),
        rms=rms,
        explained=_SLACK * unit * math.sqrt(count + _BETWEEN) * rms,
    )


@torch.no_grad()
def outputs(model: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
    """The model's first output (logits) in float64, dropout off."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        first = model(**sample)[0]
    finally:
        for module, mode in training.items():
            module.training = mode
    return first.detach().double().cpu()


def make_sample(model: PreTrainedModel, length: int = 32) -> dict[str, Tensor]:
    """Token ids (1, length) for a forward pass, always the same for one model.

    Raises:
        ValueError: the model doesn't read token ids.
    """
    config = model.config.get_text_config()
    size = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or not size:
        raise ValueError(
            f"{type(model).__name__} reads `{model.main_input_name}`, which can't be made up; give"
            " an input as `sample={...}`"
        )
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, length), generator=generator).to(model.device)
    out = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        out["decoder_input_ids"] = ids[:, : length // 2]
    return out
