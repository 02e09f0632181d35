"""Find the text: a corpus that ships, a file, a folder, a glob, or a list of those with commas.

    "shakespeare"   "books.jsonl.xz"   "corpus/"   "data/*.parquet"   "a.txt,b.txt"

Documents come lazily and in one order (as listed; folders and globs sorted), for the order is
part of what a run trains on.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from tuppence.data import corpora
from tuppence.data.formats import COMPRESSIONS, KINDS, InputFile, Meter, kind_of, read_texts
from tuppence.data.pieces import Piece
from tuppence.errors import UserError

CORPORA = {"shakespeare": "shakespeare.txt"}

_KNOWN = ", ".join(f".{kind}" for kind in KINDS)
_PACKED = ", ".join(f".{compression}" for compression in COMPRESSIONS)


def asset(name: str) -> Path:
    """The path of a file that ships in the package."""
    return Path(str(files("tuppence").joinpath("assets", name)))


def find_files(source: str) -> list[InputFile]:
    """The files that `source` names, in reading order. Raises UserError where there are none."""
    if not source.strip():
        raise UserError(f"data.source is empty; give one of {', '.join(CORPORA)}, or a path")
    if "," in source and not _exists(source):
        return [file for part in source.split(",") for file in find_files(part.strip())]
    if source in CORPORA:
        return [InputFile(asset(CORPORA[source]), source, "txt", "")]
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, source)
    if path.is_file():
        return [_known_file(path, source)]
    if glob.has_magic(source):
        return _matching(path, source)
    if source in corpora.CORPORA:
        raise UserError(
            f"data.source={source}: this version plans with {source} by its name, and prepares "
            f"from files; give its files, for example data.source='{source}/*.parquet'"
        )
    raise UserError(_nothing_there(path, source))


def source_bytes(found: list[InputFile]) -> int:
    """Bytes of the files as they lie on disk."""
    return sum(file.path.stat().st_size for file in found)


def read_pieces(
    found: list[InputFile], *, text_field: str = "text", meter: Meter | None = None
) -> Iterator[Piece]:
    """All text of the files, documents numbered from 0; a large .txt comes in several pieces."""
    meter = meter or Meter()
    document = offset = 0
    for file in found:
        for text, last in read_texts(file, text_field=text_field, meter=meter):
            yield Piece(text, document, offset, last)
            document, offset = (document + 1, 0) if last else (document, offset + len(text))


def documents(source: str, *, text_field: str = "text") -> Iterator[str]:
    """Every document of `source` as one string each."""
    held: list[str] = []
    for piece in read_pieces(find_files(source), text_field=text_field):
        held.append(piece.text)
        if piece.last:
            yield "".join(held)
            held = []


def has_one_document(found: list[InputFile], *, text_field: str = "text") -> bool:
    """Whether there is exactly one document; reads no further than the start of a second."""
    texts = sum(file.kind == "txt" for file in found)
    if texts > 1 or (texts == 1 and len(found) == 1):
        return texts == 1
    ends = (piece for piece in read_pieces(found, text_field=text_field) if piece.last)
    return next(ends, None) is not None and next(ends, None) is None


def slug_of(source: str) -> str:
    """A short name for `source`, fit for a folder's."""
    first, *others = [part.strip() for part in source.split(",")]
    name = Path(first).name or Path(first).resolve().name
    while kind_of(name) and Path(name).suffix:
        name = Path(name).stem
    for suffix in KINDS:
        name = name.removesuffix(f".{suffix}")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    name = name.strip("-.")[:40] or "corpus"
    return f"{name}-and-{len(others)}-more" if others else name


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except OSError:  # a list of many paths can be longer than a path may be
        return False


def _known_file(path: Path, shown: str) -> InputFile:
    kind = kind_of(path.name)
    if kind is None:
        raise UserError(
            f"{shown}: unknown kind of file; text is read from {_KNOWN}, "
            f"plain or packed as {_PACKED}"
        )
    return InputFile(path, shown, *kind)


def _in_folder(folder: Path, shown: str) -> list[InputFile]:
    paths = [path for path in folder.rglob("*") if path.is_file() and kind_of(path.name)]
    found = []
    for path in sorted(paths, key=lambda path: path.relative_to(folder).parts):
        name = f"{shown.rstrip('/')}/{path.relative_to(folder).as_posix()}"
        found.append(_known_file(path, name))
    if not found:
        raise UserError(f"{shown}: no files of a known kind below this folder ({_KNOWN})")
    return found


def _matching(pattern: Path, shown: str) -> list[InputFile]:
    paths = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    found = [_known_file(path, str(path)) for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{shown}: no files match; a glob is taken from {Path.cwd()}")
    return found


def _nothing_there(path: Path, shown: str) -> str:
    near = difflib.get_close_matches(shown, [*CORPORA, *corpora.CORPORA], n=1)
    if not near and path.parent.is_dir():
        beside = [other.name for other in path.parent.iterdir()]
        names = difflib.get_close_matches(path.name, beside, n=1)
        near = [str(path.parent / name) for name in names]
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"data.source {shown!r}: no such file; {hint}Give a shipped corpus "
        f"({', '.join(CORPORA)}), for a plan a known one ({', '.join(corpora.CORPORA)}), "
        f"a file ({_KNOWN}), a folder, a glob, or a list with commas"
    )
