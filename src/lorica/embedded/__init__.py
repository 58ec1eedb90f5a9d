"""The task world: small text tasks, written by a seeded generator, and the base model that knows
the old ones.

Every verb of the command line can be tried without a download: the *old* tasks are those that the
embedded base model answers, the *new* ones are what a demonstration teaches it. An example is a
dict of three strings, `{"prompt": "reverse: stone\\n", "completion": "enots", "task": "reverse"}`;
`prompt + completion` is the text, the end-of-sequence token closes it. An input belongs to the
training side or to the test side by its own hash, whatever the seed or the task, so no input of
the test side is ever trained on.

A new task is one class in one of the files of `families/`; nothing else lists tasks.

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
