"""What `lorica doctor` finds out: what is installed, what the machine has, and whether a short
training run on it does what it should.

Each part is tried on its own, so that one that is broken is told and keeps nothing else from being
told. Heavy packages are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorica import __version__
from lorica.text import cut, one_line

REQUIRED = (
    "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "jinja2", "markupsafe",
    "numpy", "psutil", "pyarrow", "pyyaml", "rich", "safetensors", "tokenizers",
    "typing_extensions", "tyro",
)  # fmt: skip

OPTIONAL: dict[str, str] = {
    "peft": "the check of `lorica demo` that PEFT reads the same model",
    "trl": "TRL's trainers with `lorica.run.TrainerMixin`",
    "tensorboard": "--report-to tensorboard",
    "trackio": "--report-to trackio",
    "wandb": "--report-to wandb",
    "bitsandbytes": "--load-in-4bit, --load-in-8bit",
    "torchao": "--quantization with `quant_method` torchao",
    "deepspeed": "--deepspeed",
    "liger_kernel": "--use-liger-kernel",
    "flash_attn": "--attn-implementation flash_attention_2",
}

STEPS, CUT = 20, 10  # of the self-test: its length, and where it is resumed
_CLOSE = 1e-3  # between a resumed run and an uninterrupted one, on devices that don't add in order

Facts = dict[str, Any]


def examine(*, self_test: bool = True) -> Facts:
    """Everything that there is to tell, JSON-ready, without names of users and their folders.

    Args:
        self_test: train the embedded model for 20 steps (about 10 seconds on a laptop).

    Returns:
        `versions`, `devices`, `resources`, `optional`, `self_test` (None where it was left out),
        `problems` (sentences; empty: all is well).
    """
    facts: Facts = {
        "versions": _tried(versions),
        "devices": _tried(devices),
        "resources": _tried(resources),
        "self_test": _tried(_quiet(train_a_little)) if self_test else None,
        "optional": _tried(_quiet(optional)),  # last: an import may change what others do
    }
    facts["problems"] = problems(facts)
    return anonymous(facts)


def _tried(part: Callable[[], Facts]) -> Facts:
    """What a part tells, or {"error": why it can't}."""
    try:
        return part()
    except (Exception, SystemExit) as error:
        return {"error": _reason(error)}


def _reason(error: BaseException) -> str:
    return cut(one_line(f"{type(error).__name__}: {error}"))


# -- the parts -------------------------------------------------------------------------------------


def versions() -> Facts:
    """Of Python and of the packages that Lorica needs; None: not installed."""
    return {
        "lorica": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in REQUIRED},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Facts:
    """What torch can train on. Memory in bytes."""
    import torch

    found: Facts = {
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "cuda": [],
        "mps": torch.backends.mps.is_available(),
    }
    if torch.cuda.is_available():
        found["cuda_version"] = torch.version.cuda or torch.version.hip
        for index in range(torch.cuda.device_count()):
            about: Any = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found["cuda"].append({"name": about.name, "memory": total, "free": free})
    return found


def resources() -> Facts:
    """Bytes that are free: on the disk of this folder and of the hub's cache, and in memory."""
    import psutil
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    there = next((each for each in (cache, *cache.parents) if each.is_dir()), Path.cwd())
    return {
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "hub_cache_free": shutil.disk_usage(there).free,
        "memory_free": psutil.virtual_memory().available,
    }


def optional() -> Facts:
    """{package: its state}: `installed` (with its version), `missing` or `broken` (with the error
    of its import), and what needs it."""
    found: Facts = {}
    for name, needed_by in OPTIONAL.items():
        about: Facts = {"needed_by": needed_by, "version": _version(name), "state": "missing"}
        try:
            if find_spec(name) is not None:
                importlib.import_module(name)
                about["state"] = "installed"
        except (Exception, SystemExit) as error:  # an import may fail in any way
            about |= {"state": "broken", "error": _reason(error)}
        found[name] = about
    return found


def train_a_little() -> Facts:
    """Train the embedded model on its new tasks, save, load, and resume from the middle.

    Returns:
        `loss` (means over the first and the last quarter of the steps), and the three checks:
        whether the loss falls, the saved adapter gives the same logits, and a resumed run ends in
        the same adapter.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import lorica
    from lorica.embedded import base_path
    from lorica.formats.merge import make_sample, outputs
    from lorica.formats.safe_files import read_tensors
    from lorica.run.finetune import train
    from lorica.run.folder import RunFolder
    from lorica.run.options import TrainOptions

    began, logits = time.perf_counter(), []

    def keep(model: Any, _: Any) -> None:
        logits.append(outputs(model, make_sample(model)))

    with tempfile.TemporaryDirectory() as home:
        straight, second = Path(home) / "straight", Path(home) / "resumed"
        further = {"save_steps": CUT, "logging_steps": 1, "eval_strategy": "no"}
        how: Any = {
            "max_steps": STEPS,
            "max_samples": 8 * STEPS,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "further": further,
        }
        result = train(TrainOptions(output_dir=str(straight), **how), then=keep)
        second.mkdir()
        for name in ("config.yaml", "defaults.json", "metrics.jsonl", f"checkpoint-{CUT}"):
            source = straight / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, second / name)
        train(TrainOptions(output_dir=str(second), resume="last", **how), then=keep)
        losses = [line["loss"] for line in RunFolder(straight).lines() if "loss" in line]
        plain: Any = AutoModelForCausalLM.from_pretrained(base_path()).to(result["device"])
        lorica.load(plain, straight / "adapter")
        again = outputs(plain, make_sample(plain))
        files = [folder / "adapter" / "adapter_model.safetensors" for folder in (straight, second)]
        one, other = map(read_tensors, files)
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    part = STEPS // 4
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    allowed = 0.0 if result["device"] == "cpu" else _CLOSE
    return {
        "device": result["device"],
        "steps": STEPS,
        "loss": {"first": first, "last": last},
        "loss_falls": last < first,
        "saved_equals_live": bool(torch.allclose(again, logits[0], rtol=0, atol=allowed)),
        "resumed_equals_straight": apart <= allowed,
        "resumed_difference": apart,
        "tokens_per_second": result["tokens_per_second"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _quiet(part: Callable[[], Facts]) -> Callable[[], Facts]:
    """The same without log lines and warnings of what it calls."""

    def run() -> Facts:
        import warnings

        with _silent("lorica"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return part()

    return run


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# -- what follows from them ------------------------------------------------------------------------

_CHECKS = {
    "loss_falls": "the self-test's loss does not fall",
    "saved_equals_live": "a saved adapter gives other logits than the trained model",
    "resumed_equals_straight": "a resumed run ends in another adapter than an uninterrupted one",
}


def problems(facts: Facts) -> list[str]:
    """What is wrong, in sentences that say what to do."""
    found = []
    for part in ("versions", "devices", "resources", "self_test", "optional"):
        about = facts[part]
        if about is not None and "error" in about:
            found.append(f"{part.replace('_', '-')} failed: {about['error']}")
    for name in REQUIRED:
        if "error" not in facts["versions"] and facts["versions"][name] is None:
            found.append(f"{name} is not installed; install Lorica again with `pip install`")
    test = facts["self_test"] or {}
    found += [text for name, text in _CHECKS.items() if test.get(name) is False]
    for name, about in facts["optional"].items():
        if name != "error" and about["state"] == "broken":
            found.append(
                f"{name} is installed and can't be imported ({about['error']}); install it again,"
                f" or uninstall it if you don't need it ({about['needed_by']})"
            )
    return found


def anonymous(facts: Any) -> Any:
    """The same without the user's name and folders in any text."""
    if isinstance(facts, dict):
        return {key: anonymous(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [anonymous(value) for value in facts]
    return _without_folders(facts) if isinstance(facts, str) else facts


def _without_folders(text: str) -> str:
    """A text with `~` for home folders, and short names for the folders of Python and of
    temporary files.

    Example:
        >>> _without_folders("no file /home/ada/models/a.bin, C:\\\\Users\\\\Ada Byron\\\\b")
        'no file ~/models/a.bin, ~\\\\b'
    """
    known = {sys.prefix: "<python>", sys.base_prefix: "<python>", tempfile.gettempdir(): "<tmp>"}
    with contextlib.suppress(RuntimeError):
        known[str(Path.home())] = "~"
    for folder, short in sorted(known.items(), key=lambda item: -len(item[0])):
        if len(folder) > 3:  # not a root
            text = text.replace(folder, short)
    text = re.sub(r"(?<![\w.])(?:/home|/Users)/[^/\s:'\"]+", "~", text)
    text = re.sub(r"[A-Za-z]:\\+Users\\+[^\\/:'\"]+", "~", text)
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name
        name = re.escape(getpass.getuser())
        text = re.sub(rf"(?<=[/\\]){name}(?=[/\\])", "<user>", text)
    return text
