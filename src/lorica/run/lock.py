"""One process a folder: the system's own lock, which no death leaves behind."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_HELD: set[int] = set()  # open files whose lock is this process's


def take(path: Path) -> int:
    """Lock a file for this process; returns what `release` wants.

    The kernel lets go when the process ends, however it ends and on whichever machine (over NFS
    too). On a file system without locks the process that the file names counts: while that one may
    live, the file is taken.

    Raises:
        ValueError: another living process has it.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            owner = os.read(handle, 200).decode(errors="replace").split()
            if _taken(handle, owner):
                who = f"process {' on '.join(owner)}" if len(owner) == 2 else "another process"
                raise ValueError(
                    f"`{path.parent}` is in use by {who}: two runs cannot share a folder. Name"
                    f" another with `--output-dir`; if that process is gone, remove {path}"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, f"{os.getpid()} {socket.gethostname()}".encode())
                    _HELD.add(handle)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last owner removed the file just now


def release(path: Path, handle: int) -> None:
    """Let go, and remove the file."""
    with contextlib.suppress(OSError):  # a file that stays locks nobody out
        path.unlink()
    _HELD.discard(handle)
    os.close(handle)


def _taken(handle: int, owner: list[str]) -> bool:
    """Whether another process has the lock; if none has, it is ours now."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
    return _lives(owner)


def _lives(owner: list[str]) -> bool:
    """Whether the process that the file names may still run."""
    if len(owner) != 2 or not owner[0].isdigit():
        return False  # torn while it was written
    if owner[1] != socket.gethostname():
        return True  # another machine's: there is no telling
    try:
        os.kill(int(owner[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _forget() -> None:
    """A forked worker that outlives its parent for a moment must not keep the parent's lock."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if fcntl is not None:  # where there is a fork, too
    os.register_at_fork(after_in_child=_forget)
