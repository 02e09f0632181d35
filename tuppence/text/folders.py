"""Which files a folder or a glob means: each once, whatever links lead to it, no hidden ones."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from tuppence.errors import UserError


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, by any name that is not hidden; nothing twice. Sorted.

    Raises UserError for a folder that cannot be listed.
    """
    return once(file for _, files in _walk(folder) for file in files)


def matching(pattern: Path) -> list[Path]:
    """The files that a glob matches, nothing twice. Sorted. `**` is any folders, or none.

    Python's own `**` goes round where links do, and its work doubles with every link.
    """
    return once(path for path in _matches(pattern) if path.is_file())


def _matches(pattern: Path) -> Iterator[Path]:
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    after = pattern.parts[at + 1 :] or ("*",)
    for start in _matches(Path(*pattern.parts[:at])):
        for folder, _ in _walk(start) if start.is_dir() else ():
            yield from _matches(Path(glob.escape(str(folder)), *after))


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder, this one first, with what is in it besides folders; none twice. Links are
    followed after everything else, so that what is there itself keeps its own name."""
    seen: set[str] = set()
    waiting = deque([folder])
    while waiting:
        here = waiting.popleft()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        files: list[Path] = []
        for entry in _entries(here):
            path, link = Path(entry.path), entry.is_symlink()
            if not (path.is_dir() if link else entry.is_dir()):
                files.append(path)
            elif link:
                waiting.append(path)
            else:
                waiting.appendleft(path)
        yield here, files


def once(paths: Iterable[Path]) -> list[Path]:
    """One path for each file: its own, or the shortest of those that links make. Sorted."""
    best: dict[str, tuple[bool, int, Path]] = {}
    for path in paths:
        real = os.path.realpath(path)
        name = (real != os.path.abspath(path), len(path.parts), path)
        best[real] = min(best.get(real, name), name)
    return sorted(path for _, _, path in best.values())


def rule_of(pattern: str) -> re.Pattern[str]:
    """The names that a glob means on a bucket or the Hub. Raises UserError for what is no glob."""
    from fsspec.utils import glob_translate

    try:
        return re.compile(glob_translate(pattern))
    except ValueError:
        raise UserError(
            f"{pattern}: ** stands for whole folders, as in **/*.txt; inside a name write *"
        ) from None


def is_hidden(name: str) -> bool:
    """Whether a path, given with / between its parts, has a part that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not is_hidden(entry.name)]
            return sorted(shown, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check it") from None
