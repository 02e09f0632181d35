"""Habits with files that several rooms share: locks that a kill releases, hashes.

A lock is held by the operating system for an open file, which lets go when the process ends,
however it ends; a file with a process id in it would outlive `kill -9`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO

_POLL_SECONDS = 0.1


def asset(name: str) -> Path:
    """The path of a file that ships in the package."""
    return Path(str(files("tuppence").joinpath("assets", name)))


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Make a file that others wrote last through a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Replace a small file: it is what it was or what it becomes, whatever happens meanwhile."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@contextmanager
def locked(path: Path, *, on_wait: Callable[[], None], shared: bool = False) -> Iterator[None]:
    """Hold `path` alone, or `shared` with others that share it; `on_wait` is called once if another
    process or thread has it."""
    with path.open("a+b") as file:
        if not try_lock(file, shared=shared):
            on_wait()
            while not try_lock(file, shared=shared):
                time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            _unlock(file, shared=shared)


if sys.platform == "win32":
    import msvcrt

    _BYTES = 1024  # Windows locks bytes: of those who share each has one, who is alone has all

    def try_lock(file: IO[bytes], *, shared: bool = False) -> bool:
        for at in range(_BYTES if shared else 1):
            file.seek(at)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1 if shared else _BYTES)
            except OSError:
                continue
            return True
        return False

    def _unlock(file: IO[bytes], *, shared: bool) -> None:
        # the file stands where try_lock found room
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1 if shared else _BYTES)

else:
    import fcntl

    def try_lock(file: IO[bytes], *, shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: IO[bytes], *, shared: bool) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
