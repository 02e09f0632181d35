"""What the tests of preparation share: corpora, readings of what was made, and a child process."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tuppence.data import encode, work
from tuppence.data.prepare import Options, Prepared, prepare
from tuppence.data.shards import open_shard
from tuppence.text import formats, slices, windows
from tuppence.text.inputs import InputFile
from tuppence.text.sources import find_files
from tuppence.tokenizer.spec import load_tokenizer

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"
TEXTS = ["One small document.\n", "Zwölf Boxkämpfer jagen Viktor\n\n  quer", "日本語 😀 end"]
MODULES = {
    "encode": encode,
    "formats": formats,
    "slices": slices,
    "windows": windows,
    "work": work,
}
SMALL = {
    "encode.SPREAD_BYTES": 0,
    "slices.SLICE_BYTES": 6_000,
    "windows.WINDOW_BYTES": 2_500,
    "work.COMMIT_SECONDS": 0.0,
}


def shrink(monkeypatch: pytest.MonkeyPatch, **other: float) -> None:
    """Slices and windows so small that a test's corpus has many. Names are `module.CONSTANT`.

    Each window is committed; waiting for the disk every time is left to the tests that kill.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for name, value in (SMALL | other).items():
        module, _, constant = name.partition(".")
        monkeypatch.setattr(MODULES[module], constant, value)


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Documents of many lengths, no two of them equal."""
    rng = random.Random(seed)
    words = [
        "we",
        "the",
        "of",
        "naïve",
        "café",
        "rain",
        "on",
        "日本",
        "tokens",
        "😀",
        "and,",
        "then.",
        "1066",
        "it's\n",
    ]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randrange(1, 40))) for i in range(count)]


def pack(content: bytes, compression: str) -> bytes:
    """The content as .gz, .xz or .zst; "" leaves it plain."""
    if compression == "gz":
        return gzip.compress(content)
    if compression == "xz":
        return lzma.compress(content)
    if compression == "zst":
        return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return content


def parquet(rows: list[Any], *, field: str = "text", group_rows: int = 1 << 20) -> bytes:
    """A parquet file of these cells, beside a column of numbers."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(rows)), field: pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, sink, row_group_size=group_rows)
    return bytes(sink.getvalue().to_pybytes())


def jsonl(rows: list[str], *, field: str = "text") -> bytes:
    """A line for each text."""
    return "".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows)).encode()


def write(path: Path, rows: list[str], *, field: str = "text") -> Path:
    """Documents in the format and packing that the name asks for."""
    kind, _, compression = path.name.partition(".")[2].partition(".")
    made = {"parquet": parquet, "jsonl": jsonl}
    content = made[kind](rows, field=field) if kind in made else "".join(rows).encode()
    path.write_bytes(pack(content, compression))
    return path


def file_of(path: Path) -> InputFile:
    """The one input file at a path."""
    (found,) = find_files(str(path))
    return found


def made(source: Path | str, root: Path, *, tokenizer: str = "byte", **options: Any) -> Prepared:
    """A preparation in this process, unless `workers` says otherwise."""
    asked = Options(**{"workers": 1} | options)
    return prepare(source=str(source), tokenizer=tokenizer, root=root, options=asked)


def tokens_of(prepared: Prepared, split: str) -> list[int]:
    """All tokens of a split."""
    shards = [open_shard(prepared.folder / s.file) for s in prepared.manifest.of_split(split)]
    return np.concatenate([np.zeros(0, dtype=np.uint32), *shards]).tolist()


def stream_of(prepared: Prepared) -> list[int]:
    """All tokens in the stream's order: of many documents val comes first, of one it is the end."""
    train, val = tokens_of(prepared, "train"), tokens_of(prepared, "val")
    return [*train, *val] if "last" in prepared.manifest.split_rule else [*val, *train]


def documents_of(prepared: Prepared) -> list[str]:
    """The texts between end-of-texts, in the stream's order."""
    loaded = load_tokenizer(prepared.folder / "tokenizer")
    found, held = [], list[int]()
    for token in stream_of(prepared):
        held.append(token)
        if token == prepared.manifest.end_of_text:
            found.append(loaded.decode(held))
            held = []
    assert not held, "the stream ends with an end-of-text"
    return found


def hashes(prepared: Prepared) -> list[tuple[str, str]]:
    """Each shard's name and hash."""
    return [(shard.file, shard.sha256) for shard in prepared.manifest.shards]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Prepares with the constants it is given, and says on each line which workers it has.
CHILD = """
import json, multiprocessing, sys
from pathlib import Path
from tuppence.data import encode, work
from tuppence.text import formats, slices, windows
from tuppence.data.prepare import Options, prepare
source, tokenizer, root, constants, options = sys.argv[1:]
for name, value in json.loads(constants).items():
    module, _, constant = name.partition(".")
    setattr(globals()[module], constant, value)
def on_progress(progress):
    workers = [child.pid for child in multiprocessing.active_children()]
    print(json.dumps({"phase": progress.phase, "workers": workers}), flush=True)
prepare(source=source, tokenizer=tokenizer, root=Path(root), options=Options(**json.loads(options)),
        on_progress=on_progress)
assert "torch" not in sys.modules
status = Path("/proc/self/status")
peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
print(json.dumps({"phase": "done", "workers": [], "peak_mib": int(peak) / 1024}))
"""  # VmHWM and not ru_maxrss, which a child inherits from the process that started it


def child(
    source: Path | str,
    root: Path,
    *,
    tokenizer: str = "byte",
    constants: dict[str, float] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """A preparation in a process of its own."""
    words = [str(source), tokenizer, str(root), json.dumps(constants or {}), json.dumps(options)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def peak_mib(running: subprocess.Popen[str]) -> float:
    """The most memory that the child itself had."""
    out, said = running.communicate()
    assert running.returncode == 0, said
    return float(json.loads(out.splitlines()[-1])["peak_mib"])
