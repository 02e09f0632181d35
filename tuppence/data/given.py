"""Tokens that are there already, read where they lie. (`export` writes them for others.)

    a folder or bucket with a manifest.json     what `tuppence prepare` made, here or elsewhere
    train.bin, val.bin                          nanoGPT: uint16, no header
    *train*.bin, *val*.bin                      llm.c and modded-nanogpt: a header, then tokens
                                            (of the two words, the last in a name counts)

Which tokenizer made them no such file says; `data.tokenizer` does. Their tokens are counted once,
hashed on the way, and never copied: the manifest names the files where they are.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuppence import config
from tuppence.data.cache import BUCKET, Bucket, load_bucket
from tuppence.data.shards import (
    MANIFEST,
    MANIFEST_VERSION,
    REMEDY,
    Input,
    Manifest,
    Shard,
    Tokens,
    load_manifest,
    open_shard,
    parse_manifest,
)
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256, locked, write_whole
from tuppence.store import KNOWN, Away, Store, is_url
from tuppence.text.inputs import kind_of
from tuppence.text.sources import MAGIC, slug_of
from tuppence.tokenizer.spec import Tokenizer, build_tokenizer, parse_spec, spec_identity

SPLITS = ("train", "val")
GPT2_BYTES = 4.3  # that a token of English stands for, where nobody has counted
_BLOCK_TOKENS = 1 << 22
_PROOF = 10_000  # characters that show whose tokens they are


@dataclass(frozen=True)
class Glance:
    """What a look at such a source tells: exact where a manifest says it."""

    tokenizer: str
    train_tokens: int
    val_tokens: int
    vocab_size: int
    bytes_per_token: float
    exact: bool


@dataclass(frozen=True)
class Counted:
    """What one file of tokens holds; `counts` [vocab_size] is how often each id stands in it."""

    shard: Shard
    counts: npt.NDArray[np.int64]


def token_files(source: str) -> list[Path]:
    """The files of tokens that a source names, training first; none where it names something
    else. Raises UserError where a part of a list is not there, or a split has no file."""
    if is_url(source):
        return []
    parts = [source] if os.path.exists(Path(source).expanduser()) else source.split(",")
    named = {part: _of(part) for part in map(str.strip, parts) if part}
    found = [path for paths in named.values() for path in paths]
    if not found or any(path.suffix != ".bin" for path in found):
        return []
    lost = next((part for part, paths in named.items() if not paths), None)
    if lost is not None:
        raise UserError(f"data.source {lost!r}: no tokens there, as there are in the others")
    splits = {_split_of(path) for path in found}
    for split, purpose in zip(SPLITS, ("training", "validation"), strict=True):
        if split not in splits:
            raise UserError(
                f"data.source={source}: no file for {purpose}, with {split} in its name"
            )
    return sorted(found, key=lambda path: (_split_of(path) == "val", path))


def given(source: str, tokenizer: str | None, root: Path, *, cache_bytes: int) -> Path | None:
    """The prepared folder of a source that is tokens already; None where it is text. That of a
    bucket has all but the shards, of which at most `cache_bytes` will lie in it.

    Raises UserError where they are not what the tokenizer makes, or no file is for validation.
    """
    manifest = _manifest_of(source)
    if manifest is not None:
        _check_tokenizer(source, manifest, tokenizer)
        if is_url(source):
            return _on_bucket(source.rstrip("/"), manifest, root, cache_bytes)
        return Path(source).expanduser()
    files = token_files(source)
    return _counted(source, files, tokenizer or "gpt2", root) if files else None


def glance(source: str, tokenizer: str | None) -> Glance | None:
    """What is known of a source that is tokens already, without reading them; None for text."""
    manifest = _manifest_of(source)
    if manifest is not None:
        _check_tokenizer(source, manifest, tokenizer)
        sizes = (manifest.train_tokens, manifest.val_tokens, manifest.vocab_size)
        return Glance(manifest.tokenizer, *sizes, manifest.bytes_per_token, exact=True)
    files = token_files(source)
    if not files:
        return None
    made = _tokenizer(source, files, tokenizer or "gpt2")
    counts = [(len(_tokens(path)), _split_of(path)) for path in files]
    train, val = (sum(count for count, of in counts if of == split) for split in SPLITS)
    mean_bytes = float(made.token_bytes().mean()) if made.vocab_size < 1000 else GPT2_BYTES
    return Glance(made.name, train, val, made.vocab_size, mean_bytes, exact=False)


def stand_in(folder: Path, store: Store, manifest: bytes, *, cache_bytes: int) -> None:
    """Make a folder for shards that are on a bucket: all but the shards."""
    aside = folder.with_name(f"{folder.name}.fetching")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "tokenizer").mkdir(parents=True)
    for name in store.find("tokenizer"):
        store.fetch(name, aside / name)
    (aside / BUCKET).write_text(config.to_json(Bucket(store.url, cache_bytes)), encoding="utf-8")
    (aside / MANIFEST).write_bytes(manifest)
    aside.rename(folder)


def _on_bucket(url: str, manifest: Manifest, root: Path, cache_bytes: int) -> Path:
    """The folder that stands here for one there; another content there is another folder."""
    content, store = manifest.to_json().encode(), Store(url)
    key = hashlib.sha256(url.encode() + content).hexdigest()
    folder = root / f"{url.rpartition('/')[2]}-{key[:8]}"
    with locked(root / f".{folder.name}.lock", on_wait=lambda: None), _told(store):
        if not folder.exists():
            stand_in(folder, store, content, cache_bytes=cache_bytes)
        elif load_bucket(folder) != Bucket(url, cache_bytes):
            write_whole(folder / BUCKET, config.to_json(Bucket(url, cache_bytes)).encode())
    return folder


def _manifest_of(source: str) -> Manifest | None:
    """Of a folder here or on a bucket that has one. What others call so is none."""
    if not is_url(source):
        path = Path(source).expanduser() / MANIFEST
        ours = os.path.isfile(path) and _is_ours(path.read_bytes())
        return load_manifest(path.parent) if ours else None
    protocol, _, rest = source.partition("://")
    if protocol not in KNOWN or kind_of(source) or MAGIC.search(source) or "," in rest:
        return None
    store = Store(source)
    store.reach()
    with _told(store):
        content = store.read(MANIFEST)
    if content is None or not _is_ours(content):
        return None
    return parse_manifest(content, f"{store.url}/{MANIFEST}")


def _is_ours(content: bytes) -> bool:
    """Whether a manifest.json tells of shards; one that cannot be read may have."""
    try:
        found = json.loads(content)
    except ValueError:
        return True
    return isinstance(found, dict) and {"version", "tokenizer", "shards"} <= found.keys()


@contextmanager
def _told(store: Store) -> Iterator[None]:
    """One line for a person where a bucket does not answer, or has not all."""
    try:
        yield
    except (Away, FileNotFoundError) as error:
        raise UserError(f"{store.url}: {store.advice(error)}") from error


def _check_tokenizer(source: str, manifest: Manifest, asked: str | None) -> None:
    """`char` and `char:ALPHABET` are one kind; what a folder holds is not learned anew."""
    if asked is None or asked == manifest.tokenizer:
        return
    kind, _ = parse_spec(asked)
    same = kind == "char" == manifest.tokenizer
    if kind == "json":
        made = build_tokenizer(asked, texts=lambda: iter(()))
        same = made.sha256 == manifest.tokenizer_sha256
    if not same:
        raise UserError(
            f"data.tokenizer={asked}: {source} was made with {manifest.tokenizer}; "
            "data.tokenizer=none takes that"
        )


def _tokenizer(source: str, files: list[Path], spec: str) -> Tokenizer:
    """The tokenizer that made the files. The characters of nanoGPT's own text, which it leaves
    beside them, are its alphabet. Raises UserError for one that cannot be had without text."""
    kind, argument = parse_spec(spec)
    text = files[0].with_name("input.txt")
    if kind == "char" and not argument and text.is_file():
        try:
            content = text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{text}: not UTF-8 ({error.reason} at byte {error.start:,})") from None
        made = build_tokenizer(spec, texts=lambda: iter([content]), single_document=True)
        tokens = _tokens(files[0])[:_PROOF]
        if not np.array_equal(made.encode(content[: len(tokens)]), tokens):
            raise UserError(f"{files[0]}: not made from {text} by its characters, sorted")
        return made
    if kind == "bpe" or (kind == "char" and not argument):
        raise UserError(
            f"data.source={source} is tokens, and data.tokenizer={spec} is learned from text; "
            "name the one that made them: gpt2, char:ALPHABET, or a tokenizer.json"
        )
    return build_tokenizer(spec, texts=lambda: iter(()), single_document=kind == "char")


def _of(part: str) -> list[Path]:
    """What a part of a source names, as far as it may be tokens."""
    path = Path(part).expanduser()
    if not os.path.isdir(path):
        there = os.path.exists(path)
        return [path] if there else [*map(Path, glob.glob(str(path), recursive=True))]
    found = [each for each in path.glob("*.bin") if "train" in each.name or "val" in each.name]
    if len({_split_of(each) for each in found}) == 2:
        return found
    texts = any(kind_of(each.name) for each in path.rglob("*"))  # beside them it is something else
    return [] if texts else found


def _split_of(path: Path) -> str:
    return "val" if path.name.rfind("val") > path.name.rfind("train") else "train"


def _tokens(path: Path) -> Tokens:
    """As shards are opened; the remedy for a broken one is another."""
    try:
        return open_shard(path)
    except Fault as error:
        remedy = "copy it again, or make it again where it comes from"
        raise UserError(str(error).replace(REMEDY, remedy)) from None


def _counted(source: str, files: list[Path], spec: str, root: Path) -> Path:
    """A folder whose manifest names the files, made now or found."""
    tokenizer = _tokenizer(source, files, spec)
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([stamps, spec_identity(spec)]).encode()).hexdigest()
    folder = root / f"{slug_of(source)}-{parse_spec(spec)[0]}-{key[:12]}"
    with locked(root / f".{folder.name}.lock", on_wait=lambda: None):
        if not (folder / MANIFEST).exists():
            counted = [_count(path, tokenizer) for path in files]
            tokenizer.save(folder / "tokenizer")
            manifest = _manifest(source, files, counted, tokenizer)
            write_whole(folder / MANIFEST, manifest.to_json().encode())
    return folder


def _count(path: Path, tokenizer: Tokenizer) -> Counted:
    """Look at every token once. Raises UserError for one that the tokenizer does not have."""
    tokens = _tokens(path)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        block = tokens[start : start + _BLOCK_TOKENS]
        if int(block.max()) >= len(counts):
            at = start + int(np.argmax(block >= len(counts)))
            raise UserError(
                f"{path}: token {int(tokens[at]):,} at {at:,}, and {tokenizer.name} has "
                f"{len(counts):,}; name the tokenizer that made the file (data.tokenizer)"
            )
        counts += np.bincount(block, minlength=len(counts))
    shard = Shard(str(path.resolve()), _split_of(path), len(tokens), file_sha256(path))
    return Counted(shard, counts)


def _manifest(
    source: str, files: list[Path], counted: list[Counted], tokenizer: Tokenizer
) -> Manifest:
    sizes = tokenizer.token_bytes().astype(np.int64)
    end = tokenizer.end_of_text
    shards = [each.shard for each in counted]
    train, val = (sum(s.tokens for s in shards if s.split == split) for split in SPLITS)
    text_bytes = sum(int(each.counts @ sizes) for each in counted)
    val_bytes = sum(int(each.counts @ sizes) for each in counted if each.shard.split == "val")
    documents = 1 if end is None else sum(int(each.counts[end]) for each in counted)
    inputs = [
        Input(str(path), path.stat().st_size, f"sha256:{shard.sha256}")
        for path, shard in zip(files, shards, strict=True)
    ]
    identities = [item.identity for item in inputs] + [tokenizer.sha256]
    return Manifest(
        version=MANIFEST_VERSION,
        source=source,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text=end,
        inputs=inputs,
        inputs_sha256=hashlib.sha256(json.dumps(identities).encode()).hexdigest(),
        documents=max(1, documents),
        tokens=train + val,
        train_tokens=train,
        val_tokens=val,
        bytes=text_bytes,
        bytes_per_token=text_bytes / max(1, train + val),
        val_bytes=val_bytes,
        val_sha256=_sha256_of(path for path in files if _split_of(path) == "val"),
        split_rule="as the files are named",
        text_field="text",
        max_tokens=None,
        seed=None,
        dedup="none",
        duplicates=0,
        bad={},
        bad_named={},
        lengths={},
        languages=None,
        licence=None,
        shards=shards,
    )


def _sha256_of(paths: Iterable[Path]) -> str:
    """Over the tokens as little-endian uint32."""
    digest = hashlib.sha256()
    for path in paths:
        tokens = open_shard(path)
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            digest.update(tokens[start : start + _BLOCK_TOKENS].astype("<u4").data)
    return digest.hexdigest()
