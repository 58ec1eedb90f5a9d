"""What the demonstration can be told. Importing it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorica.run.options import HINT, METHOD, NUMBER, PATH, WHOLE, UsageError


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Teach the embedded model tasks that it has never seen, and look at what it learnt and forgot.

    Nothing is downloaded. The folder then holds demo.html (a page to look at), result.json, and the
    run as `lorica train` leaves it: config.yaml, metrics.jsonl, adapter/.

    Args:
        method: words joined by `+`; `lorica methods` lists them.
        learning_rate: peak rate. The default suits the default method.
        max_steps: optimizer steps, of 48 examples each.
        examples: prompts of each task that are asked before and after; none was trained on.
        seed: of every random draw.
        output_dir: a folder; an earlier demonstration in it is replaced.
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
