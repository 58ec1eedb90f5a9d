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
from pathlib import Path

from lorica.embedded.sampling import generate, side_of, tasks
from lorica.embedded.task import AbstractTask

__all__ = ["AbstractTask", "base_path", "generate", "side_of", "tasks"]


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
