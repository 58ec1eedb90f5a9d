"""What a training run can be told, as typed options: a file a group, and one a verb.

The command line, the YAML file and the run itself share these classes. Importing them costs
nothing: neither torch nor transformers is needed to read options, so `--help` and a misspelt flag
answer at once.
"""

from lorica.run.options import elsewhere
from lorica.run.options.checks import UsageError, checkpoint_path
from lorica.run.options.data import masking
from lorica.run.options.groups import GROUPS, Group
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
    Word,
    choice,
    kinds,
    method_text,
    shown,
)
from lorica.run.options.pretrain import SHAPES, PretrainOptions
from lorica.run.options.quantization import QuantizationOptions
from lorica.run.options.remote_code import RemoteCodeOptions
from lorica.run.options.run import RunOptions
from lorica.run.options.train import TrainOptions

__all__ = [
    "DTYPE", "GROUPS", "HINT", "JSON", "METHOD", "MODULES", "NAMES", "NUMBER", "PAIRS", "PATH",
    "PATHS", "SHAPES", "TASKS", "TEXT", "WHOLE", "WHOLES", "Group", "Kind", "PretrainOptions",
    "QuantizationOptions", "RemoteCodeOptions", "RunOptions", "TrainOptions", "Unsaid",
    "UsageError", "Word", "checkpoint_path", "choice", "elsewhere", "kinds", "masking",
    "method_text", "shown",
]  # fmt: skip
