"""The texts of CORE and of HellaSwag: found, fetched, and known to be what everyone else asks.

    a folder     ┐                                  every file's sha256
    .zip .tar.*  ├─▶ the files of core_files.csv ─────────────────────────▶ CoreBundle
    nothing      ┘   (nothing: the user's cache, or a download into it)

An archive is read where it lies, the files wanted and no others, each up to the size it must have:
nothing is unpacked. What differs by a byte is refused, since a score of other texts is another
score. HellaSwag is known by its content instead (context, endings and label of every row, in
order), because it goes around in several spellings.
"""

import csv
import functools
import hashlib
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tuppence.config import TasksPlan
from tuppence.errors import Fault, UserError
from tuppence.files import asset, locked
from tuppence.plan.hardware import cache_folder
from tuppence.text import remote

CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = (
    "8a2edacfbeab73e276dac2a01211b2122d377161f59951b4723bc8abab7c80aa"  # of its content
)
HELLASWAG_FILE_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
HELLASWAG_MOST_BYTES = 1 << 26
DATA = "eval_data/"  # of the bundle's root
INSIDE = ("", "eval_bundle", "core_eval")  # where the root may be in a folder
GPT2 = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")
_BROKEN: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,  # a zip with a password
    NotImplementedError,  # or packed in another way
)

Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One of the 22. `baseline` is the accuracy of a guess; `published` those of the GPT-2s."""

    label: str
    file: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    items: int
    published: Mapping[str, float]


@functools.cache
def core_tasks() -> tuple[CoreTask, ...]:
    """CORE's tasks as the bundle's own tables have them, in their order."""
    return tuple(
        CoreTask(
            label=row["label"],
            file=row["file"],
            kind=row["kind"],
            shots=int(row["shots"]),
            delimiter=row["delimiter"].replace("\\n", "\n"),
            baseline=0.01 * float(row["baseline_percent"]),
            items=int(row["items"]),
            published={model: float(row[model]) for model in GPT2},
        )
        for row in _rows_of("core_tasks.csv")
    )


def _rows_of(name: str) -> list[dict[str, str]]:
    with asset(name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


# ---------------------------------------------------------------- CORE


class File(NamedTuple):
    """What a file of the bundle must be."""

    bytes: int
    sha256: str


@functools.cache
def core_files() -> dict[str, File]:
    """The files that CORE is made of, by their names below the bundle's root."""
    rows = _rows_of("core_files.csv")
    return {row["file"]: File(int(row["bytes"]), row["sha256"]) for row in rows}


class CoreBundle:
    """The items of each task. `sha256` is of all its files' own hashes."""

    def __init__(self, lines: Mapping[str, Sequence[bytes]], *, sha256: str) -> None:
        self.sha256 = sha256
        self._lines = lines

    def count(self, task: CoreTask) -> int:
        """How many items there are."""
        return len(self._lines[task.file])

    def items(self, task: CoreTask, numbers: Sequence[int]) -> list[Row]:
        """These items, by their places in the file."""
        lines = self._lines[task.file]
        return [json.loads(lines[number]) for number in numbers]


def core_bundle(given: str | None, *, say: Say) -> CoreBundle:
    """The standard bundle from a folder or archive, else the user's cache, else its address.

    Raises UserError for what is not the standard bundle, Fault for a download that broke.
    """
    if given is not None:
        return _bundle(_core_content(Path(given).expanduser()), given)
    place = _cached(CORE_URL)
    if not place.exists():
        _fetch(
            CORE_URL,
            place,
            what="CORE's tasks",
            remedy="download it elsewhere and give its path (--core-data, train.core_data)",
            check=lambda path: _bundle(_core_content(path), str(path)),
            say=say,
        )
    return _bundle(_core_content(place), str(place))


def _bundle(content: Mapping[str, bytes], shown: str) -> CoreBundle:
    """Verified. Raises UserError naming the file that is not what it should be."""
    for name, file in core_files().items():
        if name not in content:
            raise UserError(f"{shown}: {name} is missing; the whole bundle is at {CORE_URL}")
        found = hashlib.sha256(content[name]).hexdigest()
        if found != file.sha256:
            raise UserError(
                f"{shown}: {name} is not the standard bundle's (sha256 {found[:12]}, not "
                f"{file.sha256[:12]}); take it from {CORE_URL}"
            )
    listing = "".join(f"{file.sha256}  {name}\n" for name, file in core_files().items())
    lines = {
        name.removeprefix(DATA): content[name].rstrip(b"\n").split(b"\n")
        for name in core_files()
        if name.startswith(DATA)
    }
    return CoreBundle(lines, sha256=hashlib.sha256(listing.encode()).hexdigest())


def _core_content(path: Path) -> dict[str, bytes]:
    """The files that CORE needs, those that are there. Raises UserError where none can be read."""
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give CORE's bundle, from {CORE_URL}")
    try:
        members = _of_zip(path) if zipfile.is_zipfile(path) else _of_tar(path)
        return dict(members)
    except _BROKEN as error:
        raise UserError(
            f"{path} cannot be read as a .zip or .tar archive ({_said(error)}); take CORE's "
            f"bundle from {CORE_URL}"
        ) from None


def _of_folder(folder: Path) -> dict[str, bytes]:
    root = next((folder / n for n in INSIDE if (folder / n / "eval_data").is_dir()), folder)
    content = {}
    for name, file in core_files().items():
        if (root / name).is_file():
            with (root / name).open("rb") as data:
                content[name] = data.read(file.bytes + 1)
    return content


def _of_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if (name := _wanted(member.filename)) is not None:
                with archive.open(member) as data:
                    yield name, _content(data, name)


def _of_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (name := _wanted(member.name)) is not None:
                data = archive.extractfile(member)
                assert data is not None, "a file has content"
                yield name, _content(data, name)


def _wanted(member: str) -> str | None:
    """The name below the bundle's root, for a file of CORE's; the root may be one folder down."""
    name = member.removeprefix("./")
    below = name.partition("/")[2]
    return next((n for n in (name, below) if n in core_files()), None)


def _content(data: IO[bytes], name: str) -> bytes:
    """No more than tells whether it is the right one."""
    return data.read(core_files()[name].bytes + 1)


# ---------------------------------------------------------------- HellaSwag


class Question(NamedTuple):
    """One row: which of `endings` goes on with `context` is `label`."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class HellaSwag:
    """The validation split. `sha256` is of its content."""

    rows: tuple[Question, ...]
    sha256: str


def hellaswag_rows(given: str | None, *, say: Say) -> HellaSwag:
    """HellaSwag's validation split from a .jsonl or .jsonl.xz, the user's cache, or its address.

    Raises UserError for what is not the split, Fault for a download that broke.
    """
    if given is not None:
        return _hellaswag(Path(given).expanduser())
    place = _cached(HELLASWAG_URL)
    if not place.exists():
        _fetch(
            HELLASWAG_URL,
            place,
            what="HellaSwag",
            remedy="download it elsewhere and give its path (--hellaswag-data, "
            "train.hellaswag_data)",
            check=_hellaswag,
            say=say,
        )
    return _hellaswag(place)


def _hellaswag(path: Path) -> HellaSwag:
    content = _hellaswag_bytes(path)
    try:
        rows = tuple(_question(json.loads(line)) for line in content.split(b"\n") if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not HellaSwag's validation split ({type(error).__name__}: "
            f"{_said(error)}); take it from {HELLASWAG_URL}"
        ) from None
    found = hellaswag_sha256(rows)
    if found != HELLASWAG_SHA256 and hashlib.sha256(content).hexdigest() != HELLASWAG_FILE_SHA256:
        raise UserError(
            f"{path} is not HellaSwag's validation split ({len(rows):,} rows, content sha256 "
            f"{found[:12]}, not {HELLASWAG_SHA256[:12]}); take it from {HELLASWAG_URL}"
        )
    return HellaSwag(rows, found)


def _hellaswag_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give HellaSwag's, from {HELLASWAG_URL}")
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as data:
            return data.read(HELLASWAG_MOST_BYTES)
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_said(error)}") from None


def _question(row: Row) -> Question:
    endings = tuple(map(str, row["endings"]))
    return Question(str(row["ctx"]), endings, int(row["label"]))


def hellaswag_sha256(rows: Sequence[Question]) -> str:
    """Of a line of JSON for each row: context, endings, label."""
    lines = (json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- downloads


def fetch(tasks: TasksPlan | None, *, say: Say) -> None:
    """Have what a run will be judged by here and verified, before the run costs much."""
    for suite in () if tasks is None else tasks.suites:
        read = core_bundle if suite.name == "core" else hellaswag_rows
        read(suite.data, say=say)


def _cached(url: str) -> Path:
    """Where a download is kept."""
    return cache_folder() / "evaluations" / url.rpartition("/")[2]


def _fetch(
    url: str,
    place: Path,
    *,
    what: str,
    remedy: str,
    check: Callable[[Path], object],
    say: Say,
) -> None:
    """Download to `place`, once for all processes; one that was interrupted goes on.

    What `check` refuses is deleted and a Fault.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f"{place.name}.part")
    lock = place.with_name(f"{place.name}.lock")
    with locked(lock, on_wait=lambda: say(f"{what}: another process downloads it")):
        if place.exists():
            return
        _download(url, aside, what=what, remedy=remedy, say=say)
        try:
            check(aside)
        except UserError as error:
            aside.unlink()
            raise Fault(f"{url} is not what it was ({error}); try again, or {remedy}") from None
        os.replace(aside, place)


def _download(url: str, aside: Path, *, what: str, remedy: str, say: Say) -> None:
    """All of a file of the web, behind what is there already."""
    try:
        first = remote.patiently(
            lambda: remote.ask(url, {}, 0, 1), shown=url, pauses=remote.PAUSES[:2]
        )
    except Fault as error:
        raise UserError(f"{what}: {error}; {remedy}") from None
    total, got = first.total, aside.stat().st_size if aside.exists() else 0
    if got > total:
        got = 0
    with aside.open("r+b" if got else "wb") as file:
        file.seek(got)
        while got < total:
            say(f"{what}: {got / 1e6:.0f} of {total / 1e6:.0f} MB from {remote.shown_url(url)}")
            stop = min(got + remote.BLOCK_BYTES, total)
            file.write(_block(url, got, stop))
            got = stop
        file.flush()
        os.fsync(file.fileno())


def _block(url: str, start: int, stop: int) -> bytes:
    def whole() -> bytes:
        content = remote.ask(url, {}, start, stop).content
        if len(content) != stop - start:
            raise OSError(f"{len(content):,} of {stop - start:,} bytes arrived")
        return content

    return remote.patiently(whole, shown=url)


def _said(error: Exception) -> str:
    """Its first line: what cannot be opened as a tar file says so of every compression."""
    return str(error).strip().partition("\n")[0].rstrip(":") or type(error).__name__
