"""Tokens as other projects read them.

nanogpt   train.bin, val.bin: uint16, no header; of characters meta.pkl too, which names them
llmc      NAME_train_000000.bin ..., NAME_val_000000.bin ...: a header, then tokens
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuppence.data.cache import Cache, load_bucket
from tuppence.data.shards import (
    HEADER_BYTES,
    Manifest,
    Shard,
    Tokens,
    header,
    open_shard,
    token_dtype,
)
from tuppence.errors import UserError
from tuppence.tokenizer.json_file import END_OF_TEXT
from tuppence.tokenizer.kinds import CharTokenizer
from tuppence.tokenizer.spec import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
LARGEST_BYTES = 2**31 - 1  # of a file for llm.c, which seeks in it with an int
_BLOCK_TOKENS = 1 << 22

Opened = Callable[[Shard], Tokens]


@dataclass(frozen=True)
class _Part:
    """Some of a shard's tokens."""

    shard: Shard
    start: int
    stop: int


def export(folder: Path, manifest: Manifest, *, how: str, out: Path) -> list[Path]:
    """Write a prepared folder's tokens for another project into `out`; returns the files.

    Raises UserError where they cannot hold them, or where others lie that would be read as well.
    """
    if how == "nanogpt" and manifest.vocab_size > 2**16:
        raise UserError(
            f"nanoGPT's files hold ids below 65,536, and {manifest.tokenizer} has "
            f"{manifest.vocab_size:,} of them"
        )
    bucket = load_bucket(folder)
    cache = None if bucket is None else Cache(folder, manifest, bucket)

    def opened(shard: Shard) -> Tokens:
        return open_shard(folder / shard.file) if cache is None else cache.open(shard)

    out.mkdir(parents=True, exist_ok=True)
    if how == "llmc":
        return _for_llmc(manifest, out, opened)
    return _for_nanogpt(manifest, out, opened, load_tokenizer(folder / "tokenizer"))


def _for_nanogpt(manifest: Manifest, out: Path, opened: Opened, tokenizer: Tokenizer) -> list[Path]:
    meta = out / "meta.pkl"
    if isinstance(tokenizer, CharTokenizer):
        meta.write_bytes(_meta(tokenizer))
    elif meta.exists():
        raise UserError(
            f"{meta} tells nanoGPT of other tokens; delete it, or give --out another folder"
        )
    for split in SPLITS:
        parts = [_Part(shard, 0, shard.tokens) for shard in manifest.of_split(split)]
        _write(out / f"{split}.bin", b"", parts, dtype=np.dtype("<u2"), opened=opened)
    return [path for path in (out / "train.bin", out / "val.bin", meta) if path.exists()]


def _for_llmc(manifest: Manifest, out: Path, opened: Opened) -> list[Path]:
    """A file for each shard, or for as much of it as a file may hold; none for an empty one."""
    dtype, name = token_dtype(manifest.vocab_size), out.resolve().name
    most = (LARGEST_BYTES - HEADER_BYTES) // dtype.itemsize
    targets: dict[Path, _Part] = {}
    for split in SPLITS:
        parts = [
            _Part(shard, start, min(start + most, shard.tokens))
            for shard in manifest.of_split(split)
            for start in range(0, shard.tokens, most)
        ]
        targets |= {out / f"{name}_{split}_{i:06d}.bin": part for i, part in enumerate(parts)}
    _refuse_others(out, name, targets)
    for target, part in targets.items():
        head = header(dtype=dtype, count=part.stop - part.start)
        _write(target, head, [part], dtype=dtype, opened=opened)
    return list(targets)


def _refuse_others(out: Path, name: str, targets: Iterable[Path]) -> None:
    """What a longer export left would be trained on as well: a glob finds the files."""
    starts = tuple(f"{name}_{split}_" for split in SPLITS)
    there = {path for path in out.glob("*.bin") if path.name.startswith(starts)}
    others = sorted(there.difference(targets))
    if others:
        raise UserError(
            f"{others[0]} is of another export, and would be read as well; delete it, or give "
            "--out another folder"
        )


def _write(
    target: Path, head: bytes, parts: list[_Part], *, dtype: np.dtype[Any], opened: Opened
) -> None:
    """Written aside, then renamed."""
    aside = target.with_name(f"{target.name}.tmp")
    with aside.open("wb") as file:
        file.write(head)
        for part in parts:
            tokens = opened(part.shard)
            for start in range(part.start, part.stop, _BLOCK_TOKENS):
                block = tokens[start : min(start + _BLOCK_TOKENS, part.stop)]
                file.write(np.ascontiguousarray(block, dtype).data)
    aside.replace(target)


def _meta(tokenizer: CharTokenizer) -> bytes:
    """The characters, as nanoGPT's training (vocab_size) and sampling (stoi, itos) ask for them."""
    stoi = {character: i for i, character in enumerate(tokenizer.alphabet)}
    itos = {i: character for character, i in stoi.items()}
    if tokenizer.end_of_text is not None:
        itos[tokenizer.end_of_text] = END_OF_TEXT
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": stoi}
    return b"\x80\x02" + _pickled(meta) + b"."


def _pickled(value: Any) -> bytes:
    """Numbers, strings and dicts of them in pickle's second protocol: nothing here imports what
    could also read, and so run, one."""
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        content = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(content)) + content
    pairs = b"".join(_pickled(key) + _pickled(each) for key, each in value.items())
    return b"}(" + pairs + b"u"
