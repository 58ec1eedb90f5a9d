"""What a training run can be told, as typed options: a file a group, and one a verb.

The command line, the YAML file and the run itself share these classes. Importing them costs
nothing: neither torch nor transformers is needed to read options, so `--help` and a misspelt flag
answer at once.
"""

from lorica.run.options.checks import UsageError, checkpoint_path
from lorica.run.options.data import masking
from lorica.run.options.kinds import (
    DTYPE,
    HINT,
    JSON,
    METHOD,
    MODULES,
    NAMES,
    NUMBER,
    PAIRS,
    PATH,
    PATHS,
    TASKS,
    TEXT,
    WHOLE,
    WHOLES,
    Kind,
    Unsaid,
    choice,
    kinds,
    method_text,
    shown,
)
from lorica.run.options.pretrain import SHAPES, PretrainOptions
from lorica.run.options.run import RunOptions
from lorica.run.options.train import TrainOptions

__all__ = [
    "DTYPE", "HINT", "JSON", "METHOD", "MODULES", "NAMES", "NUMBER", "PAIRS", "PATH", "PATHS",
    "SHAPES", "TASKS", "TEXT", "WHOLE", "WHOLES", "Kind", "PretrainOptions", "RunOptions",
    "TrainOptions", "Unsaid", "UsageError", "checkpoint_path", "choice", "kinds", "masking",
    "method_text", "shown",
]  # fmt: skip
