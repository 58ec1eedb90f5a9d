"""How the base is quantised while it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from lorica.run.options.kinds import HINT, TEXT


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How the base is quantised while it is loaded.

    Args:
        load_in_4bit: quantise the frozen weights to 4 bits (nf4 with double quantisation) while
            they are loaded. Needs bitsandbytes.
        load_in_8bit: quantise the frozen weights to int8 while they are loaded. Needs
            bitsandbytes.
        quantization: transformers' own fields of a quantisation by bitsandbytes or torchao, as JSON
            or a file of it.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    quantization: Annotated[str | None, TEXT, HINT] = None

    def quantization_config(self) -> Any:  # Any: transformers has a class for each method
        """transformers' configuration of what these options ask for; None: nothing.

        Raises:
            UsageError: see `lorica.run.quantization.asked`.
        """
        from lorica.run.quantization import asked

        return asked(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            quantization=self.quantization,
        )
