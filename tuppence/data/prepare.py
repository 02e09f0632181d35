"""Text to token shards: once per (inputs, options), on all cores, in memory that does not grow.

    read ─▶ cut ─▶ batches ─▶ encode on every core ─▶ append, in order, to shards ─▶ cut the tail
    off as val

The folder's name carries a hash over everything its tokens depend on, so asking again finds it.
It is written aside and renamed when whole: it is complete or absent, whatever kills the process,
and two processes that want the same folder take turns.

    val = the last min(tenth, 10,485,760) tokens, or `val_tokens`;  train = what is before it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tuppence.data.encode import encode_all
from tuppence.data.formats import InputFile, Meter
from tuppence.data.pieces import batches, recut
from tuppence.data.shards import (
    MANIFEST,
    MANIFEST_VERSION,
    REMEDY,
    Input,
    Manifest,
    check_sizes,
    load_manifest,
    token_dtype,
)
from tuppence.data.sources import find_files, has_one_document, read_pieces, slug_of, source_bytes
from tuppence.data.split import default_val_tokens, split_rule, wanted_tokens
from tuppence.data.survey import Survey, survey
from tuppence.data.tokenizer import Tokenizer, build_tokenizer, parse_spec, spec_identity
from tuppence.data.writer import ShardWriter, cut_tail
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256, locked
from tuppence.host import usable_cores

__all__ = ["Prepared", "Progress", "Survey", "prepare", "survey"]

# Raise it when this program makes other tokens of the same inputs and options.
_RECIPE = 1


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
class _Job:
    """All that was asked, with its inputs found and hashed."""

    source: str
    tokenizer: str
    found: list[InputFile]
    inputs: list[Input]
    text_field: str
    max_tokens: int | None
    val_tokens: int | None
    shard_tokens: int

    def key(self) -> str:
        """sha256 over what the tokens depend on: contents and options, no names of files."""
        kinds = [
            (file.kind, item.sha256) for file, item in zip(self.found, self.inputs, strict=True)
        ]
        named = any(file.kind != "txt" for file in self.found)
        parts = [_RECIPE, kinds, spec_identity(self.tokenizer), self.text_field if named else None]
        parts += [self.max_tokens, self.val_tokens, self.shard_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Watch:
    """Tells `on_progress` where the work stands."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, *, total_bytes: int) -> None:
        self._tell = on_progress or (lambda progress: None)
        self._total_bytes = total_bytes
        self._began = time.monotonic()

    def say(self, phase: str, *, done_bytes: int = 0, tokens: int = 0) -> None:
        seconds = time.monotonic() - self._began
        self._tell(Progress(phase, done_bytes, self._total_bytes, tokens, seconds))


def prepare(
    *,
    source: str,
    tokenizer: str,
    root: Path,
    text_field: str = "text",
    max_tokens: int | None = None,
    val_tokens: int | None = None,
    fresh: bool = False,
    shard_tokens: int = 100_000_000,
    on_progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Shards of `source` in `root`, made now or found there.

    `max_tokens` caps the train split, exactly; reading stops when it and the validation split are
    full. `fresh` makes the folder anew. Raises UserError for bad input, Fault for a damaged
    folder.
    """
    _check_options(max_tokens=max_tokens, val_tokens=val_tokens, shard_tokens=shard_tokens)
    parse_spec(tokenizer)
    found = find_files(source)
    watch = _Watch(on_progress, total_bytes=source_bytes(found))
    watch.say("hashing the inputs")
    inputs = _hash_inputs(found)
    job = _Job(source, tokenizer, found, inputs, text_field, max_tokens, val_tokens, shard_tokens)
    key = job.key()
    slug = "-".join((slug_of(source), _tokenizer_slug(tokenizer)))
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{slug}-{key[:12]}"
    with locked(
        root / f".{folder.name}.lock",
        on_wait=lambda: watch.say("waiting for another process that prepares the same"),
    ):
        if folder.exists() and not fresh:
            return Prepared(folder, _reuse(folder, key=key), reused=True)
        return Prepared(folder, _make(job, folder, key=key, watch=watch), reused=False)


def _check_options(*, max_tokens: int | None, val_tokens: int | None, shard_tokens: int) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"data.max_tokens is {max_tokens:,}; give at least 1, or leave it out")
    if val_tokens is not None and val_tokens < 1:
        raise UserError(f"data.val_tokens is {val_tokens:,}; give at least 1, or leave it out")
    if not 1 <= shard_tokens < 2**31:
        raise UserError(
            f"shard_tokens is {shard_tokens:,}; a shard holds 1 to 2,147,483,647 tokens"
        )


def _hash_inputs(found: list[InputFile]) -> list[Input]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        hashes = list(pool.map(file_sha256, (file.path for file in found)))
    sizes = [file.path.stat().st_size for file in found]
    shown = [file.shown for file in found]
    return [Input(*each) for each in zip(shown, sizes, hashes, strict=True)]


def _tokenizer_slug(spec: str) -> str:
    kind, argument = parse_spec(spec)
    return f"bpe{argument}" if kind == "bpe" else kind


def _reuse(folder: Path, *, key: str) -> Manifest:
    """The manifest of a folder that is there; sizes and the tokenizer's hash are checked."""
    manifest = load_manifest(folder)
    if manifest.inputs_sha256 != key:
        raise Fault(f"{folder}: made from other inputs than its name says; {REMEDY}")
    check_sizes(folder, manifest)
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file() or file_sha256(path) != manifest.tokenizer_sha256:
        raise Fault(f"{path}: missing or altered since it was written; {REMEDY}")
    return manifest


def _make(job: _Job, folder: Path, *, key: str, watch: _Watch) -> Manifest:
    """Write `<folder>.partial` and rename it. Call it with the folder's lock held."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        watch.say("starting over: an earlier preparation was interrupted")
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        manifest = _write(job, partial, key=key, watch=watch)
    except UserError:  # the input will not get better: leave nothing behind
        shutil.rmtree(partial)
        raise
    _put_in_place(partial, folder)
    return manifest


def _put_in_place(partial: Path, folder: Path) -> None:
    if folder.exists():  # a folder that is not empty cannot be renamed over
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)


def _write(job: _Job, partial: Path, *, key: str, watch: _Watch) -> Manifest:
    tokenizer = _tokenizer_for(job, watch=watch)
    wanted = wanted_tokens(max_tokens=job.max_tokens, val_tokens=job.val_tokens)
    with ThreadPoolExecutor(1) as beside:  # writing GPT-2's tokenizer.json takes half a second
        saving = beside.submit(tokenizer.save, partial / "tokenizer")
        stream = _write_stream(job, tokenizer, partial, wanted=wanted, watch=watch)
        saving.result()
    if not stream.bytes:
        raise UserError(
            f"data.source {job.source!r} is empty: there is no text in it; give it some"
        )
    watch.say("cutting off the validation split", tokens=stream.tokens)
    val_tokens = _val_tokens(job, stream.tokens)
    tail = cut_tail(
        stream.shards,
        tail_tokens=val_tokens,
        shard_tokens=job.shard_tokens,
        token_bytes=tokenizer.token_bytes(),
        vocab_size=tokenizer.vocab_size,
    )
    manifest = Manifest(
        version=MANIFEST_VERSION,
        source=job.source,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        inputs=job.inputs,
        inputs_sha256=key,
        documents=stream.documents,
        tokens=stream.tokens,
        train_tokens=stream.tokens - val_tokens,
        val_tokens=val_tokens,
        bytes=stream.bytes,
        bytes_per_token=stream.bytes / stream.tokens,
        val_bytes=tail.bytes,
        val_sha256=tail.sha256,
        split_rule=split_rule(max_tokens=job.max_tokens, val_tokens=job.val_tokens),
        text_field=job.text_field,
        max_tokens=job.max_tokens,
        shards=tail.shards,
    )
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _val_tokens(job: _Job, tokens: int) -> int:
    if job.val_tokens is None:
        return default_val_tokens(tokens)
    if 2 * job.val_tokens > tokens:
        raise UserError(
            f"data.val_tokens {job.val_tokens:,} is more than half of the {tokens:,} tokens there "
            f"are; give at most {tokens // 2:,}"
        )
    return job.val_tokens


def _tokenizer_for(job: _Job, *, watch: _Watch) -> Tokenizer:
    kind, _ = parse_spec(job.tokenizer)
    if kind == "bpe":
        watch.say("learning the tokenizer from the corpus")
    single = None
    if kind == "char":
        single = has_one_document(job.found, text_field=job.text_field)

    def texts() -> Iterator[str]:
        meter = Meter()
        pieces = read_pieces(job.found, text_field=job.text_field, meter=meter)
        for piece in recut(pieces, cut="anywhere" if kind == "char" else "before_space"):
            yield piece.text

    return build_tokenizer(job.tokenizer, texts=texts, single_document=single)


@dataclass
class _Stream:
    """What has been written: shards in stream order and counts over them."""

    shards: list[Path]
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


def _write_stream(
    job: _Job, tokenizer: Tokenizer, partial: Path, *, wanted: int | None, watch: _Watch
) -> _Stream:
    """All tokens, or the first `wanted`, into train shards."""
    meter = Meter()
    pieces = read_pieces(job.found, text_field=job.text_field, meter=meter)
    work = batches(recut(pieces, cut=tokenizer.cut))
    stream = _Stream([])
    token_bytes = tokenizer.token_bytes()
    dtype = token_dtype(tokenizer.vocab_size)
    with ShardWriter(partial, "train", dtype=dtype, shard_tokens=job.shard_tokens) as writer:
        for encoded in encode_all(work, tokenizer, dtype=dtype):
            left = None if wanted is None else wanted - stream.tokens
            kept = encoded.until(left, token_bytes=token_bytes)
            writer.append(kept.ids)
            stream.tokens += len(kept.ids)
            stream.bytes += kept.text_bytes
            stream.documents += len(kept.starts)
            watch.say("tokenizing", done_bytes=meter.done_bytes, tokens=stream.tokens)
            if stream.tokens == wanted:
                break
    stream.shards = writer.paths
    return stream
