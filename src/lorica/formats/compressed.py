"""A model whose layers no longer read their base: two thin layers in the place of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorica
from lorica.embedded import named
from lorica.formats.atomic_folder import check_free, first, together, writing
from lorica.formats.fields import Field, check_fields, check_given
from lorica.formats.foreign_code import read_config_dict, refuse_code
from lorica.formats.merge import Change, make_sample, outputs
from lorica.formats.safe_files import read_json, read_tensors, sha256, write_tensors
from lorica.methods.optional import OutlivesBase
from lorica.model.adapters import Adapters
from lorica.model.attach import merge
from lorica.model.layer import AdaptedLinear
from lorica.model.modules_to_save import replace
from lorica.tensors.dtensor_ops import read_full, reshard
from lorica.text import clear_errors, human, shorten

PACKED_CONFIG, PACKED_TENSORS = "compressed.json", "compressed.safetensors"
PACKED_MARKS = (PACKED_CONFIG,)
READER = 1  # raised when an older reader would misread what is written
_TEXT, _COUNT = Field(types=(str,)), Field(types=(int,))
_FIELDS = {
    "lorica": _TEXT, "reader": _COUNT, "class": _TEXT, "method": _TEXT,
    "ranks": Field(types=(dict,), items=(int,)), "parameters_before": _COUNT, "parameters": _COUNT,
    "bytes_before": _COUNT, "bytes": _COUNT, "tied": Field(types=(dict,), items=(str,)),
    "computed": Field(types=(list,), items=(str,)), "files": Field(types=(dict,), items=(str,)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What compressing did; `as_dict` is JSON-ready.

    `ranks` are those of the layers that became thin, {module path: rank}. Parameters and their
    bytes are counted over the whole model (the base without its adapters before), multiplies for
    one token over the layers that were adapted.
    """

    ranks: Mapping[str, int]
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    multiplies_before: int
    multiplies: int

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "ranks": dict(self.ranks)}


@dataclass(frozen=True, kw_only=True)
class Packed(Compressed):
    """A compressed model that was written, read back and found to compute the same logits.

    `logits`: how far they are from those of the adapted model; rounding, where its layers had a
    wider dtype than the base.
    """

    path: Path
    logits: Change

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "path": str(self.path), "logits": vars(self.logits)}

    def __str__(self) -> str:
        part = self.bytes / max(self.bytes_before, 1)
        return (
            f"compressed {len(self.ranks)} layers into {self.path}: {self.parameters_before:,} to"
            f" {self.parameters:,} parameters, {human(self.bytes_before)} to {human(self.bytes)}"
            f" ({part:.1%}), {self.multiplies_before:,} to {self.multiplies:,} multiplies a token"
            f" in these layers; logits changed by {self.logits.max_change:.2e} at most,"
            f" {self.logits.relative_change:.2e} of their size; read back, they are the same"
        )


@torch.no_grad()
def compress(model: nn.Module | Adapters) -> Compressed:
    """Leave a plain model with two thin `nn.Linear` in the place of each adapted layer, in place.

    For methods at whose end a layer is its update alone: x (s·BA)ᵀ + c becomes (x Aᵀ)(s·B)ᵀ + c,
    r·(in + out) parameters and multiplies for in·out. Ranks that are nothing are dropped. A layer
    that would not get smaller is merged into one dense layer. Tensors are rounded once to the
    base's dtype, as in `lorica.merge`.

    The pair is an `nn.Sequential`: models whose code reads a layer's `weight` (T5's feed-forward)
    cannot run with it. `load_compressed` reads the result's `state_dict()` back.

    Raises:
        ValueError: nothing is attached, a layer still reads its base, or the model is sharded.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> adapters = lorica.attach(model, "fade", r=2, verbose=False)
        >>> with torch.no_grad():
        ...     _ = adapters.layers["0"].update.delta.B.normal_()
        >>> adapters.layers["0"].combine.fade_(0.0)
        >>> done = compress(model)
        >>> done.ranks, done.parameters_before, done.parameters, done.multiplies
        ({'0': 2}, 272, 80, 64)
    """
    adapters = model if isinstance(model, Adapters) else Adapters.of(model)
    model = adapters.model
    reshard(model)
    held = [*adapters.base_parameters().values()]
    held += [p for m in adapters.saved.values() for p in m.base.parameters()]
    before, bytes_before = _size(held)
    made: dict[str, nn.Sequential] = {}
    ranks, whole, thin = {}, 0, 0
    for name, layer in adapters:
        dense = layer.in_features * layer.out_features
        pair = _pair(name, layer, adapters.recipe.text())
        narrow = len(pair[0].weight)  # type: ignore[arg-type]
        cost = narrow * (layer.in_features + layer.out_features)
        whole, thin = whole + dense, thin + min(cost, dense)
        if cost < dense:
            made[name], ranks[name] = pair, narrow
    merge(model)
    replace(model, made)
    after, bytes_after = _size(model.parameters())
    return Compressed(
        ranks=ranks,
        parameters_before=before,
        parameters=after,
        bytes_before=bytes_before,
        bytes=bytes_after,
        multiplies_before=whole,
        multiplies=thin,
    )


def load_compressed(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a plain model the shape and the tensors of one that `compress` left, in place.

    Args:
        model: as it was before it was adapted; its own weights don't count.
        state: `state_dict()` of the compressed model.

    Raises:
        RuntimeError: torch's, where tensors are missing, left over or of another shape.
    """
    made: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        down, up = state.get(f"{name}.0.weight"), state.get(f"{name}.1.weight")
        if f"{name}.weight" in state or down is None or up is None or [*module.children()]:
            continue
        made[name] = _sequence(down, up, state.get(f"{name}.1.bias")).train(module.training)
    replace(model, made)
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        if name in state:
            own.data = own.data.to(state[name].dtype)
    model.load_state_dict(state)
    return model


def _size(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Elements and bytes."""
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in parameters]
    return sum(n for n, _ in sizes), sum(b for _, b in sizes)


# -- as a folder -----------------------------------------------------------------------------------


@clear_errors()
def pack(
    model: nn.Module | Adapters,
    out: str | Path,
    *,
    tokenizer: Any = None,
    sample: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Packed:
    """`compress` a transformers model, write it, read it back and compare the logits.

    The folder holds `config.json`, `compressed.safetensors` and `compressed.json` (class, ranks, a
    hash of the weights). No `from_pretrained` knows thin layers, so none finds weights there;
    `unpack` does. It is complete or absent. The model in memory is compressed, too.

    Args:
        model: an adapted transformers model whose layers no longer read their base, or its handle.
        out: the folder.
        tokenizer: anything with `save_pretrained`, written beside the model.
        sample: keyword arguments of a forward pass, for the logits. Default: 32 tokens drawn from
            the vocabulary, always the same.
        overwrite: replace a compressed model that is there.

    Raises:
        ValueError: as `compress`; not a transformers model, the folder is taken, no sample can be
            made up, or the model's own code cannot run with thin layers.

    Example:
        >>> import tempfile, lorica
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, n_positions=32,
        ...                     bos_token_id=0, eos_token_id=0)
        >>> adapters = lorica.attach(GPT2LMHeadModel(config), "fade", r=2, verbose=False)
        >>> for _, layer in adapters:
        ...     layer.combine.fade_(0.0)
        >>> done = pack(adapters, tempfile.mkdtemp() + "/out")
        >>> type(unpack(done.path)).__name__, done.logits.max_change
        ('GPT2LMHeadModel', 0.0)
    """
    adapters = model if isinstance(model, Adapters) else Adapters.of(model)
    model, out = adapters.model, Path(out)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"this {type(model).__name__} is no transformers model, so no folder says how to build"
            " it; allowed are transformers' models. Type"
            " `lorica.formats.compressed.compress(model)` and save its `state_dict()`"
        )
    if first():
        check_free(out, overwrite=overwrite, marks=PACKED_MARKS)
    sample = dict(sample) if sample is not None else make_sample(model)
    method, before = adapters.recipe.text(), outputs(model, sample)
    done = compress(adapters)
    try:
        after = outputs(model, sample)
    except AttributeError as error:
        raise ValueError(
            f"the code of {type(model).__name__} looks into a layer and cannot run with two thin"
            f" ones in its place ({error}); load base and adapter anew and write merged weights"
            " (`--to merged`, in Python `lorica.formats.merge_to`)"
        ) from None
    if first():
        needs = sum(p.nbytes for p in model.parameters())
        with writing(out, overwrite=overwrite, marks=PACKED_MARKS, needs=needs) as folder:
            _write(model, folder, method, done)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            again = unpack(folder, attn_implementation=model.config._attn_implementation)
            read = outputs(again.to(model.device), sample)  # type: ignore[arg-type]
            if not torch.allclose(read, after, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(f"{type(model).__name__} computes other logits once read back")
    together()
    return Packed(**vars(done), path=out, logits=Change.of(before, after))


def _write(model: PreTrainedModel, folder: Path, method: str, done: Compressed) -> None:
    state, one, alias = model.state_dict(), {}, {}
    # Also what is computed at the start (rotary frequencies): a cast of the model rounds it.
    computed = {n: b for n, b in model.named_buffers() if n not in state}
    state |= computed
    for name, value in state.items():  # tied weights are written once
        key = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        alias[name] = one.setdefault(key, name)
    kept = {name: state[name] for name in dict.fromkeys(alias.values())}
    write_tensors(kept, folder / PACKED_TENSORS)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    info = {
        "lorica": lorica.__version__,
        "reader": READER,
        "class": type(model).__name__,
        "method": method,
        "base": named(model.config.name_or_path),
        **done.as_dict(),
        "tied": {name: other for name, other in alias.items() if name != other},
        "computed": list(computed),
        "files": {PACKED_TENSORS: sha256(folder / PACKED_TENSORS)},
    }
    text = json.dumps(info, indent=2, ensure_ascii=False)
    (folder / PACKED_CONFIG).write_text(text + "\n", encoding="utf-8")


@clear_errors()
def is_packed(folder: str | Path) -> bool:
    """Whether this is what `pack` wrote."""
    return (Path(folder) / PACKED_CONFIG).is_file()


@clear_errors()
def read_info(folder: str | Path) -> dict[str, Any]:
    """A checked `compressed.json`: class, method, base, ranks, sizes.

    Raises:
        ValueError: no such folder, a newer format, a value that is missing or of the wrong type.
    """
    folder = Path(folder)
    if not is_packed(folder):
        raise ValueError(
            f"{str(folder)!r} holds no compressed model: it has no {PACKED_CONFIG}. Name the folder"
            " that `lorica export --to compressed` wrote"
        )
    info = read_json(folder / PACKED_CONFIG)
    check_fields(info, _FIELDS, folder / PACKED_CONFIG)
    check_given(info, _FIELDS, folder / PACKED_CONFIG, "the file was cut. Copy the folder again")
    if info["reader"] > READER:
        raise ValueError(
            f"{folder / PACKED_CONFIG} was written by Lorica {info['lorica']} and needs a reader of"
            f" format {info['reader']}; this one reads up to {READER}. Upgrade: `pip install -U"
            " lorica`"
        )
    return info


@clear_errors()
def unpack(folder: str | Path, *, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model that `pack` wrote, in the dtypes it had, on the CPU, in evaluation mode.

    Args:
        attn_implementation: transformers'; None: its own choice.

    Raises:
        ValueError: no such folder, a newer format, a class that transformers does not have,
            weights that are missing, changed or of another shape, or a configuration that builds no
            such model. Code that a folder brings is never run.
    """
    import transformers

    folder, info = Path(folder), read_info(folder)
    tensors = read_tensors(folder / PACKED_TENSORS)
    if sha256(folder / PACKED_TENSORS) != info["files"].get(PACKED_TENSORS):
        raise ValueError(
            f"{folder / PACKED_TENSORS} is not the file that {PACKED_CONFIG} describes: truncated,"
            " or changed since it was written. Copy the folder again from where it came"
        )
    cls: Any = getattr(transformers, info["class"], None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise ValueError(
            f"{folder / PACKED_CONFIG} is of the class {info['class']!r}, which transformers"
            f" {transformers.__version__} does not have; install the one it was written with"
        )
    state = {**tensors, **{n: tensors[o] for n, o in info["tied"].items() if o in tensors}}
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} has no config.json that tells its model; copy the whole folder again"
            " from where it came"
        )
    config: Any = None
    try:
        raw = read_config_dict(str(folder))
    except Exception as error:  # transformers says what is wrong in many ways
        raise ValueError(_misfit(folder / "config.json", error)) from None
    refuse_code(raw, str(folder / "config.json"), attn_implementation=attn_implementation)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):  # weights are drawn, and written over
            model = cls._from_config(config, attn_implementation=attn_implementation)
    except Exception as error:  # transformers and torch say what is wrong in many ways
        raise ValueError(_misfit(folder / "config.json", error, info["class"], config)) from None
    computed = {name: state.pop(name) for name in info["computed"] if name in state}
    for name, buffer in model.named_buffers():
        if (value := computed.get(name, buffer)).shape != buffer.shape:
            raise ValueError(
                f"{folder / PACKED_TENSORS}: {shorten(name)} is {tuple(value.shape)}, and"
                f" {info['class']} has {tuple(buffer.shape)} there. Copy the folder again, or"
                " install the transformers it was written with"
            )
        buffer.data = value.data
    try:
        load_compressed(model, state)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / PACKED_TENSORS} does not fit {info['class']}: {error}. Copy the folder"
            " again, or install the transformers it was written with"
        ) from None
    if model.can_generate() and (folder / "generation_config.json").is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:  # see above
            raise ValueError(_misfit(folder / "generation_config.json", error)) from None
    return model.eval()


def _misfit(file: Path, error: Exception, builds: str = "", config: Any = None) -> str:
    """What is wrong with a configuration of transformers', and with which field, if that shows."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        reason = "it brings Python code of its own, which is never run here"
    elif not isinstance(error, (OSError, ValueError)) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    bad = [
        f"`{name}` is {shorten(value)}"
        for name, value in ({} if config is None else vars(config)).items()
        if _wrong_size(name, value) or (isinstance(error, KeyError) and value in error.args)
    ]
    what = (
        f"builds no {builds}, which {PACKED_CONFIG} names"
        if builds
        else "is no configuration of how answers are made"
    )
    return (
        f"{file} {what} ({', '.join([*bad[:4], shorten(reason, 300)[1:-1]])}). Copy the whole"
        " folder again from where it came"
    )


def _wrong_size(name: str, value: Any) -> bool:
    """Whether this is one of a model's sizes, by its name, and no model can have it."""
    size = name.startswith(("n_", "num_")) or name.endswith("_size")
    return size and type(value) in (int, float) and not 0 < value < 2**31


def _pair(name: str, layer: AdaptedLinear, method: str) -> nn.Sequential:
    combine = layer.combine
    left = combine.remains(layer.update) if isinstance(combine, OutlivesBase) else None
    if left is None:
        raise ValueError(
            f"`{method}` cannot be compressed: {name!r} still reads its base, or its update is no"
            " product of two factors. Allowed are layers whose frozen weight has faded to nothing"
            " over an update that is such a product. Train to the end of a method that takes the"
            " base out, or merge (`lorica.merge(model)`, on the command line `--to merged`)"
        )
    factors, bias = left
    A, B = read_full(factors.A), read_full(factors.B) * factors.scale
    keep = A.any(1) & B.any(0)
    keep[0] |= ~keep.any()
    dtype = layer.store.dtype
    bias = None if bias is None else read_full(bias).to(dtype)
    return _sequence(A[keep].to(dtype), B[:, keep].to(dtype), bias).train(layer.training)


def _sequence(down: Tensor, up: Tensor, bias: Tensor | None) -> nn.Sequential:
    """Two layers that hold these tensors, (r, in) and (out, r)."""
    like = {"device": down.device, "dtype": down.dtype}
    first = nn.Linear(down.shape[1], down.shape[0], bias=False, **like)
    second = nn.Linear(up.shape[1], up.shape[0], bias=bias is not None, **like)
    for layer, weight in ((first, down), (second, up)):
        layer.weight = nn.Parameter(weight.detach().contiguous().clone())
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone())
    return nn.Sequential(first, second)
