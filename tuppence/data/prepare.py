"""Text to token shards: once per (inputs, options), on all cores, in memory that does not grow.

    files ─▶ slices ─▶ windows ─▶ worker processes ─▶ slice files, in order ─▶ shards + manifest

The folder's name carries a hash over everything its tokens depend on, so asking again finds it.
It is written aside and renamed when whole: it is complete or absent. What a kill leaves in the
work folder is gone on with (`work`), and comes to the same bytes.

Several machines share a preparation by slices: each makes every `world`-th, in one work folder or
behind one bucket, and one of them puts all slices together (`merge`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tuppence import config
from tuppence.data import together, traits
from tuppence.data.cache import BUCKET, Bucket, load_bucket
from tuppence.data.given import stand_in
from tuppence.data.make import Options, Task, make, missing, stream_of, tokenizer_of
from tuppence.data.shards import (
    MANIFEST,
    REMEDY,
    Manifest,
    check_sizes,
    load_manifest,
    parse_manifest,
)
from tuppence.data.shelf import Shelf
from tuppence.data.survey import Survey, survey
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256, write_whole
from tuppence.host import usable_cores
from tuppence.store import Store
from tuppence.text import corpora
from tuppence.text.inputs import InputFile
from tuppence.text.reading import has_one_document
from tuppence.text.slices import slices_of
from tuppence.text.sources import find_files, slug_of, source_bytes
from tuppence.tokenizer.spec import parse_spec

ON_BAD = ("refuse", "skip")

__all__ = ["Options", "Prepared", "Progress", "Survey", "prepare", "prepare_slices", "survey"]


@dataclass(frozen=True)
class Progress:
    """Where a preparation stands. `phase` is a few words for a person; bytes are of input files."""

    phase: str
    done_bytes: int
    total_bytes: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """The folder of shards, its manifest, and whether it was there already."""

    folder: Path
    manifest: Manifest
    reused: bool


@dataclass(frozen=True)
class Sliced:
    """What one machine of several made: its slices of how many, their tokens, and where.

    `merged` where the slices of all were put together before; then `tokens` are of the whole.
    """

    folder: Path
    mine: int
    slices: int
    tokens: int
    merged: bool = False


@dataclass(frozen=True)
class Place:
    """Where shards go: a folder, or the bucket at `url`, which `root` then stands before.
    `cache_bytes` is how much of what is on a bucket may lie in `root`."""

    root: Path
    url: str | None = None
    cache_bytes: int = 20_000_000_000


class _Watch:
    """Tells `on_progress` where the work stands."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, *, total_bytes: int) -> None:
        self._tell = on_progress or (lambda progress: None)
        self._total_bytes = total_bytes
        self._began = time.monotonic()

    def say(self, phase: str, done_bytes: int = 0, tokens: int = 0) -> None:
        seconds = time.monotonic() - self._began
        self._tell(Progress(phase, done_bytes, self._total_bytes, tokens, seconds))


@dataclass(frozen=True)
class _Work:
    """A preparation that was asked for: what, where, under which key, and who hears of it."""

    task: Task
    folder: Path
    key: str
    store: Store | None
    watch: _Watch

    @property
    def shelf(self) -> Shelf:
        """The work folder, which is there until the folder is."""
        return Shelf(self.folder.with_name(f"{self.folder.name}.partial"), self.store)


def prepare(
    *,
    source: str,
    tokenizer: str,
    root: Path | Place,
    options: Options = Options(),  # noqa: B008 (frozen)
    fresh: bool = False,
    merge: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Shards of `source` in `root`, made now or found there.

    `options.max_tokens` caps the train split, exactly; reading stops when it and the validation
    split are full. `fresh` makes the folder anew; `merge` says how many machines have made
    the slices, which are only put together then. Raises UserError for bad input, Fault for a
    damaged folder.
    """
    work, place = _work(source, tokenizer, root, options, on_progress)
    assert options.world == 1, "a rank makes slices: prepare_slices"
    with together.alone(work.folder, say=work.watch.say):
        if not fresh and (found := _found(work, place)) is not None:
            return Prepared(work.folder, _checked(work, found), reused=True)
        shelf = work.shelf
        with _begun(work, fresh=fresh):
            made = tokenizer_of(work.task, shelf, say=work.watch.say)
            shelf.look()
            if merge:
                world = together.world_of(shelf) or merge
                _refuse_missing(missing(work.task, shelf, made), world)
            if not (shelf.folder / MANIFEST).exists():
                manifest = make(work.task, shelf, made, key=work.key, say=work.watch.say)
                work.task.check_unchanged()
                write_whole(shelf.folder / MANIFEST, manifest.to_json().encode())
            _refuse_bad(work, load_manifest(shelf.folder))
        _publish(work, place)
        return Prepared(work.folder, load_manifest(work.folder), reused=False)


def prepare_slices(
    *,
    source: str,
    tokenizer: str,
    root: Path | Place,
    options: Options,
    on_progress: Callable[[Progress], None] | None = None,
) -> Sliced:
    """This machine's slices, `options.rank` of `options.world`; `prepare(merge=True)` puts those
    of all together. Run again, it goes on where it was; where all are together already, it makes
    nothing. Raises as `prepare` does."""
    work, _ = _work(source, tokenizer, root, options, on_progress)
    with together.one_rank(work.folder, options.rank, say=work.watch.say):
        if (there := _merged(work)) is not None:
            _refuse_bad(work, there)
            count = len(slices_of(work.task.files))
            mine = len(range(options.rank, count, options.world))
            return Sliced(work.folder, mine, count, there.tokens, merged=True)
        with _begun(work, fresh=False):
            together.agree(work.folder, work.shelf, options.world)
            made = tokenizer_of(work.task, work.shelf, say=work.watch.say)
            stream = stream_of(work.task, work.shelf, made, say=work.watch.say)
            work.shelf.look()
            stream.fill(work.task.split().wanted_tokens())
        done = stream.done()
        made_here = [done[number] for number in stream.mine]
        for each in made_here:
            _refuse_left_out(work, work.shelf.folder, each.bad, each.named)
        tokens = sum(each.tokens for each in made_here)
        return Sliced(work.shelf.folder, len(made_here), len(done), tokens)


# ---------------------------------------------------------------- asked


def _work(
    source: str,
    tokenizer: str,
    root: Path | Place,
    options: Options,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[_Work, Place]:
    _check_options(options)
    parse_spec(tokenizer)
    found = find_files(source)
    watch = _Watch(on_progress, total_bytes=source_bytes(found))
    watch.say("hashing the inputs")
    found = _identified(found)
    single = has_one_document(found, text_field=options.text_field)
    task = Task(source, tokenizer, _licence(source), found, options, single)
    task.refuse_hopeless()
    key = task.key()
    name = f"{slug_of(source)}-{_tokenizer_slug(tokenizer)}-{key[:12]}"
    place = root if isinstance(root, Place) else Place(root)
    place.root.mkdir(parents=True, exist_ok=True)
    store = None
    if place.url is not None:
        store = Store(f"{place.url.rstrip('/')}/{name}")
        store.reach()
    return _Work(task, place.root / name, key, store, watch), place


def _licence(source: str) -> str | None:
    return corpora.CORPORA[source].licence if source in corpora.CORPORA else None


def _check_options(options: Options) -> None:
    for key in ("max_tokens", "val_tokens"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UserError(f"data.{key} is {value:,}; give at least 1, or leave it out")
    if not 1 <= options.shard_tokens < 2**31:
        raise UserError(
            f"shard_tokens is {options.shard_tokens:,}; a shard holds 1 to 2,147,483,647 tokens"
        )
    if not 0 <= options.rank < options.world:
        raise UserError(
            f"rank {options.rank} of {options.world}: ranks are 0 to {options.world - 1}"
        )
    if options.on_bad not in ON_BAD:
        raise UserError(f"data.on_bad={options.on_bad}: {' or '.join(ON_BAD)}")
    traits.bands_of(options.dedup)


def _identified(found: list[InputFile]) -> list[InputFile]:
    """The files with what their content is: where the place does not tell, they are hashed, and
    watched from then on."""

    def identified(file: InputFile) -> InputFile:
        if file.identity:
            return file
        path = Path(file.path)
        modified_ns = path.stat().st_mtime_ns
        return replace(file, identity=f"sha256:{file_sha256(path)}", modified_ns=modified_ns)

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(identified, found))


def _tokenizer_slug(spec: str) -> str:
    kind, argument = parse_spec(spec)
    return f"bpe{argument}" if kind == "bpe" else kind


# ---------------------------------------------------------------- found


def _found(work: _Work, place: Place) -> Manifest | None:
    """The manifest of a folder that is there, or on the bucket."""
    if not work.folder.exists() and work.store is not None:
        content = work.store.read(MANIFEST)
        if content is None:
            return None
        work.watch.say("found on the bucket")
        stand_in(work.folder, work.store, content, cache_bytes=place.cache_bytes)
    return load_manifest(work.folder) if work.folder.exists() else None


def _merged(work: _Work) -> Manifest | None:
    """The manifest where all slices were put together before, here or on the bucket."""
    if work.folder.exists():
        return load_manifest(work.folder)
    if work.store is None:
        return None
    content = work.store.read(MANIFEST)
    return None if content is None else parse_manifest(content, f"{work.store.url}/{MANIFEST}")


def _checked(work: _Work, manifest: Manifest) -> Manifest:
    """The manifest, whose sizes and tokenizer are as it says."""
    folder = work.folder
    if manifest.inputs_sha256 != work.key:
        raise Fault(f"{folder}: made from other inputs than its name says; {REMEDY}")
    if load_bucket(folder) is None:  # those of a bucket are looked at as they come
        check_sizes(folder, manifest)
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file() or file_sha256(path) != manifest.tokenizer_sha256:
        raise Fault(f"{path}: missing or altered since it was written; {REMEDY}")
    _refuse_bad(work, manifest)
    return manifest


def _refuse_bad(work: _Work, manifest: Manifest) -> None:
    _refuse_left_out(work, work.folder, manifest.bad, manifest.bad_named)


def _refuse_left_out(work: _Work, folder: Path, bad: dict[str, int], named: dict[str, str]) -> None:
    """Whoever does not want broken documents left out is told where another run did."""
    if bad and work.task.options.on_bad == "refuse":
        first = next(iter(named.values()))
        raise UserError(
            f"{folder} leaves out {sum(bad.values()):,} broken documents ({first}); say "
            "data.on_bad=skip to use it"
        )


# ---------------------------------------------------------------- made


@contextmanager
def _begun(work: _Work, *, fresh: bool) -> Iterator[None]:
    """The work folder is there; input that will not get better leaves an empty one behind gone."""
    folder = work.shelf.folder
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
        if work.store is not None:
            work.store.delete(MANIFEST)
            work.shelf.clear()
    elif folder.exists():
        work.watch.say("going on with a preparation that was interrupted")
    folder.mkdir(exist_ok=True)
    try:
        yield
    except UserError:
        if not together.has_ranks(work.folder) and not any(folder.glob("slice_*.json")):
            shutil.rmtree(folder)
        raise


def _refuse_missing(numbers: list[int], world: int) -> None:
    if numbers:
        ranks = sorted({number % world for number in numbers})
        which = f"rank {', '.join(map(str, ranks))} of {world}" if world > 1 else "a rank"
        shown = ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)
        raise UserError(f"slices {shown} are not made yet: run {which} again, then merge")


def _publish(work: _Work, place: Place) -> None:
    """What is made becomes the folder; on a bucket the manifest is the last to arrive."""
    shelf, manifest = work.shelf, load_manifest(work.shelf.folder)
    if work.store is not None:
        for path in sorted((shelf.folder / "tokenizer").iterdir()):
            shelf.write(f"tokenizer/{path.name}", path.read_bytes())
        shelf.keep(s.file for s in manifest.shards if (shelf.folder / s.file).exists())
        note = config.to_json(Bucket(work.store.url, place.cache_bytes))
        (shelf.folder / BUCKET).write_text(note, encoding="utf-8")
        shelf.write(MANIFEST, manifest.to_json().encode())
    shelf.clear({shard.file for shard in manifest.shards})
    _put_in_place(shelf.folder, work.folder)


def _put_in_place(made: Path, folder: Path) -> None:
    if folder.exists():  # a folder that is not empty cannot be renamed over
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        made.rename(folder)
        shutil.rmtree(old)
    else:
        made.rename(folder)
