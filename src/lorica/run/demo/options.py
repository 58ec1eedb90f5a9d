"""What the demonstration can be told. Importing it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorica.run.options import HINT, METHOD, NUMBER, PATH, WHOLE, UsageError


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train the embedded model on tasks it doesn't know, and show what it learns and forgets.

    Nothing is downloaded. The folder is that of a `lorica train` run, and its page, report.html,
    shows every task before and after.

    Args:
        method: method names joined by `+`; `lorica methods` lists them.
        learning_rate: peak learning rate. The default suits the default method.
        max_steps: optimizer steps, with 48 examples each.
        examples: prompts per task to ask before and after training; none of them is trained on.
        seed: seed of every random draw.
        output_dir: folder to write; an earlier demo in it is replaced.
    """

    method: Annotated[str, METHOD, HINT] = "dora+olora"
    learning_rate: Annotated[float, NUMBER, HINT] = 2.5e-3
    max_steps: Annotated[int, WHOLE, HINT] = 280
    examples: Annotated[int, WHOLE, HINT] = 50
    seed: Annotated[int, WHOLE, HINT] = 42
    output_dir: Annotated[str, PATH, HINT] = "lorica-demo"

    def check(self) -> None:
        """What can be told from the options alone; `lorica train`'s own checks come behind.

        Raises:
            UsageError: a value out of range.
        """
        if self.examples < 1:
            raise UsageError(f"`--examples {self.examples}`: it is a whole number of at least 1")
