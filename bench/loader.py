"""The loader alone, in tokens a second, beside a copy of the same bytes and nanoGPT's get_batch.

    python bench/loader.py [--tokens 200e6] [--seconds 1] [--rounds 5] [--nanogpt DIR]

Shards of random tokens are written to a temporary folder, as one file and as many; all sides read
them from the system's cache, in turns. The floor copies as many bytes as a batch has on disk from
one place in memory to another. `feed` is what a step of a run on a CPU waits for where it computes
nothing: batches made by the thread, each hashed.
"""

import argparse
import ast
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine

from tuppence.data.loader import Loader
from tuppence.data.prepare import prepare
from tuppence.data.shards import HEADER_BYTES, write_shard
from tuppence.ranks import ALONE
from tuppence.train.feed import Feed

SHAPES = [(8, 256), (32, 1024), (16, 2048)]
VOCAB = 50_257
MANY = 64  # shards
Work = Callable[[], object]


def corpus(root: Path, *, tokens: int, shards: int) -> Path:
    """A prepared folder whose train split is so many random tokens, in so many shards."""
    root.mkdir()
    (root / "text.txt").write_text("a few words\n" * 1000)
    folder = prepare(source=str(root / "text.txt"), tokenizer="gpt2", root=root).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    model = next(shard for shard in manifest["shards"] if shard["split"] == "train")
    kept = [shard for shard in manifest["shards"] if shard["split"] != "train"]
    random, each = np.random.default_rng(0), tokens // shards
    for number in range(shards):
        name = f"train_{number:06d}.bin"
        write_shard(folder / name, random.integers(VOCAB, size=each), vocab_size=VOCAB)
        kept.append({**model, "file": name, "tokens": each, "sha256": "0" * 64})
    manifest |= {"shards": kept, "train_tokens": each * shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def our_batches(folder: Path, rows: int, length: int) -> Work:
    loader, step = Loader(folder, sequence_len=length, batch_size=rows, seed=0), iter(range(10**9))
    return lambda: loader.batch(next(step))


def our_feed(folder: Path, rows: int, length: int) -> Work:
    loader, step = Loader(folder, sequence_len=length, batch_size=rows, seed=0), iter(range(10**9))
    feed, sha = Feed(loader, ranks=ALONE, device="cpu"), [""]

    def take() -> None:
        feed.ask(next(step), sha[0])
        sha[0] = feed.take().tokens_sha

    return take


def floor(rows: int, length: int, tokens: int) -> Work:
    """A copy of a batch's bytes, from another place each time, as large as the corpus."""
    source = np.ones(tokens, dtype=np.uint16)
    size = rows * (length + 1)
    into, places = np.empty(size, dtype=np.uint16), np.random.default_rng(0)

    def copy() -> None:
        start = int(places.integers(tokens - size))
        np.copyto(into, source[start : start + size])

    return copy


def nanogpt(checkout: Path, folder: Path, rows: int, length: int) -> Work:
    """get_batch of its train.py, on a file as it writes them."""
    shard = next(folder.glob("train_*.bin"))
    with (folder / "train.bin").open("wb") as out:
        out.write(shard.read_bytes()[HEADER_BYTES:])
    tree = ast.parse((checkout / "train.py").read_text(encoding="utf-8"))
    chosen = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_batch"]
    names: dict[str, Any] = {"np": np, "torch": torch, "os": os, "data_dir": str(folder)}
    names |= {"block_size": length, "batch_size": rows, "device": "cpu", "device_type": "cpu"}
    exec(compile(ast.Module(chosen, []), "train.py", "exec"), names)
    return lambda: names["get_batch"]("train")


def rate(work: Work, tokens: int, seconds: float) -> float:
    """Tokens a second of work that makes so many each time."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        count += 1
    return count * tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=float, default=200e6)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    tokens, figures = int(arguments.tokens), []
    with tempfile.TemporaryDirectory() as root:
        one, many = (
            corpus(Path(root) / str(count), tokens=tokens, shards=count) for count in (1, MANY)
        )
        for rows, length in SHAPES:
            sides = {
                "floor": floor(rows, length, tokens),
                "one shard": our_batches(one, rows, length),
                f"{MANY} shards": our_batches(many, rows, length),
                "feed": our_feed(many, rows, length),
            }
            if arguments.nanogpt:
                sides["nanoGPT"] = nanogpt(arguments.nanogpt, one, rows, length)
            found: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(arguments.rounds):
                for name, work in sides.items():
                    found[name].append(rate(work, rows * length, arguments.seconds))
            figures.append(told(rows, length, found))
    print(json.dumps(figures))


def told(rows: int, length: int, found: dict[str, list[float]]) -> dict[str, object]:
    """Print the medians, and return them."""
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    print(f"\n{rows} x {length}: million tokens/s")
    for name, rates in found.items():
        low, high = min(rates) / 1e6, max(rates) / 1e6
        print(f"  {name:10} {middle[name] / 1e6:9,.1f}  ({low:,.1f} to {high:,.1f})")
    return {"rows": rows, "length": length, "tokens_per_second": middle}


if __name__ == "__main__":
    main()
