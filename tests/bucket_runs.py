"""Run folders with made-up checkpoints, and buckets to keep them on: for the tests of buckets."""

import functools
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuppence import bucket, store
from tuppence.folder import RunFolder

FILES = {"model.safetensors": 3000, "optimizer.safetensors": 6000, "state.json": 200}


def begun(path: Path, *, attempt: int = 1, token: str = "aaaa1111") -> RunFolder:
    """A run folder that an attempt has claimed, with a few documents and lines."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    folder.write_json("attempt.json", {"attempt": attempt, "token": token})
    if not folder.exists():
        folder.write_json("run.json", {"name": path.name})
        folder.write_json("plan.json", {"steps": 10})
        folder.tokenizer.mkdir()
        (folder.tokenizer / "tokenizer.json").write_text("{}")
    folder.append("metrics", {"step": 1, "attempt": attempt})
    return folder


def save(
    folder: RunFolder, step: int, *, attempt: int = 1, best: bool = False, large: int = 0
) -> Path:
    """A checkpoint as a save leaves it, of made-up bytes, and the pointers to it."""
    folder.append("metrics", {"step": step, "attempt": attempt})
    path = folder.checkpoints / f"step_{step:08d}"
    aside = folder.checkpoints / f".{path.name}"
    aside.mkdir(parents=True)
    files = {}
    for name, size in FILES.items():
        content = random.Random(f"{step} {attempt} {name}").randbytes(large or size)
        (aside / name).write_bytes(content)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = {"version": 2, "attempt": attempt, "files": files}
    (aside / "checkpoint.json").write_text(json.dumps(manifest))
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    sha256 = files["model.safetensors"]["sha256"]
    pointer = {"step": step, "path": path.name, "sha256": sha256}
    for name in ("last", "best") if best else ("last",):
        folder.write_json(f"checkpoints/{name}.json", pointer)
    return path


def mirrored(folder: RunFolder, url: str) -> None:
    """Bring the bucket up to date, in one attempt of a mirror."""
    mirror = bucket.Mirror(folder, url)
    closed = mirror.close(60)
    mirror.check()
    assert closed
    folder.close()


@functools.cache
def store_at(url: str) -> store.Store:
    return store.Store(url)


def objects(url: str) -> set[str]:
    return set(store_at(url).find())


def steps_on(url: str) -> set[int]:
    """Steps with a marker on the bucket."""
    markers = (n.split("/") for n in objects(url) if n.endswith("/checkpoint.json"))
    return {int(parts[-2][5:]) for parts in markers}


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same files."""
    names = {p.name for p in a.iterdir()}
    same = all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    return same and names == {p.name for p in b.iterdir()}


def codes(folder: RunFolder) -> list[str]:
    return [event["code"] for event in folder.rows("events")]


def settled(mirror: bucket.Mirror) -> None:
    """Wait until the bucket is up to date."""
    while mirror.lag():
        mirror.check()
        time.sleep(0.002)


def patched(
    monkeypatch: pytest.MonkeyPatch, verb: str, wrap: Callable[[Callable[..., Any]], Any]
) -> None:
    """Replace one verb of every store."""
    monkeypatch.setattr(store.Store, verb, wrap(getattr(store.Store, verb)))


def harm_truncate(there: store.Store, name: str) -> None:
    content = there.read(name)
    assert content is not None
    there.write(name, content[: len(content) // 2])


def harm_flip(there: store.Store, name: str) -> None:
    content = bytearray(there.read(name) or b"")
    content[len(content) // 2] ^= 1
    there.write(name, bytes(content))


def harm_empty(there: store.Store, name: str) -> None:
    there.write(name, b"")


def harm_delete(there: store.Store, name: str) -> None:
    there.delete(name)
