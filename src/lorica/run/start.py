"""How a run begins: its folder is taken, and what can be refused before any data is read, is.

torch and transformers are imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorica.run import resume
from lorica.run.folder import RunFolder
from lorica.run.options import RunOptions, UsageError
from lorica.run.options.checks import flag
from lorica.run.plan import RunPlan
from lorica.run.recipe import check_optim

if TYPE_CHECKING:
    from lorica.recipe.recipe import Recipe

P = TypeVar("P", bound=RunPlan[Any, Any])


@contextlib.contextmanager
def started(kind: type[P], options: RunOptions, recipe: Recipe | None) -> Iterator[P]:
    """Within this context the run's folder is this process's alone.

    Args:
        kind: the verb's plan.
        options: checked and placed.
        recipe: what the options ask for; None: the adapter that they name says it.

    Yields:
        The plan, before its data are read.

    Raises:
        UsageError: another run is in the folder, what is read lies where the run writes, or the
            options are not those of the run that is resumed.
        ValueError: another living process holds the folder.
    """
    folder = RunFolder(options.output_dir)
    main = int(os.environ.get("RANK", "0")) == 0
    if recipe is not None:
        check_optim(options, recipe)
    folder.refuse_inputs(_inputs(options))
    with folder.held() if main else contextlib.nullcontext():
        checkpoint = folder.check(
            resume=options.resume,
            overwrite=options.overwrite_output_dir,
            silent=not main,
            writes=kind.writes,
        )
        import torch
        from transformers import set_seed

        quieten()
        began = time.perf_counter()
        cpu = bool(options.further.get("use_cpu")) or not torch.cuda.is_available()
        plan = kind(
            options=options,
            recipe=recipe,
            own_recipe=recipe is not None,
            folder=folder,
            checkpoint=checkpoint,
            main=main,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            device=torch.device("cpu" if cpu else "cuda"),
            began=began,
        )
        set_seed(options.seed)
        resume.check_given(plan)
        _check_reports(options.report_to)
        yield plan


def _inputs(options: RunOptions) -> list[tuple[str, str]]:
    """The flags that may name files, and what they were given."""
    found = []
    for name, words in options.paths.items():
        value = getattr(options, name)
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and path not in words:
                found.append((flag(name), path))
    return found


def _check_reports(names: Sequence[str]) -> None:
    """Where else to log is known and installed, before anything is read.

    Raises:
        UsageError: it is not.
    """
    from transformers.integrations.integration_utils import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    for name in names:
        if name in ("none", "all", *get_available_reporting_integrations()):
            continue
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"`--report-to {name}`: {why}; or leave it out") from None


def quieten() -> None:
    """Switch off transformers' progress bars and notes, which would come between ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
