"""Upload a finished folder to the Hugging Face hub: checked first, then sent as one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorica.run.options import UsageError
from lorica.text import one_line, parse_json, to_path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}")
_MARKS = ("lorica.json", "adapter_config.json", "config.json")
_LEFT = ["checkpoint-*", ".*", "*.part", "*.lock"]  # never uploaded


def folder_of(path: str) -> Path:
    """What is meant by a path: the folder itself, or of a run what it trained.

    Raises:
        UsageError: there is nothing finished.
    """
    folder = to_path(path)
    if not folder.is_dir():
        raise UsageError(f"`{path}` is no folder; name an adapter, a model or a finished run")
    if any((folder / mark).is_file() for mark in _MARKS):
        return folder
    result = folder / "result.json"
    if result.is_file():
        try:
            told: Any = parse_json(result.read_text(encoding="utf-8"))
            inside = folder / Path(str(told["output"])).name
        except (OSError, ValueError, TypeError, KeyError):
            inside = folder
        if any((inside / mark).is_file() for mark in _MARKS):
            return inside
    raise UsageError(
        f"`{path}` holds no adapter and no model (none of {', '.join(_MARKS)}), and no finished run"
        " (a result.json beside what it trained); name the folder that does"
    )


def check(folder: Path) -> None:
    """Check an adapter before strangers get it.

    Raises:
        ValueError: `lorica.load` would refuse it, whatever the model.
    """
    from lorica import formats

    if (folder / "lorica.json").is_file() or (folder / "adapter_config.json").is_file():
        problems = formats.inspect(folder)["problems"]
        if problems:
            raise ValueError(
                f"{folder} is not uploaded: {problems[0]}. `lorica inspect {folder}` shows all"
            )


def ready(repo_id: str) -> str:
    """Check the name, the token and the connection; nothing is sent.

    Returns:
        The account's name.

    Raises:
        UsageError: no name of a repository; no token.
        ValueError: the hub can't be reached, or refuses the token.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import is_offline_mode

    if not _NAME.fullmatch(repo_id):
        raise UsageError(
            f"`{repo_id}` is no name of a repository: `OWNER/NAME` is wanted, of letters, digits,"
            " `-`, `_` and `.`"
        )
    if is_offline_mode():
        raise UsageError(
            f"`{repo_id}` can't be uploaded to: HF_HUB_OFFLINE is set; unset it, and try again"
        )
    if get_token() is None:
        raise UsageError(
            f"`{repo_id}` can't be uploaded to: there is no token of the hub here. Run"
            " `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    with _told(repo_id):
        return str(HfApi().whoami()["name"])


def push(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None
) -> dict[str, Any]:
    """Make the repository if it is not there, and upload the folder as one commit.

    Args:
        folder: see `folder_of`.
        repo_id: `OWNER/NAME`.
        private: of a repository that is made; one that exists stays as it is.
        revision: branch to commit to; it is made if it is not there. Default: `main`.

    Returns:
        `repo_id`, `revision`, `commit` (its id), `url`, and `files`, the names that were sent.

    Raises:
        UsageError, ValueError: see `check` and `ready`; or the hub refuses the upload.
    """
    from huggingface_hub import HfApi

    check(folder)
    ready(repo_id)
    api = HfApi(library_name="lorica")
    with _told(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {folder.resolve().name} with Lorica",
            ignore_patterns=_LEFT,
        )
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return {
        "repo_id": repo_id,
        "revision": revision or "main",
        "commit": done.oid,
        "url": str(done.commit_url),
        "files": files,
    }


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """What the hub or the connection refuses within is told in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        told = one_line(getattr(error, "server_message", None) or str(error).splitlines()[0])
        what = {
            401: "the token is not valid; run `hf auth login` again",
            403: "the token may not write there; make one that may, or name another repository",
            404: "there is no such repository, or the token may not see it",
        }.get(error.response.status_code if error.response is not None else 0, "try again later")
        raise ValueError(f"the hub refuses `{repo_id}` ({status}: {told}): {what}") from None
    except Exception as error:  # the client's own kinds of lost connections have no common class
        if isinstance(error, (TypeError, AttributeError, KeyError)):
            raise
        raise ValueError(
            f"the hub can't be reached for `{repo_id}` ({type(error).__name__}:"
            f" {one_line(str(error))[:200]}). Check the connection (HF_ENDPOINT names another hub),"
            " and try again: what was trained is complete here"
        ) from None
