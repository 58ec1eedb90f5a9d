"""The embedded model and its tasks: everything needed to try Lorica without a download.

The tasks are small text tasks, written by a seeded generator. The embedded base model can do the
*old* tasks; the *new* tasks are for training. An example is a dict of three strings,
`{"prompt": "reverse: stone\\n", "completion": "enots", "task": "reverse"}`. The text is
`prompt + completion`, followed by the end-of-sequence token. A hash of the input alone decides
whether an example is for training or for testing, whatever the seed or the task, so no test input
is ever trained on.

To add a task, write a class in one of the files of `families/`; no other file lists the tasks.

Example:
    >>> from lorica import embedded
    >>> [task.name for task in embedded.tasks("old")][:3]
    ['add', 'ascend', 'copy']
    >>> sorted(embedded.generate("old", 1, seed=0)[0])
    ['completion', 'prompt', 'task']
    >>> (embedded.base_path() / "config.json").is_file()
    True
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path, PurePosixPath

from lorica.embedded.sampling import generate, side_of, tasks
from lorica.embedded.task import AbstractTask

__all__ = ["BASE", "AbstractTask", "base_path", "generate", "located", "named", "side_of", "tasks"]

BASE = "lorica:base"  # the embedded base model's name, the same on every machine


def base_path() -> Path:
    """The folder of the embedded base model, as `from_pretrained` takes it.

    Returns:
        A folder with a Llama of about a million parameters, stored in 16 bits, and its
        byte-level tokenizer; `PROVENANCE.md` there says how it was trained and what it knows.

    Example:
        >>> from lorica.embedded import base_path
        >>> base_path().name
        'base'
    """
    return Path(str(files("lorica.embedded") / "base"))


def named(model: str | None) -> str | None:
    """What an adapter's files call its base: `lorica:base` for the embedded model's folder, any
    other name as it is, and None of a model without one.

    Example:
        >>> named(str(base_path())), named("org/name")
        ('lorica:base', 'org/name')
    """
    return BASE if model and Path(model).expanduser().resolve() == base_path().resolve() else model


def located(model: str) -> str:
    """Where a model with this name is: the inverse of `named`.

    A path of the embedded model on another machine, as older adapters have it, means the one here.

    Example:
        >>> located("lorica:base") == str(base_path()), located("org/name")
        (True, 'org/name')
        >>> located("/elsewhere/lorica/embedded/base") == str(base_path())
        True
    """
    parts = tuple(PurePosixPath(model.replace("\\", "/")).parts[-3:])
    elsewhere = parts == ("lorica", "embedded", "base") and not Path(model).exists()
    return str(base_path()) if model == BASE or elsewhere else model
