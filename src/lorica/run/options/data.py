"""What a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from lorica.run.options.checks import check_whole
from lorica.run.options.kinds import HINT, NUMBER, PAIRS, TEXT, WHOLE


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which part of the data is used, and how it is cut into sequences.

    Args:
        split: split of the data to train on. Default: `train` if there is one, otherwise
            everything.
        columns: rename columns of the data, e.g. `text=sentence` if the text is in the column
            `sentence`.
    """

    split: Annotated[str | None, TEXT, HINT] = None
    eval_fraction: Annotated[float | None, NUMBER, HINT] = None
    max_length: Annotated[int | None, WHOLE, HINT] = None
    columns: Annotated[dict[str, str] | None, PAIRS, HINT] = None

    def check_data(self) -> None:
        """Raises UsageError: a length out of range."""
        check_whole("max_length", self.max_length)


def masking(chat_template: str | None, train_on: tuple[str, ...] | None) -> dict[str, Any]:
    """The arguments of `lorica.data.prepare` that these two options mean; left out, none.

    Example:
        >>> masking(None, ("completion",))
        {'train_on': 'completion'}
    """
    how: dict[str, Any] = {}
    if chat_template is not None:
        how["chat_template"] = chat_template
    if train_on is not None:
        alone = len(train_on) == 1 and train_on[0] in ("completion", "all")
        how["train_on"] = train_on[0] if alone else frozenset(train_on)
    return how
