"""Find the text: by a corpus's name, on this disk, on a bucket, on the Hub, or on the web.

    "shakespeare"   "fineweb_edu_10bt"   "books.jsonl.xz"   "corpus/"   "data/*.parquet"
    "s3://bucket/folder/"   "gs://bucket/*.jsonl.zst"   "hf://OWNER/NAME"   "https://host/a.parquet"

or a list of those with commas. Files come in one order (as listed; of folders, globs and datasets
sorted), for the order is part of what a run trains on.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from pathlib import Path

from tuppence.errors import UserError
from tuppence.files import asset
from tuppence.store import Away, Entry, Store, is_url
from tuppence.text import corpora
from tuppence.text.folders import files_below, is_hidden, matching, rule_of
from tuppence.text.inputs import COMPRESSIONS, KINDS, SUFFIXES, InputFile, kind_of, suffix_of

CORPORA = {"shakespeare": "shakespeare.txt"}

MAGIC = re.compile(r"[*?\[]")
PLACES = ("s3", "gs", "hf", "https", "http", "file", "memory")
BUCKETS = ("s3://", "gs://", "memory://")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_KNOWN = ", ".join(f".{kind}" for kind in KINDS)
_PACKED = ", ".join(f".{compression}" for compression in COMPRESSIONS)


def find_files(source: str) -> list[InputFile]:
    """The files that `source` names, in reading order. Raises UserError where there are none."""
    if not source.strip():
        raise UserError(f"data.source is empty; give one of {', '.join(CORPORA)}, or a path")
    if len(parts := _parts(source)) > 1:
        if "" in parts:
            raise UserError(f"data.source={source}: a comma with nothing beside it; leave it out")
        return [file for part in parts for file in find_files(part)]
    if source in CORPORA:
        return [_known_file(asset(CORPORA[source]), source)]
    if is_url(source):
        return _elsewhere(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, source)
    if path.is_file():
        return [_known_file(path, source)]
    if path.is_symlink() or _exists(source):
        raise UserError(_not_a_file(path, source))
    if glob.has_magic(source):
        return _matching(path, source)
    if source in corpora.CORPORA:
        corpora.check_preparable(source)
        return _elsewhere(corpora.CORPORA[source].source)
    raise UserError(_nothing_there(path, source))


def left_out(source: str) -> dict[str, int]:
    """How many files of the folders and buckets in `source` are not read, by what their names end
    in. Hidden ones are not counted; of other places, and what is not there, nothing is told."""
    counts: Counter[str] = Counter()
    for part in _parts(source):
        path = Path(part.removeprefix("file://")).expanduser()
        if part in CORPORA:
            continue
        if part.startswith(BUCKETS) and not MAGIC.search(part) and not kind_of(part):
            names = _names_on_bucket(part)
            texts = _texts_of(names)
        else:
            names, texts = _below(path) if path.is_dir() else ([], [])
        counts.update(suffix_of(name) for name in set(names) - set(texts) if not is_hidden(name))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def source_bytes(found: list[InputFile]) -> int:
    """Bytes of the files as they lie on disk."""
    return sum(file.bytes for file in found)


def slug_of(source: str) -> str:
    """A short name for `source`, fit for a folder's."""
    first, *others = [part.strip() for part in source.split(",")]
    name = _name_of_url(first) if is_url(first) else Path(first).name or Path(first).resolve().name
    while kind_of(name) and Path(name).suffix:
        name = Path(name).stem
    for suffix in SUFFIXES:
        name = name.removesuffix(f".{suffix}")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    name = name.strip("-.")[:40] or "corpus"
    return f"{name}-and-{len(others)}-more" if others else name


def _name_of_url(url: str) -> str:
    """The last part that says something; a dataset's name with what of it is meant."""
    protocol, _, rest = url.partition("?")[0].partition("://")
    plain = re.sub(r"@(refs/\w+/\w+|[^/]+)", "", rest.removeprefix("datasets/"))
    parts = [part for part in plain.split("/") if part and not MAGIC.search(part)]
    return "-".join(parts[1:]) if protocol == "hf" else "".join(parts[-1:])


def _parts(source: str) -> list[str]:
    listed = "," in source and not _exists(source)
    return [part.strip() for part in source.split(",")] if listed else [source]


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
    return InputFile(str(path), shown, *kind, path.stat().st_size)


def _elsewhere(url: str) -> list[InputFile]:
    """The files at a URL."""
    protocol, _, rest = url.partition("://")
    if protocol not in PLACES:
        raise UserError(f"{url}: text is read from {', '.join(f'{p}://' for p in PLACES[:4])}")
    if protocol == "file":
        return find_files(rest)
    if protocol == "hf":
        from tuppence.text.hub_files import hub_files

        return hub_files(url)
    if protocol in ("http", "https"):
        from tuppence.text.remote import web_file

        return [web_file(url)]
    return _on_bucket(url.rstrip("/"))


def _on_bucket(url: str) -> list[InputFile]:
    """A file, the files below a folder, or those that match."""
    folder, _, last = url.rpartition("/")
    some = bool(MAGIC.search(url))
    store = Store(MAGIC.split(url)[0].rpartition("/")[0] if some else url)
    try:
        one = None if some or not kind_of(last) else Store(folder).entry(last)
        if one is not None:
            return _entries({last: one}, folder)
        entries = store.entries()
    except Away as error:
        raise UserError(f"{url}: {store.advice(error)}") from None
    if some:
        pattern = url.removeprefix(f"{store.url}/")
        rule, hidden = rule_of(pattern), is_hidden(pattern)
        names = [name for name in entries if rule.match(name) and hidden >= is_hidden(name)]
    else:
        names = _texts_of(list(entries))
    found = _entries({name: entries[name] for name in sorted(names)}, store.url)
    if not found:
        store.reach()  # which may know a better reason
        raise UserError(f"{url}: no files of a known kind there ({_KNOWN})")
    return found


def _names_on_bucket(url: str) -> list[str]:
    store = Store(url)
    try:
        return [name for name in store.entries() if name]
    except Away as error:
        raise UserError(f"{url}: {store.advice(error)}") from None


def _entries(entries: dict[str, Entry], folder: str) -> list[InputFile]:
    """Those objects that are of a known kind."""
    return [
        InputFile(url, url, *kind, entry.bytes, f"etag:{entry.tag}")
        for name, entry in entries.items()
        for url in [f"{folder}/{name}"]
        if (kind := kind_of(name))
    ]


def _texts_of(names: list[str]) -> list[str]:
    """What is read of a folder: nothing hidden, and beside other kinds no .json, which tells about
    them."""
    known = [name for name in names if kind_of(name) and not is_hidden(name)]
    others = [name for name in known if not re.search(r"(?i)\.json(\.\w+)?$", name)]
    return others or known


def _below(folder: Path) -> tuple[list[str], list[str]]:
    """Names of all that is below a folder, and of those the files that are read."""
    names = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    return names, _texts_of([name for name in names if (folder / name).is_file()])


def _in_folder(folder: Path, shown: str) -> list[InputFile]:
    _, names = _below(folder)
    found = [_known_file(folder / name, f"{shown.rstrip('/')}/{name}") for name in names]
    if not found:
        raise UserError(f"{shown}: no files of a known kind below this folder ({_KNOWN})")
    return found


def _matching(pattern: Path, shown: str) -> list[InputFile]:
    found = [_known_file(path, str(path)) for path in matching(pattern)]
    if not found:
        raise UserError(f"{shown}: no files match; a glob is taken from {Path.cwd()}")
    return found


def _not_a_file(path: Path, shown: str) -> str:
    """What is said of a name that is there, and can be neither opened nor listed."""
    if path.is_symlink() and not path.exists():
        return f"{shown}: a link to {os.readlink(path)}, which is not there; correct the link"
    return f"{shown}: neither a file nor a folder; write the text to a file, for it is read twice"


def _nothing_there(path: Path, shown: str) -> str:
    near = difflib.get_close_matches(shown, [*CORPORA, *corpora.CORPORA], n=1)
    if _HUB_NAME.fullmatch(shown) and not kind_of(shown) and not path.parent.is_dir():
        near = [f"hf://{shown}"]
    elif not near and path.parent.is_dir():
        beside = [other.name for other in path.parent.iterdir()]
        names = difflib.get_close_matches(path.name, beside, n=1)
        near = [str(path.parent / name) for name in names]
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"data.source {shown!r}: no such file; {hint}Give a corpus by its name (shakespeare, "
        f"tinystories, fineweb_edu_10bt, ...), a file ({_KNOWN}), a folder, a glob, a URL "
        "(hf://OWNER/NAME, s3://..., https://...), or a list with commas"
    )
