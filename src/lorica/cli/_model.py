"""The model that a verb speaks of: a base, perhaps with an adapter on it, and its tokenizer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lorica.cli._outcome import VerbOptions
from lorica.run.options import DTYPE, HINT, PATH, QuantizationOptions, RemoteCodeOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lorica.data import Labels
    from lorica.model.adapters import Adapters
    from lorica.run.load_model import FromCheckpoint

logger = logging.getLogger("lorica")


@dataclass(frozen=True, kw_only=True)
class _Named(VerbOptions):
    """First in `--help`.

    Args:
        model: folder or hub id of a transformers model. Default: the base that the adapter
            names, otherwise the embedded model.
        adapter: an adapter on top of the model (Lorica's or PEFT's).
        dtype: dtype of the weights. `auto` keeps the checkpoint's dtype, except that float16
            becomes float32 on a CPU.
        ignore_base_hash: use a base other than the one that the adapter was trained on.
    """

    model: Annotated[str | None, PATH, HINT] = None
    adapter: Annotated[str | None, PATH, HINT] = None
    dtype: Annotated[str, DTYPE, HINT] = "auto"
    ignore_base_hash: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(QuantizationOptions, RemoteCodeOptions, _Named):
    """Which model a command asks, and how it is loaded."""

    def source(self) -> Source:
        """The base and the adapter that are meant; no weights are read.

        Raises:
            UsageError, ValueError: see `Source.find`.
        """
        from lorica.formats.atomic_folder import home

        return Source.find(
            home(self.model), home(self.adapter), trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True)
class Loaded:
    """A model to be asked.

    Attributes:
        model: on its device.
        adapters: the handle, or None: plain, or merged.
        brought: parts of the model that only the adapter has weights for (a classifier's head).
    """

    model: Any
    adapters: Adapters | None
    brought: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What is known of a model before its weights are read.

    Attributes:
        model: folder or hub id of the base.
        adapter: the adapter's folder, or None.
        config: the base's.
        tokenizer: the adapter's own where its folder has one (it knows the chat template of its
            training), else the base's.
        trust_remote_code: run code that the model brings, or names.
    """

    model: str
    adapter: Path | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool = False

    @classmethod
    def find(
        cls, model: str | None, adapter: str | None, *, trust_remote_code: bool = False
    ) -> Source:
        """Look at both; no weights are read.

        Raises:
            UsageError: there is no telling which base is meant.
            ValueError: a folder that holds no model, or no adapter.
        """
        quieten()
        from lorica.formats.safe_files import locate
        from lorica.run.load_model import base_name, load_tokenizer, read_config

        folder = None if adapter is None else locate(adapter)
        name = base_name(model, folder)
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        config = read_config(name, **trust)
        own = folder is not None and (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(str(folder) if own else name, **trust)
        return cls(name, folder, config, tokenizer, **trust)

    @property
    def embeddings(self) -> int | None:
        """Rows of the model's table of tokens; None: it has none."""
        from lorica.run.new_tokens import vocabulary_with

        trust = self.trust_remote_code
        return vocabulary_with(self.model, self.config, self.adapter, trust_remote_code=trust)

    def labels(self, task: str) -> Labels | None:
        """The classes of the model's head, or of the adapter's; None: the data has to say."""
        from lorica.run.load_model import _head_size, _labels, own_labels

        labels = own_labels(self.config, task)
        if labels is None and self.adapter is not None:
            classes = _head_size(self.adapter, task)
            labels = None if classes is None else _labels(self.adapter, classes)
        return labels

    def load(
        self,
        task: str,
        *,
        labels: Labels | None = None,
        dtype: str,
        check_base: bool = True,
        merged: bool = False,
        columns: Collection[str] = (),
        quantization: Any = None,
    ) -> Loaded:
        """The model for a task, with the adapter attached (or merged: then there is no handle), on
        the device that there is.

        Args:
            quantization: transformers' configuration of how to quantise the base, or None.
            columns: the data's, to say which of them look like a classification.

        Raises:
            ValueError: a causal language model that sees later tokens; weights that don't fit; a
                part of the model that neither the checkpoint nor the adapter has weights for.
        """
        import torch

        import lorica
        from lorica import formats
        from lorica.data import check_causal
        from lorica.formats.compressed import is_packed
        from lorica.run.load_model import load_model, set_padding
        from lorica.run.new_tokens import fit_adapter
        from lorica.training.checks import check_effect

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        widen = device.type == "cpu"
        if is_packed(self.model):
            loaded = _unpacked(self.model, task, dtype=dtype, widen=widen)
        else:
            loaded = load_model(
                self.model,
                task,
                labels=labels,
                dtype=dtype,
                widen=widen,
                trust_remote_code=self.trust_remote_code,
                quantization=quantization,
            )
        model: Any = loaded.model
        set_padding(model, task, self.tokenizer)
        drawn = loaded.drawn(None)
        adapters = None
        if self.adapter is not None:
            fit_adapter(model, self.adapter)
            adapters = formats.load(model, self.adapter, check_base=check_base, trainable=False)
            check_effect(adapters, "every answer")
        bare = loaded.drawn(adapters)
        if bare:
            raise ValueError(
                f"`{self.model}` has no weights for {', '.join(bare)} of {type(model).__name__}, so"
                " its answers would be chance"
                + (
                    f", and the adapter `{self.adapter}` has none either. "
                    if adapters is not None
                    else ". "
                )
                + f"A model trained for {task} is wanted, or an adapter that brings these"
            )
        if task == "causal-lm":
            check_causal(model, columns)
        if merged:
            model = lorica.merge(model)
            adapters = None
        return Loaded(model.to(device), adapters, tuple(drawn))


def _unpacked(name: str, task: str, *, dtype: str, widen: bool) -> FromCheckpoint:
    """A compressed model, as `load_model` gives others; its head and its classes are its own."""
    import torch

    from lorica.formats.compressed import unpack
    from lorica.run.load_model import AUTO, FromCheckpoint, check_finite

    model: Any = unpack(name)
    check_finite(model, name)
    if not type(model).__name__.endswith(AUTO[task][1]):
        raise ValueError(
            f"the compressed model `{name}` is a {type(model).__name__} and none for {task}; ask it"
            " for what it was trained for"
        )
    if dtype == "auto":
        model = model.float() if widen and model.dtype is torch.float16 else model
    else:
        model = model.to(getattr(torch, dtype))
    return FromCheckpoint(model, frozenset())


def chosen_data(data: str | None, split: str | None) -> tuple[str, str | None]:
    """The data and its split that a measurement is of; of embedded tasks, what was not trained on.

    Left out, the data are the new tasks.
    """
    from lorica.embedded.source import NEW, TEST, is_embedded

    data = NEW if data is None else data
    return data, TEST if split is None and is_embedded(data) else split


def quieten() -> None:
    """transformers' bars and notes would come between ours."""
    # warn: False, as two libraries of transformers disagree on what its tqdm should be
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def progress(what: str, *, every: float = 10.0) -> Callable[[int, int], None]:
    """A function of (done, all) that says so on standard error: now and then, and at the end where
    it took a while."""
    began = said = time.monotonic()

    def tell(done: int, whole: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= every or (done == whole and said != began):
            said = now
            left = (now - began) / done * (whole - done)
            logger.info(
                f"{what}: {done:,} of {whole:,}" + (f", {left:,.0f} s left" if left else "")
            )

    return tell
