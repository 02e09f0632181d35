"""One preparation, from slices to a manifest, wherever an earlier attempt left it.

tokenizer ─▶ slices ─▶ (without duplicates) ─▶ shards of the split ─▶ manifest, last of all
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuppence.data import dedup, traits
from tuppence.data.encode import Job
from tuppence.data.finish import assemble
from tuppence.data.lengths import Lengths
from tuppence.data.shards import MANIFEST_VERSION, Input, Manifest, token_dtype
from tuppence.data.shelf import Shelf
from tuppence.data.split import Asked, Split
from tuppence.data.stream import Stream
from tuppence.data.work import Done
from tuppence.errors import UserError
from tuppence.host import usable_cores
from tuppence.text.inputs import InputFile, check_unchanged
from tuppence.text.reading import sampled
from tuppence.text.slices import slices_of
from tuppence.text.sources import source_bytes
from tuppence.tokenizer.learned import BPE_TRAIN_CHARS
from tuppence.tokenizer.ranks import PUBLISHED
from tuppence.tokenizer.spec import (
    Tokenizer,
    build_tokenizer,
    check_keeps,
    load_tokenizer,
    parse_spec,
    spec_identity,
)

# Raise it when this program makes other tokens of the same inputs and options.
_RECIPE = 2
LARGE_BYTES = 1 << 23  # from it on, to learn a vocabulary takes memory that is not given back

SAMPLE_CHARS = 50_000  # that show whether a tokenizer of others fits this text

Say = Callable[[str, int, int], None]  # a few words, bytes read, tokens made


@dataclass(frozen=True)
class Options:
    """How a source becomes tokens. `seed` None leaves documents in the order of the files;
    `dedup` is none, exact or near; `on_bad` refuse or skip."""

    text_field: str = "text"
    max_tokens: int | None = None
    val_tokens: int | None = None
    seed: int | None = 0
    dedup: str = "none"
    on_bad: str = "refuse"
    shard_tokens: int = 100_000_000
    workers: int | None = None
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Task:
    """All that was asked, with its inputs found and hashed."""

    source: str
    tokenizer: str
    licence: str | None
    files: list[InputFile]
    options: Options
    single: bool

    def key(self) -> str:
        """sha256 over what the tokens depend on: contents and options, no names of files."""
        options = self.options
        kinds = [(file.kind, file.identity) for file in self.files]
        named = any(file.kind != "txt" for file in self.files)
        parts = [_RECIPE, kinds, spec_identity(self.tokenizer)]
        parts += [options.text_field if named else None, options.max_tokens, options.val_tokens]
        parts += [options.shard_tokens, options.seed, options.dedup]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raises Fault where a file has changed since it was hashed."""
        for file in self.files:
            check_unchanged(file)

    def split(self) -> Asked:
        """What the split depends on."""
        options = self.options
        return Asked(options.max_tokens, options.val_tokens, source_bytes(self.files), self.single)

    def refuse_hopeless(self) -> None:
        """Raises UserError for a val split that cannot be filled, as far as bytes tell: a token of
        our own tokenizers has one at least, and JSON has more of them than its documents."""
        plain = all(not file.compression and file.kind != "parquet" for file in self.files)
        if plain and parse_spec(self.tokenizer)[0] != "json":
            self.split().refuse_beyond(source_bytes(self.files) + len(self.files))


# ---------------------------------------------------------------- tokenizer


def tokenizer_of(task: Task, shelf: Shelf, *, say: Say) -> Tokenizer:
    """The tokenizer; one that is learned is saved at once, and found again."""
    folder = shelf.folder / "tokenizer"
    if (folder / "tokenizer.meta.json").exists():
        return load_tokenizer(folder)
    kind, _ = parse_spec(task.tokenizer)
    if kind == "bpe":
        say("learning the tokenizer from the corpus", 0, 0)
    if kind == "bpe" and source_bytes(task.files) > LARGE_BYTES:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as child:  # which takes its memory with it
            tokenizer = child.submit(_built, task).result()
    else:
        tokenizer = _built(task)
    if kind == "json":
        field = task.options.text_field
        sample = "".join(sampled(task.files, chars=SAMPLE_CHARS, text_field=field))[:SAMPLE_CHARS]
        check_keeps(sample, tokenizer)
    if kind in ("bpe", "char"):
        task.check_unchanged()  # before what was learned from them is kept
    if tokenizer.name not in PUBLISHED:  # whose files take a while to write: that is done beside
        tokenizer.save(folder)
    return tokenizer


@contextmanager
def _saved(tokenizer: Tokenizer, folder: Path) -> Iterator[None]:
    """Saved by the end, where it was not before."""
    with ThreadPoolExecutor(1) as beside:
        there = (folder / "tokenizer.meta.json").exists()
        saving = None if there else beside.submit(tokenizer.save, folder)
        yield
        if saving is not None:
            saving.result()


def _built(task: Task) -> Tokenizer:
    kind, _ = parse_spec(task.tokenizer)
    most = BPE_TRAIN_CHARS if kind == "bpe" else sys.maxsize

    def texts() -> Iterator[str]:
        return sampled(task.files, chars=most, text_field=task.options.text_field)

    single = task.single if kind == "char" else None
    return build_tokenizer(task.tokenizer, texts=texts, single_document=single)


# ---------------------------------------------------------------- tokens


def stream_of(task: Task, shelf: Shelf, tokenizer: Tokenizer, *, say: Say) -> Stream:
    """The slices of the input, those that this machine makes among them."""
    options, slices = task.options, slices_of(task.files)
    job = Job(
        files=task.files,
        text_field=options.text_field,
        tokenizer=tokenizer,
        dtype=token_dtype(tokenizer.vocab_size),
        seed=options.seed,
        dedup=options.dedup,
        languages=traits.can_tell_languages() and not task.single,
    )
    return Stream(
        slices=slices,
        mine=range(options.rank, len(slices), options.world),
        job=job,
        shelf=shelf,
        shard_tokens=options.shard_tokens,
        bands=traits.bands_of(options.dedup),
        on_bad=options.on_bad,
        workers=options.workers or usable_cores(),
        say=functools.partial(say, "tokenizing"),
    )


def make(task: Task, shelf: Shelf, tokenizer: Tokenizer, *, key: str, say: Say) -> Manifest:
    """All slices that are needed, as shards of the split. Raises UserError where there is no
    text."""
    stream = stream_of(task, shelf, tokenizer, say=say)
    asked, extra = task.split(), 0
    wanted = asked.wanted_tokens()
    while True:
        with _saved(tokenizer, shelf.folder / "tokenizer"):
            stream.fill(None if wanted is None else wanted + extra)
        done = _without_gap(stream.done())
        unique = _unique(done, shelf, tokenizer) if stream.bands else done
        tokens = sum(each.tokens for each in unique)
        everything = len(done) == len(stream.slices) and all(each.all for each in done)
        if everything or wanted is None or tokens >= wanted:
            break
        # what duplicates took is read behind them: twice as much each time, so that times are few
        extra = max(2 * extra, sum(each.tokens for each in done) - tokens)
    try:
        if not tokens:
            raise UserError(
                f"data.source {task.source!r} is empty: there is no text in it; give it some"
            )
        split = asked.split(tokens)
    except UserError:
        shelf.clear()  # the same question would get the same answer
        raise
    say("putting the shards in place", 0, tokens)
    needed = _needed(unique, max(split.train[1], split.val[1]))
    return _manifest(task, shelf, tokenizer, done[:needed], unique[:needed], split, key=key)


def _without_gap(done: list[Done]) -> list[Done]:
    """The slices that follow on one another from the first: a rank may have been ahead of others,
    and what it made behind a slice that was not read to its end is not next in the stream."""
    kept = []
    for each in done:
        if not each.finished:
            break
        kept.append(each)
        if not each.all:
            break
    return kept


def _needed(done: list[Done], stop: int) -> int:
    """How many slices of the stream begin by its token `stop`."""
    begins = itertools.accumulate((each.tokens for each in done[:-1]), initial=0)
    return sum(begin <= stop for begin in begins)


def missing(task: Task, shelf: Shelf, tokenizer: Tokenizer) -> list[int]:
    """The slices that are needed and not finished, of all machines."""
    wanted = task.split().wanted_tokens()
    shelf.look()
    tokens, lacking = 0, []
    for each in stream_of(task, shelf, tokenizer, say=lambda *_: None).done():
        if wanted is not None and tokens >= wanted:
            break
        tokens += each.tokens
        lacking += [] if each.finished else [each.slice]
    return lacking


def _unique(done: list[Done], shelf: Shelf, tokenizer: Tokenizer) -> list[Done]:
    return dedup.without(done, shelf, token_bytes=tokenizer.token_bytes())


# ---------------------------------------------------------------- manifest


def _manifest(
    task: Task,
    shelf: Shelf,
    tokenizer: Tokenizer,
    done: list[Done],
    unique: list[Done],
    split: Split,
    *,
    key: str,
) -> Manifest:
    """Put the shards in place, and tell of them."""
    options = task.options
    made = assemble(unique, shelf, split, tokenizer)
    tokens = made.train_tokens + made.val.tokens
    return Manifest(
        version=MANIFEST_VERSION,
        source=task.source,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        inputs=[Input(file.shown, file.bytes, file.identity) for file in task.files],
        inputs_sha256=key,
        documents=made.documents,
        tokens=tokens,
        train_tokens=made.train_tokens,
        val_tokens=made.val.tokens,
        bytes=made.bytes,
        bytes_per_token=made.bytes / tokens,
        val_bytes=made.val.bytes,
        val_sha256=made.val.sha256,
        split_rule=task.split().rule(split),
        text_field=options.text_field,
        max_tokens=options.max_tokens,
        seed=options.seed,
        dedup=options.dedup,
        duplicates=sum(each.documents for each in done) - sum(each.documents for each in unique),
        bad=_summed(each.bad for each in done),
        bad_named={why: line for each in reversed(done) for why, line in each.named.items()},
        lengths=_lengths(done),
        languages=_shares(_summed(each.languages for each in done)),
        licence=task.licence,
        shards=made.shards,
    )


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum, commonest first."""
    return dict(sum(map(Counter, counts), Counter[str]()).most_common())


def _shares(counts: dict[str, int]) -> dict[str, float] | None:
    total = sum(counts.values())
    return {name: round(count / total, 4) for name, count in counts.items()} or None


def _lengths(done: list[Done]) -> dict[str, float]:
    """Documents by their tokens: quantiles, and the ends. One that reading stopped in counts with
    what was read of it."""
    each_slice = (each.lengths.plus(np.array([each.begun] * (each.begun > 0))) for each in done)
    lengths = functools.reduce(Lengths.merged, each_slice, Lengths())
    shares = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: round(lengths.quantile(share), 1) for name, share in shares.items()}
    return {"shortest": lengths.shortest, **found, "longest": lengths.longest}
