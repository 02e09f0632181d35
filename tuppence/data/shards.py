"""Tokens on disk: shards in the format of llm.c and modded-nanogpt, and the manifest beside them.

    shard = 256 x int32 [magic, version, count, 0 ...]  then count tokens
            magic 20240520, version 1: uint16       magic 20240801, version 7: uint32

A nanoGPT .bin (uint16, no header) is read too. Sizes are checked whenever a shard is opened,
contents (sha256 of the file) when someone asks for it.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from tuppence.errors import Fault
from tuppence.files import file_sha256

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
MAX_SHARD_TOKENS = 2**31 - 1
REMEDY = "re-run prepare with --fresh, or delete the folder"

_T = TypeVar("_T")
Tokens: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_UINT16, _UINT32 = np.dtype("<u2"), np.dtype("<u4")
_FORMATS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): _UINT16, (20240801, 7): _UINT32}


@dataclass(frozen=True)
class Input:
    """A file that tokens came from; `path` is as the person gave it, with the revision of a
    dataset. `identity` names its content: sha256:HEX, or what the place it lies at calls it."""

    path: str
    bytes: int
    identity: str


@dataclass(frozen=True)
class Shard:
    file: str
    split: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and what it was made from.

    `tokens` and `documents` count all splits, end-of-text included; `bytes` is the UTF-8 text
    that the tokens stand for; `val_sha256` is over the validation tokens as little-endian uint32,
    so that it does not depend on how they are stored; `inputs_sha256` covers all that the tokens
    depend on.

    `seed` is of the documents' order, None where they are in the order of the files. `duplicates`
    were left out, and so were those that `bad` counts by what was wrong; `bad_named` has the first
    of each. `lengths` (in tokens) and `languages` (shares of a sample; None where they were not
    looked at) tell what kind of documents there are. These five are of what was read: of the slice
    that a cap ends in, that may be more than was kept, and another machine may have read more.
    """

    version: int
    source: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_text: int | None
    inputs: list[Input]
    inputs_sha256: str
    documents: int
    tokens: int
    train_tokens: int
    val_tokens: int
    bytes: int
    bytes_per_token: float
    val_bytes: int
    val_sha256: str
    split_rule: str
    text_field: str
    max_tokens: int | None
    seed: int | None
    dedup: str
    duplicates: int
    bad: dict[str, int]
    bad_named: dict[str, str]
    lengths: dict[str, float]
    languages: dict[str, float] | None
    licence: str | None
    shards: list[Shard]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32; little-endian."""
    return _UINT16 if vocab_size <= 2**16 else _UINT32


def header(*, dtype: np.dtype[Any], count: int) -> bytes:
    """The first 1,024 bytes of a shard."""
    magic, version = next(key for key, kind in _FORMATS.items() if kind == dtype)
    words = np.zeros(HEADER_INTS, dtype="<i4")
    words[:3] = magic, version, count
    return words.tobytes()


def write_shard(path: Path, tokens: npt.NDArray[Any], *, vocab_size: int) -> None:
    """Write one shard whole. `tokens` are ids below `vocab_size`, at most 2^31 - 1 of them."""
    dtype = token_dtype(vocab_size)
    assert len(tokens) <= MAX_SHARD_TOKENS, "a shard's count is an int32"
    with path.open("wb") as file:
        file.write(header(dtype=dtype, count=len(tokens)))
        file.write(np.ascontiguousarray(tokens, dtype=dtype).data)


def open_shard(path: Path, *, tokens: int | None = None) -> Tokens:
    """The shard's tokens, memory-mapped. Raises Fault for a truncated or foreign file; where it is
    one of ours, which has so many `tokens`, for one without a header too."""
    if not path.is_file():
        raise Fault(f"{path}: shard is missing; {REMEDY}")
    size = path.stat().st_size
    words = np.fromfile(path, dtype="<i4", count=3)
    dtype = _FORMATS.get((int(words[0]), int(words[1]))) if len(words) == 3 else None
    if dtype is None or size < HEADER_BYTES:
        if tokens is not None:
            raise Fault(f"{path}: has no header, so it was half written; {REMEDY}")
        return _open_headerless(path, size_bytes=size)
    count = int(words[2])
    found = (size - HEADER_BYTES) / dtype.itemsize
    if count != found:
        raise Fault(
            f"{path}: header says {count:,} tokens, the file holds {found:,.10g}; it was cut short "
            f"or altered: {REMEDY}"
        )
    if tokens not in (None, count):
        raise Fault(f"{path}: has {count:,} tokens, not the {tokens:,} it was made with; {REMEDY}")
    return _mapped(path, dtype=dtype, offset=HEADER_BYTES, count=count)


def _open_headerless(path: Path, *, size_bytes: int) -> Tokens:
    if path.suffix != ".bin" or size_bytes % 2:
        raise Fault(
            f"{path}: neither a shard with a known header nor a nanoGPT .bin of uint16 "
            f"({size_bytes:,} bytes); {REMEDY}"
        )
    return _mapped(path, dtype=_UINT16, offset=0, count=size_bytes // 2)


def _mapped(path: Path, *, dtype: np.dtype[Any], offset: int, count: int) -> Tokens:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
    return np.asarray(mapped)  # a plain view: the subclass costs a microsecond per slice


def load_manifest(folder: Path) -> Manifest:
    """The folder's manifest. Raises Fault where it is missing, damaged or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise Fault(f"{path}: missing, so this is no prepared corpus; run prepare")
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """The manifest that is in `text`, found at `path`. Raises Fault as load_manifest does."""
    try:
        content = json.loads(text)
        found = content.get("version")
        if found != MANIFEST_VERSION:
            raise Fault(f"{path}: version {found}, this program reads {MANIFEST_VERSION}; {REMEDY}")
        inputs = [_strict(Input, item, path) for item in content.pop("inputs")]
        shards = [_strict(Shard, item, path) for item in content.pop("shards")]
        return _strict(Manifest, content | {"inputs": inputs, "shards": shards}, path)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise Fault(f"{path}: not a manifest ({error!r}); {REMEDY}") from None


def _strict(kind: type[_T], content: dict[str, Any], path: Path | str) -> _T:
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    odd = sorted(names ^ set(content))
    if odd:
        raise Fault(f"{path}: {kind.__name__} has missing or unknown keys {odd}; {REMEDY}")
    return kind(**content)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every shard is there and as long as the manifest says. Raises Fault; reads no tokens."""
    for shard in manifest.shards:
        found = len(open_shard(folder / shard.file))
        if found != shard.tokens:
            raise Fault(
                f"{folder / shard.file}: the manifest says {shard.tokens:,} tokens, the shard has "
                f"{found:,}; {REMEDY}"
            )


def verify(folder: Path, manifest: Manifest) -> None:
    """Hash every shard again. Raises Fault naming the first that differs from the manifest."""
    check_sizes(folder, manifest)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(file_sha256, (folder / shard.file for shard in manifest.shards)))
    for shard, sha256 in zip(manifest.shards, found, strict=True):
        if sha256 != shard.sha256:
            raise Fault(
                f"{folder / shard.file}: sha256 {sha256[:12]} instead of {shard.sha256[:12]}; its "
                f"content has changed: {REMEDY}"
            )
