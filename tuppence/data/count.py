"""Count what is in the shards, and hold it against what their manifest says.

Every token is looked at: the sha256 of each shard, the tokens that are in it, the documents that
end in it, the hash of all validation tokens. Shards that are on a bucket are not brought for it; of
those the sizes are compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuppence.data.cache import load_bucket
from tuppence.data.shards import (
    HEADER_BYTES,
    MANIFEST,
    REMEDY,
    Manifest,
    open_shard,
    token_dtype,
    verify,
)
from tuppence.errors import Fault
from tuppence.store import Away, Store

_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Count:
    """Tokens and shards of each split; `documents` by their end-of-texts, None where they were not
    read. `checked` says what was compared: sha256 or sizes."""

    tokens: dict[str, int]
    shards: dict[str, int]
    documents: int | None
    checked: str


def count(folder: Path, manifest: Manifest) -> Count:
    """Raises Fault naming the first shard, or sum over shards, that is not what the manifest says,
    or where a bucket does not answer."""
    bucket = load_bucket(folder)
    _compare(folder, manifest, _sums(manifest))
    if bucket is None:
        verify(folder, manifest)
        documents, val_sha256 = _read(folder, manifest)
        _compare(folder, manifest, {"documents": documents, "val_sha256": val_sha256})
        return _counted(manifest, "sha256", documents=documents)
    try:
        there = Store(bucket.url).find()
    except Away as error:
        raise Fault(f"{error}; run the same command again") from error
    itemsize = token_dtype(manifest.vocab_size).itemsize
    for shard in manifest.shards:
        wanted = HEADER_BYTES + shard.tokens * itemsize
        if there.get(shard.file) != wanted:
            found = there.get(shard.file)
            has = "is not there" if found is None else f"has {found:,} bytes"
            raise Fault(f"{bucket.url}/{shard.file} {has}, not {wanted:,}; prepare it again")
    return _counted(manifest, "sizes", documents=None)


def _counted(manifest: Manifest, checked: str, *, documents: int | None) -> Count:
    splits = {split: manifest.of_split(split) for split in ("train", "val")}
    tokens = {split: sum(shard.tokens for shard in shards) for split, shards in splits.items()}
    return Count(tokens, {k: len(v) for k, v in splits.items()}, documents, checked)


def _sums(manifest: Manifest) -> dict[str, int | str | None]:
    train, val = (sum(s.tokens for s in manifest.of_split(split)) for split in ("train", "val"))
    return {"train_tokens": train, "val_tokens": val, "tokens": train + val}


def _compare(folder: Path, manifest: Manifest, found: dict[str, int | str | None]) -> None:
    """Hold what was found against the manifest; None was not looked for."""
    for name, value in found.items():
        said = getattr(manifest, name)
        if value not in (None, said):
            raise Fault(
                f"{folder / MANIFEST}: {name} is {said}, and in the shards {value}; {REMEDY}"
            )


def _read(folder: Path, manifest: Manifest) -> tuple[int | None, str]:
    """The documents, None where nothing tells them apart, and the hash of the validation tokens."""
    digest = hashlib.sha256()
    ends = 0
    for shard in manifest.shards:
        tokens = open_shard(folder / shard.file)
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = tokens[start : start + _BLOCK_TOKENS]
            ends += int(np.count_nonzero(block == manifest.end_of_text))
            if shard.split == "val":
                digest.update(block.astype("<u4").data)
    if manifest.end_of_text is None:
        return None, digest.hexdigest()
    if manifest.documents == ends + 1 and _is_cut(folder, manifest):
        ends += 1
    return max(1, ends), digest.hexdigest()


def _is_cut(folder: Path, manifest: Manifest) -> bool:
    """Whether a cap runs through the last document, which lacks its end then."""
    if manifest.max_tokens is None:
        return False
    last = open_shard(folder / manifest.of_split("train")[-1].file)[-1]
    return bool(last != manifest.end_of_text)
