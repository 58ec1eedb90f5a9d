"""A merged model on disk: what any program loads, and how far its numbers are from the adapted
model's."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.formats.atomic_folder import check_free, first, together, writing
from lorica.methods.optional import ApproximatesWeight
from lorica.model.adapters import Adapters
from lorica.model.attach import merge
from lorica.model.quantised import floating_dtype, quantised
from lorica.tensors.modules import evaluating
from lorica.text import clear_errors
from lorica.training.checks import check_effect

MARKS = ("config.json",)
# Rounding errors of independent weights add up as √layers, those of the layers between them come on
# top. Measured over five families, three dtypes and three methods the mean change is at most 2.8 of
# u·√(layers + 4)·rms, u the unit of rounding.
_SLACK, _BETWEEN = 5.0, 4


_WAYS = {
    "merged": "",
    "published": " with the unquantised weights",
    "dequantised": " with the values of the quantised weights",
    "quantised": " and quantised again",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far the output (logits) on a sample went: `max_change` and `mean_change` are absolute
    differences, `rms` is the size of the output, `relative_change` the difference's size as a part
    of it."""

    max_change: float
    mean_change: float
    rms: float
    relative_change: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Change:
        change, rms = (after - before).abs(), float(before.square().mean().sqrt())
        size = float(change.square().mean().sqrt())
        return cls(
            max_change=float(change.max()),
            mean_change=float(change.mean()),
            rms=rms,
            relative_change=size / rms if rms else float(size > 0),
        )


@dataclass(frozen=True, kw_only=True)
class Merged(Change):
    """What merging did; `as_dict` is JSON-ready.

    `way` says what was written: `merged`, or of a quantised base `published` (the update in the
    unquantised weights), `dequantised` (in the quantised weights' values) or `quantised` (packed
    again). `explained` is the mean change that rounding to `dtype` explains at most, and for
    `published` what the quantisation did to the base alone, twice. `others` are the ways that were
    measured and not written. `approximated` is not empty where an update was merged that no matrix
    is: {module path: what is lost of its output}.
    """

    path: Path
    way: str
    dtype: str
    layers: int
    untied: bool
    explained: float
    others: Mapping[str, Change] = field(default_factory=dict)
    approximated: Mapping[str, float] = field(default_factory=dict)

    @property
    def suspicious(self) -> bool:
        """Whether the change is larger than rounding explains (a change that is no number too)."""
        return not self.mean_change <= self.explained

    def as_dict(self) -> dict[str, Any]:
        data = {**vars(self), "path": str(self.path), "approximated": dict(self.approximated)}
        others = {way: vars(change) for way, change in self.others.items()}
        return {**data, "others": others, "suspicious": self.suspicious}

    def __str__(self) -> str:
        what = "quantisation" if self.way == "published" else "rounding"
        verdict = f"MORE than {what} explains" if self.suspicious else f"{what} explains it"
        if self.approximated:
            worst = max(self.approximated.values())
            verdict = f"an approximation, which loses up to {worst:.2e} of a layer's update"
        return (
            f"merged {self.layers} layers{_WAYS[self.way]} into {self.path} ({self.dtype}); logits"
            f" changed by {self.mean_change:.2e} on average, {self.max_change:.2e} at most, of a"
            f" size of {self.rms:.2e}: {verdict}"
            + "".join(
                f"; merged{_WAYS[way]} they would change by {c.mean_change:.2e} on average"
                for way, c in self.others.items()
            )
        )


@clear_errors()
def merge_to(
    model: nn.Module | Adapters,
    out: str | Path,
    *,
    published: Adapters | None = None,
    quantization: Any = None,  # Any: transformers has a class for each method
    tokenizer: Any = None,
    max_shard_size: str = "5GB",
    sample: Mapping[str, Tensor] | None = None,
    approximate: bool = False,
    accept_change: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Merge the adapters into the model and write it as an ordinary transformers model.

    The effective weights are formed in float32 and rounded once to the base's dtype. The model in
    memory is merged too. The folder is complete or absent. With several processes all have to call;
    the first one writes.

    Args:
        model: an adapted transformers model, or its handle.
        out: the folder.
        published: the same adapters on the unquantised model, where this one is quantised: they are
            merged there, and that is written. Default: the quantised weights' values are.
        quantization: transformers' configuration of how to quantise the merged model again.
            Default: what is written is not quantised.
        tokenizer: anything with `save_pretrained`, written beside the model.
        max_shard_size: of one file, as transformers writes it.
        sample: keyword arguments of a forward pass on which the change is measured. Default: 32
            tokens drawn from the vocabulary, always the same.
        approximate: merge updates that are no matrix (a layer's depends on what others see) into
            one that nearly computes them on the sample; see `ApproximatesWeight`.
        accept_change: write the model also where the logits change by more than is explained.
        overwrite: replace a model that is there.

    Raises:
        ValueError: nothing is attached, not a transformers model, the folder is taken, no sample
            can be made up for this model, `approximate` where merging is exact, `published` or
            `quantization` where the base is not quantised, or a larger change than is explained.

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
    recipe = adapters.recipe
    if approximate and "weight" in recipe.given():
        raise ValueError(
            f"`approximate` has no effect: `{recipe.text()}` has a ΔW in every layer, so merging is"
            " exact; leave it out (`--approximate`)"
        )
    sample = dict(sample) if sample is not None else make_sample(model)
    count = len(adapters.layers)
    tied = [n for n in [*adapters.layers, *adapters.saved] if n in adapters.summary.tied]
    tied += [n for n, table in adapters.tables.items() if table.alone]
    packed = bool(quantised(model))
    if not packed and (published is not None or quantization is not None):
        name = "quantization" if published is None else "published"
        raise ValueError(f"`{name}` has no effect: this base is not quantised; leave it out")
    dtype = next((layer.store.dtype for _, layer in adapters), model.dtype)
    dtype = floating_dtype(model) if packed else dtype
    check_effect(adapters, "the merged model")
    before, moved = outputs(model, sample), 0.0
    if published is not None:
        with adapters.disabled(), published.disabled():
            bare = Change.of(outputs(model, sample), outputs(published.model, sample))
        moved = 2 * bare.mean_change
    ways: dict[str, Change] = {}
    with stand_in(adapters, sample) if approximate else contextlib.nullcontext({}) as lost:
        merge(model)
    ways[way := "dequantised" if packed else "merged"] = Change.of(before, outputs(model, sample))
    if published is not None:
        assert isinstance(published.model, PreTrainedModel)
        model, dtype = published.model, floating_dtype(published.model)
        with stand_in(published, sample) if approximate else contextlib.nullcontext({}) as lost:
            merge(model)
        ways[way := "published"] = Change.of(before, outputs(model, sample))
    if quantization is not None:
        model = _quantised_again(model, quantization, out.parent, keep=bool(tied))
        ways[way := "quantised"] = Change.of(before, outputs(model, sample))
    change = ways.pop(way)
    unit = torch.finfo(dtype).eps / 2
    explained = _SLACK * unit * math.sqrt(count + _BETWEEN) * change.rms
    merged = Merged(
        **vars(change),
        path=out,
        way=way,
        dtype=str(dtype).removeprefix("torch."),
        layers=count,
        untied=bool(tied),
        explained=explained + moved * (way == "published"),
        others=ways,
        approximated=lost,
    )
    if merged.suspicious and not (approximate or accept_change):
        raise ValueError(_refusal(merged, packed))
    if first():
        needs = sum(p.nbytes for p in model.parameters())
        with writing(out, overwrite=overwrite, marks=MARKS, needs=needs) as folder:
            # A tie that was broken must not be mended on loading, so every weight has its entry.
            state = _every_entry(model) if tied and way != "quantised" else None
            model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if way != "quantised":
                _check_untied(folder, tied, model)
    together()
    return merged


def _refusal(merged: Merged, packed: bool) -> str:
    """Why a merged model is not written."""
    what = f"rounding to {merged.dtype}"
    remedy = "load the base in float32 and merge again"
    if packed:
        remedy = "write the quantised weights' values (`--into dequantised`), which are exact"
    if merged.way == "published":
        what = "quantising the base, twice, and rounding"
    if merged.way == "dequantised":
        remedy = "merge into the unquantised weights (`--into published`)"
    return (
        f"merging{_WAYS[merged.way]} changed the logits by {merged.mean_change:.2e} on average,"
        f" {merged.max_change:.2e} at most, and {what} explains {merged.explained:.2e} on average"
        f" (their size is {merged.rms:.2e}), so the merged model would not be the trained one."
        f" {merged.path} was not written, and the model in memory is spoiled. Use the adapter as it"
        f" is, {remedy}, or accept this change (`--accept-change`, in Python `accept_change=True`)"
        + "".join(
            f"; merged{_WAYS[way]} they change by {c.mean_change:.2e} on average"
            for way, c in merged.others.items()
        )
    )


def _every_entry(model: nn.Module) -> dict[str, Tensor]:
    """A state in which weights that were shared have an entry each."""
    return {n: t.clone() for n, t in model.state_dict().items()}


def _quantised_again(
    model: PreTrainedModel, quantization: Any, where: Path, *, keep: bool
) -> PreTrainedModel:
    """The model as transformers quantises it while loading, by way of a folder that is removed.

    Args:
        keep: weights that were shared stay apart.
    """
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        model.save_pretrained(folder, state_dict=_every_entry(model) if keep else None)
        return type(model).from_pretrained(
            folder, quantization_config=quantization, dtype=floating_dtype(model)
        )


def _check_untied(folder: Path, tied: list[str], model: PreTrainedModel) -> None:
    """That no reader ties anew what training took apart: each has a weight of its own in the files,
    and the configuration says so, unless other weights of the model are shared still: transformers
    has one flag for all, and leaves alone what differs in the files.

    Raises:
        ValueError: else.
    """
    if not tied:
        return
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    lost = [n for n in tied if not any(k.startswith(f"{n}.") for k in stored)]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    shared = len(set(every)) < len(every)
    if lost or (config.get("tie_word_embeddings", True) and not shared):
        raise ValueError(
            f"{', '.join(lost or tied)} was trained apart from the weight it shared with"
            f" another module, and what transformers writes would be tied again by"
            " whoever loads it; nothing was written. Use the adapter as it is"
        )


def stand_in(
    adapters: Adapters, sample: Mapping[str, Tensor] | None
) -> contextlib.AbstractContextManager[dict[str, float]]:
    """Within, updates that are no matrix have one that nearly computes them on the sample; what is
    lost by that, {module path: part of its update's output}. Others need no sample."""
    recipe = adapters.recipe
    if "weight" in recipe.given():
        return contextlib.nullcontext({})
    assert sample is not None
    if not isinstance(recipe.delta, ApproximatesWeight):
        raise AssertionError(f"`{recipe.text()}` has no ΔW, and no matrix that is near")
    return recipe.delta.approximated(adapters, [sample])


@torch.no_grad()
def outputs(model: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
    """The model's first output (logits) in float64, dropout off.

    What is measured are weights: packed modules that round activations, too, in evaluation (int8 of
    bitsandbytes) compute as in training.
    """
    with evaluating(model):
        for store in quantised(model).values():
            store.module.training = True
        first = model(**sample)
    first = first if isinstance(first, Tensor) else first[0]
    return first.detach().double().cpu()


def make_sample(model: nn.Module, length: int = 32) -> dict[str, Tensor]:
    """An input for a forward pass, always the same for one model: token ids (1, length), an image
    (1, channels, height, width), or speech (1, samples) or (1, mel bins, frames).

    Raises:
        ValueError: the model reads something else.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no transformers model, so what it reads is not known; give"
            " an input as `sample={...}`, by the names of its arguments"
        )
    config = model.config.get_text_config()
    size, name = getattr(config, "vocab_size", None), model.main_input_name
    shape = _input_shape(model.config, name)
    if shape is None and not (name == "input_ids" and size):
        raise ValueError(
            f"{type(model).__name__} reads `{name}`, which can't be made up; give an input as"
            " `sample={...}`"
        )
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size or 1, (1, length), generator=generator).to(model.device)
    out = {"input_ids": ids}
    if shape is not None:
        out = {name: torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    if model.config.is_encoder_decoder:
        out["decoder_input_ids"] = ids[:, : length // 2]
    return out


def _input_shape(config: Any, name: str) -> tuple[int, ...] | None:
    """Shape of an image, or of speech, as a model's configuration tells it; None: it doesn't."""
    config = getattr(config, "vision_config", None) or config
    image, mel = getattr(config, "image_size", None), getattr(config, "num_mel_bins", None)
    if name == "pixel_values" and image is not None:
        sides = (image, image) if isinstance(image, int) else tuple(image)
        return (1, getattr(config, "num_channels", 3), *sides)
    if name == "input_features" and mel is not None:
        frames = getattr(config, "max_source_positions", None) or 500
        return (1, mel, 2 * frames)  # Whisper's first layer halves them
    return (1, 16_000) if name == "input_values" else None
