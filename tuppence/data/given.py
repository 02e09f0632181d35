"""Tokens that are there already: read where they lie, and written for other projects.

    a folder or bucket with a manifest.json     what `tuppence prepare` made, here or elsewhere
    train.bin, val.bin                          nanoGPT: uint16, no header
    *train*.bin, *val*.bin                      llm.c and modded-nanogpt: a header, then tokens

Which tokenizer made them no such file says; `data.tokenizer` does. Their tokens are counted once,
hashed on the way, and never copied: the manifest names the files where they are.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuppence import config
from tuppence.data.cache import BUCKET, Bucket
from tuppence.data.inputs import kind_of
from tuppence.data.shards import (
    MANIFEST,
    MANIFEST_VERSION,
    Input,
    Manifest,
    Shard,
    load_manifest,
    open_shard,
    parse_manifest,
)
from tuppence.data.sources import slug_of
from tuppence.data.tokenizer import Tokenizer, build_tokenizer, parse_spec, spec_identity
from tuppence.errors import UserError
from tuppence.files import file_sha256, write_whole
from tuppence.store import Store, is_url

FORMATS = ("nanogpt", "llmc")
SPLITS = ("train", "val")
GPT2_BYTES = 4.3  # that a token of English stands for, where nobody has counted
BUCKETS = ("s3", "gs", "file", "memory")
_BLOCK_TOKENS = 1 << 22
_PROOF = 10_000  # characters that show whose tokens they are


@dataclass(frozen=True)
class Glance:
    """What a look at such a source tells: exact where a manifest says it."""

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
    else."""
    if "://" in source:
        return []
    found = [path for part in source.split(",") for path in _of(part.strip())]
    if not found or any(path.suffix != ".bin" for path in found):
        return []
    return sorted(found, key=lambda path: ("val" in path.name, path))


def given(source: str, tokenizer: str | None, root: Path, *, cache_bytes: int) -> Path | None:
    """The prepared folder of a source that is tokens already; None where it is text. That of a
    bucket has all but the shards, of which at most `cache_bytes` will lie in it.

    Raises UserError where they are not what the tokenizer makes, or no file is for validation.
    """
    manifest = _manifest_of(source)
    if manifest is not None:
        _check_tokenizer(source, manifest, tokenizer)
        if not is_url(source):
            return Path(source).expanduser()
        url = source.rstrip("/")
        name = url.rpartition("/")[2]
        folder = root / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
        if not folder.exists():
            stand_in(folder, Store(url), manifest.to_json().encode(), cache_bytes=cache_bytes)
        return folder
    files = token_files(source)
    return _counted(source, files, tokenizer or "gpt2", root) if files else None


def glance(source: str, tokenizer: str | None) -> Glance | None:
    """What is known of a source that is tokens already, without reading them; None for text."""
    manifest = _manifest_of(source)
    if manifest is not None:
        _check_tokenizer(source, manifest, tokenizer)
        sizes = (manifest.train_tokens, manifest.val_tokens, manifest.vocab_size)
        return Glance(*sizes, manifest.bytes_per_token, exact=True)
    files = token_files(source)
    if not files:
        return None
    made = _tokenizer(source, files, tokenizer or "gpt2")
    counts = [(len(open_shard(path)), "val" in path.name) for path in files]
    train, val = (sum(count for count, is_val in counts if is_val == which) for which in (0, 1))
    mean_bytes = float(made.token_bytes().mean()) if made.vocab_size < 1000 else GPT2_BYTES
    return Glance(train, val, made.vocab_size, mean_bytes, exact=False)


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


def _manifest_of(source: str) -> Manifest | None:
    """Of a folder here or on a bucket that has one."""
    if not is_url(source):
        path = Path(source).expanduser() / MANIFEST
        return load_manifest(path.parent) if path.is_file() else None
    if source.partition("://")[0] not in BUCKETS or kind_of(source) or "*" in source:
        return None
    store = Store(source)
    store.reach()
    content = store.read(MANIFEST)
    return None if content is None else parse_manifest(content, f"{source}/{MANIFEST}")


def _check_tokenizer(source: str, manifest: Manifest, asked: str | None) -> None:
    kind = manifest.tokenizer.partition(":")[0]
    if asked is not None and asked != manifest.tokenizer and parse_spec(asked)[0] != kind:
        raise UserError(
            f"data.tokenizer={asked}: {source} was made with {manifest.tokenizer}; leave it out"
        )


def _tokenizer(source: str, files: list[Path], spec: str) -> Tokenizer:
    """The tokenizer that made the files. The characters of nanoGPT's own text, which it leaves
    beside them, are its alphabet. Raises UserError for one that cannot be had without text."""
    kind, argument = parse_spec(spec)
    text = files[0].with_name("input.txt")
    if kind == "char" and not argument and text.is_file():
        content = text.read_text(encoding="utf-8")
        made = build_tokenizer(spec, texts=lambda: iter([content]), single_document=True)
        tokens = open_shard(files[0])[:_PROOF]
        if not np.array_equal(made.encode(content[: len(tokens)]), tokens):
            raise UserError(f"{files[0]}: not made from {text} by its characters, sorted")
        return made
    if kind == "bpe" or (kind == "char" and not argument):
        raise UserError(
            f"data.source={source} is tokens, and data.tokenizer={spec} is learned from text; "
            "name the one that made them: gpt2, char:ALPHABET, or a tokenizer.json"
        )
    return build_tokenizer(spec, texts=lambda: iter(()), single_document=kind == "char")


def _of(part: str) -> Iterator[Path]:
    path = Path(part).expanduser()
    if not path.is_dir():
        yield from map(Path, glob.glob(str(path)))
        return
    found = [each for each in path.glob("*.bin") if "train" in each.name or "val" in each.name]
    if len({"val" in each.name for each in found}) == 2:  # other .bin files lie beside texts
        yield from found


def _counted(source: str, files: list[Path], spec: str, root: Path) -> Path:
    """A folder whose manifest names the files, made now or found."""
    tokenizer = _tokenizer(source, files, spec)
    if not any("val" in path.name for path in files):
        raise UserError(f"data.source={source}: no file for validation, with val in its name")
    if all("val" in path.name for path in files):
        raise UserError(f"data.source={source}: no file for training; all have val in their names")
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([stamps, spec_identity(spec)]).encode()).hexdigest()
    folder = root / f"{slug_of(source)}-{parse_spec(spec)[0]}-{key[:12]}"
    if (folder / MANIFEST).exists():
        return folder
    counted = [_count(path, tokenizer) for path in files]
    tokenizer.save(folder / "tokenizer")
    manifest = _manifest(source, files, counted, tokenizer)
    write_whole(folder / MANIFEST, manifest.to_json().encode())
    return folder


def _count(path: Path, tokenizer: Tokenizer) -> Counted:
    """Look at every token once. Raises UserError for one that the tokenizer does not have."""
    tokens = open_shard(path)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        block = tokens[start : start + _BLOCK_TOKENS]
        found = np.bincount(block, minlength=len(counts))
        if len(found) > len(counts):
            at = start + int(np.argmax(block >= len(counts)))
            raise UserError(
                f"{path}: token {int(tokens[at]):,} at {at:,}, and {tokenizer.name} has "
                f"{len(counts):,}; name the tokenizer that made the file (data.tokenizer)"
            )
        counts += found
    split = "val" if "val" in path.name else "train"
    return Counted(Shard(str(path.resolve()), split, len(tokens), file_sha256(path)), counts)


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
        val_sha256=_sha256_of(path for path in files if "val" in path.name),
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


# ---------------------------------------------------------------- out


def export(folder: Path, manifest: Manifest, *, how: str, out: Path) -> list[Path]:
    """Write the tokens for another project into `out`. Raises UserError where it cannot hold them.

    nanogpt: train.bin and val.bin; llmc: NAME_train_000000.bin ..., NAME_val_000000.bin ...
    """
    if how == "nanogpt" and manifest.vocab_size > 2**16:
        raise UserError(
            f"nanoGPT's files hold ids below 65,536, and {manifest.tokenizer} has "
            f"{manifest.vocab_size:,} of them"
        )
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for split in SPLITS:
        shards = manifest.of_split(split)
        if how == "llmc":
            made += [_copied(folder / s.file, out, split, i) for i, s in enumerate(shards)]
        else:
            made.append(_joined([folder / s.file for s in shards], out / f"{split}.bin"))
    return made


def _copied(path: Path, out: Path, split: str, number: int) -> Path:
    target = out / f"{out.name}_{split}_{number:06d}.bin"
    shutil.copyfile(path, target.with_suffix(".tmp"))
    target.with_suffix(".tmp").replace(target)
    return target


def _joined(paths: list[Path], target: Path) -> Path:
    aside = target.with_suffix(".tmp")
    with aside.open("wb") as file:
        for path in paths:
            tokens = open_shard(path)
            for start in range(0, len(tokens), _BLOCK_TOKENS):
                file.write(np.ascontiguousarray(tokens[start : start + _BLOCK_TOKENS], "<u2").data)
    aside.replace(target)
    return target
