"""Whether code that a model brings is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RemoteCodeOptions:
    """Of every verb that builds or loads a model.

    Args:
        trust_remote_code: run Python code and kernels that the model brings or names. For models
            whose authors you trust.
    """

    trust_remote_code: bool = False
