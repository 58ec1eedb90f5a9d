"""Folders that are complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import overload

import torch.distributed as dist

from lorica.formats.safe_files import OWN_CONFIG, PEFT_CONFIG, entries
from lorica.text import to_path

# What a save writes, so what overwriting replaces; everything else in the folder is the user's.
_OURS = re.compile(
    r"adapter_config\.json|adapter_model\.(safetensors|bin)|lorica\.(json|safetensors)"
    r"|model.*\.safetensors(\.index\.json)?|(generation_)?config\.json"
)
ADAPTER_MARKS = (OWN_CONFIG, PEFT_CONFIG)
# What a process that died while it wrote into a folder in place has left there.
_LEFT = re.compile(r"\..*\.writing")


@overload
def home(path: str) -> str: ...
@overload
def home(path: None) -> None: ...
def home(path: str | None) -> str | None:
    """A path of the command line, where no shell has replaced `~` (`--output-dir='~/out'`)."""
    return None if path is None else os.path.expanduser(path)


def check_free(path: Path, *, overwrite: bool, marks: tuple[str, ...] = ADAPTER_MARKS) -> None:
    """Whether a folder may be written here.

    Raises:
        ValueError: a file is there; a folder with other things in it; a result of the same kind and
            `overwrite` is not given.
    """
    if to_path(path).exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; name a folder that does not exist yet")
    if not path.exists() or all(_LEFT.fullmatch(entry.name) for entry in path.iterdir()):
        return
    if not any((path / mark).exists() for mark in marks):
        raise ValueError(
            f"{str(path)!r} holds other things ({entries(path)}) and is not overwritten, whatever"
            " `overwrite` says; name a folder that is empty or does not exist yet"
        )
    if not overwrite:
        raise ValueError(
            f"{str(path)!r} has been written already; pass `overwrite=True` (`--overwrite`) to"
            " replace it, or name another folder"
        )


def first() -> bool:
    """Whether this process is the one that writes."""
    return not _several() or dist.get_rank() == 0


def together() -> None:
    """Wait until the folder is there for every process."""
    if _several():
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


class NotWritten(OSError):
    """A folder that could not be written; nothing of it is left. The cause is the first error."""


def of_disk(error: BaseException) -> bool:
    """Whether a writer failed for what it writes to, and not for what it was given.

    Rust's writers (safetensors, tokenizers) have errors of their own, which end in the system's.

    Example:
        >>> of_disk(Exception("No space left on device (os error 28)")), of_disk(ValueError("r=0"))
        (True, False)
    """
    return isinstance(error, OSError) or _number(error) is not None


def _number(error: BaseException) -> int | None:
    """The system's number of an error; None: it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _RUST.search(str(error))
    return None if found is None else int(found[1])


_RUST = re.compile(r"\(os error (\d+)\)")


def reason(error: BaseException) -> str:
    """Why the disk refused, in the system's words.

    Example:
        >>> reason(Exception("I/O error: No space left on device (os error 28)"))
        'No space left on device'
    """
    if (number := _number(error)) is not None:
        return os.strerror(number)
    return (str(error) or type(error).__name__).splitlines()[0]


def free(folder: Path) -> str:
    """How much may still be written there, or in the nearest folder above that exists."""
    there = next((each for each in (folder, *folder.parents) if each.is_dir()), folder)
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(there).free / 2**20:,.1f} MiB"
    return "unknown MiB"


@contextlib.contextmanager
def _told(path: Path, needs: int | None) -> Iterator[None]:
    """What the disk refuses within is told as this folder not being written."""
    fresh = [each for each in path.parents if not each.exists()]
    try:
        yield
    except Exception as error:
        if isinstance(error, NotWritten) or not of_disk(error):
            raise
        name = error.filename if isinstance(error, OSError) else None
        if isinstance(name, str | bytes) and path.parent not in Path(os.fsdecode(name)).parents:
            raise  # of a file that was read
        for each in fresh:
            with contextlib.suppress(OSError):
                each.rmdir()
        full = _number(error) in (errno.ENOSPC, errno.EDQUOT)
        size = "" if needs is None else f", and its weights need {needs / 2**20:,.1f} MiB"
        raise NotWritten(
            f"`{path}` was not written: {reason(error)} ({free(path)} are free there{size})."
            " Nothing of it is left."
            + (" Make room there, or" if full else " Make its parent folder writable, or")
            + " name a folder elsewhere"
        ) from error


@contextlib.contextmanager
def writing(
    path: Path,
    *,
    overwrite: bool,
    marks: tuple[str, ...] = ADAPTER_MARKS,
    needs: int | None = None,
) -> Iterator[Path]:
    """A fresh folder beside `path` that takes its place when the block ends, and vanishes when it
    raises.

    What else lay in a folder that is overwritten (a tokenizer, a read-me) moves along.

    Args:
        needs: bytes of the weights that will be written, for the message of a full disk.

    Raises:
        ValueError: see `check_free`.
        NotWritten: the disk is full, or the folder may not be written.

    Example:
        >>> import tempfile, pathlib
        >>> out = pathlib.Path(tempfile.mkdtemp()) / "out"
        >>> with writing(out, overwrite=False) as folder:
        ...     _ = (folder / "a.txt").write_text("a")
        >>> [e.name for e in out.iterdir()]
        ['a.txt']
    """
    to_path(path)  # a name that no file can have is refused before it is looked up
    path = Path(os.path.realpath(path))  # a link is kept, and `.` has a name
    with _told(path, needs):
        check_free(path, overwrite=overwrite, marks=marks)
        path.parent.mkdir(parents=True, exist_ok=True)
        around = path if _stays(path) else path.parent
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".writing", dir=around))
        try:
            fresh.chmod(0o777 & ~umask())  # mkdtemp makes it private
            yield fresh
            if path.exists():
                for entry in path.iterdir():
                    ours = _OURS.fullmatch(entry.name) or _LEFT.fullmatch(entry.name)
                    if not ours and not (fresh / entry.name).exists():
                        _copy(entry, fresh / entry.name)
            for file in fresh.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~umask())  # safetensors makes its files private
                sync(file)
            sync(fresh)
            place(fresh, path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def place(fresh: Path, path: Path) -> None:
    """Give a finished folder its name; what had that name before is removed afterwards.

    There is no moment without a whole folder of that name where the system can swap two of them
    (Linux, on most file systems). Elsewhere the old one is for a moment at `.NAME.*.old`, as a
    folder cannot be renamed over one that holds something; see `mend`. A folder that has to stay
    (something is mounted there, or it is the current one) gets the entries one by one.
    """
    if _stays(path):
        _fill(fresh, path)
    elif not path.exists():
        os.replace(fresh, path)
    elif not any(path.iterdir()):
        try:
            os.replace(fresh, path)
        except OSError:  # a mount that does not look like one
            _fill(fresh, path)
    elif _exchange(fresh, path):
        sync(path.parent)
        shutil.rmtree(fresh)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        try:
            os.replace(path, old)
        except OSError:
            old.rmdir()
            _fill(fresh, path)
            return
        try:
            os.replace(fresh, path)
        except OSError:
            os.replace(old, path)
            raise
        sync(path.parent)
        shutil.rmtree(old)
    sync(path.parent)


def _stays(path: Path) -> bool:
    """Whether a folder is there that cannot be renamed, or should not be: who stands in it would be
    left in one without a name."""
    if not path.is_dir():
        return False
    try:
        here = path.samefile(os.curdir)
    except OSError:  # the current folder was removed
        here = False
    return here or os.path.ismount(path) or not os.access(path.parent, os.W_OK)


def _fill(fresh: Path, path: Path) -> None:
    """Move what is in `fresh` into `path`, in the place of all that is there; an error brings that
    back. Configurations go last: without one a folder is refused."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path))
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in ((path, old), (fresh, path)):
            for entry in sorted(source.iterdir(), key=lambda e: (e.suffix == ".json", e.name)):
                if entry not in (old, fresh):
                    moved.append((entry, target / entry.name))
                    shutil.move(entry, target / entry.name)
    except BaseException:
        for entry, to in reversed(moved):
            if not os.path.lexists(entry):
                shutil.move(to, entry)
            elif to.parent == path and to.is_dir():  # half a copy, from another disk
                shutil.rmtree(to)
            elif to.parent == path:
                to.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            old.rmdir()
        raise
    for _, file in moved:
        if file.parent == path and (file.is_file() or file.is_dir()):
            sync(file)
    sync(path)
    shutil.rmtree(old)


def mend(path: Path) -> None:
    """Clear away what processes that died while they wrote `path` have left beside it, and put an
    old folder back that has no successor. For whoever is alone in the folder around it.
    """
    for left in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(left, ignore_errors=True)
        elif any(left.iterdir()):
            os.replace(left, path)
    for left in path.parent.glob(f".*{path.name}.*.writing"):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False: the system does not offer it here."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # a C library older than 2018
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of the kernel's headers
    return call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of entries, to the disk."""
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """What this process takes from the mode of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
