"""Count what is in the shards, and hold it against what their manifest says.

Every token is looked at: the sha256 of each shard, the tokens that are in it, the documents that
end in it. Shards that are on a bucket are not brought for it; of those the sizes are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuppence.data.cache import load_bucket
from tuppence.data.shards import HEADER_BYTES, Manifest, open_shard, token_dtype, verify
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
    """Raises Fault naming the first shard that is not what the manifest says, or where a bucket
    does not answer."""
    bucket = load_bucket(folder)
    if bucket is None:
        verify(folder, manifest)
        return _counted(manifest, "sha256", documents=_documents(folder, manifest))
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


def _documents(folder: Path, manifest: Manifest) -> int | None:
    if manifest.end_of_text is None:
        return None
    ends = 0
    for shard in manifest.shards:
        tokens = open_shard(folder / shard.file)
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = tokens[start : start + _BLOCK_TOKENS]
            ends += int(np.count_nonzero(block == manifest.end_of_text))
    return ends
