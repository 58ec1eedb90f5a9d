"""Upload an adapter, a model or a run's result to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.run.options import HINT, PATH, TEXT


@dataclass(frozen=True, kw_only=True)
class Options(VerbOptions):
    """Upload an adapter, a model or a run's result to the Hugging Face hub, as one commit.

    The adapter is checked first. Nothing is sent without a token (`hf auth login`, or HF_TOKEN).

    Args:
        folder: adapter or model folder, or the folder of a finished run, whose `adapter/` or
            `model/` is uploaded.
        repo_id: `OWNER/NAME` on the hub; it is made if it does not exist.
        private: make the repository private if it does not exist yet.
        revision: branch to upload to; it is made if it does not exist. Default: `main`.
    """

    folder: tyro.conf.Positional[Annotated[str, PATH, HINT]]
    repo_id: tyro.conf.Positional[Annotated[str, TEXT, HINT]]
    private: bool = False
    revision: Annotated[str | None, TEXT, HINT] = None


def run(options: Options) -> Outcome:
    from lorica.run.hub import folder_of, push

    folder = folder_of(options.folder)
    done = push(folder, options.repo_id, private=options.private, revision=options.revision)
    files = ", ".join(done["files"])
    return Outcome(done, (f"uploaded {folder} to {done['url']}", f"  files       {files}"))
