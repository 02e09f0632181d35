"""Tokenizers on a corpus: speed on one core, bytes per token, what learning a vocabulary costs.

    python bench/vocabularies.py books.jsonl.xz wiki.jsonl.xz [--learn 32768 65536] [--mb 20]

Speed is the CPU time of this process, rounds interleaved, so that a busy machine says little of
it; `tokenizers` is the library's own encoder on the same vocabulary, for comparison. Learning runs
in a fresh process each, on the corpora one after another as far as it reads, and its peak is that
process's. A learned vocabulary has seen the text that it is measured on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import machine, middle

from tuppence.text.reading import documents
from tuppence.text.sources import find_files
from tuppence.tokenizer.compression import compression, table
from tuppence.tokenizer.kinds import JsonTokenizer
from tuppence.tokenizer.pieces import Piece, recut
from tuppence.tokenizer.spec import Tokenizer, build_tokenizer, load_tokenizer

BATCH = 64


def texts_of(corpus: str) -> Iterator[str]:
    return (document.text for document in documents(find_files(corpus)))


def sample_of(corpus: str, *, most_bytes: int) -> list[str]:
    """Pieces from the start of a corpus, cut as preparation cuts them."""
    kept: list[str] = []
    whole = (Piece(text, i, 0, True) for i, text in enumerate(texts_of(corpus)))
    for piece in recut(whole, cut="before_space"):
        kept.append(piece.text)
        most_bytes -= len(piece.text.encode())
        if most_bytes <= 0:
            break
    return kept


def learn(size: int, corpora: list[str], folder: Path) -> None:
    """In a process of its own: the tokenizer into `folder`, one line of JSON with what it took."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts = itertools.chain.from_iterable(map(texts_of, corpora))
    build_tokenizer(f"bpe:{size}", texts=lambda: texts).save(folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "before_mib": before / 1024,
    }
    print(json.dumps(figures))


def learned(size: int, corpora: list[str], folder: Path) -> Tokenizer:
    """Learn in a fresh process, print what it took."""
    script = [sys.executable, __file__, *corpora, "--in-process", str(folder), "--learn", str(size)]
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout)
    print(
        f"bpe:{size}: {figures['seconds']:.1f} s ({figures['cpu_seconds']:.1f} s of CPU), peak "
        f"{figures['peak_mib']:,.0f} MiB ({figures['before_mib']:,.0f} before)",
        flush=True,
    )
    return load_tokenizer(folder)


def speeds(corpus: str, tokenizers: dict[str, Tokenizer], *, most_bytes: int, rounds: int) -> None:
    texts = sample_of(corpus, most_bytes=most_bytes)
    text_bytes = sum(len(text.encode()) for text in texts)
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    seconds: dict[str, list[float]] = {name: [] for name in tokenizers}
    tokens = dict.fromkeys(tokenizers, 0)
    for _ in range(rounds):
        for name, tokenizer in tokenizers.items():
            tokenizer.encode("warm")
            began = time.process_time()
            tokens[name] = sum(len(ids) for b in batches for ids in tokenizer.encode_batch(b))
            seconds[name].append(time.process_time() - began)
    print(f"\n{Path(corpus).name}: {text_bytes:,} bytes, one core")
    for name in tokenizers:
        rates = [text_bytes / s / 1e6 for s in seconds[name]]
        each = [tokens[name] / s / 1e6 for s in seconds[name]]
        print(f"  {name:24} {middle(rates)} MB/s   {middle(each)} M tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time tokenizers and what learning one takes.")
    parser.add_argument("corpora", nargs="+", help="what data.source takes, one by one")
    parser.add_argument("--learn", type=int, nargs="*", default=[32_768, 65_536])
    parser.add_argument("--mb", type=float, default=20, help="of each corpus, for speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        learn(arguments.learn[0], arguments.corpora, arguments.in_process)
        return
    print(machine())
    known = {n: build_tokenizer(n, texts=lambda: iter(())) for n in ("byte", "gpt2", "cl100k")}
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.learn:
            place = Path(folder) / str(size)
            known[f"bpe:{size}"] = learned(size, arguments.corpora, place)
            content = (place / "tokenizer.json").read_bytes()
            library = f"bpe:{size} (tokenizers)"
            known[library] = JsonTokenizer(content, name=library)
        os.environ["RAYON_NUM_THREADS"] = "1"  # learning took all cores, encoding takes one
        for corpus in arguments.corpora:
            speeds(corpus, known, most_bytes=int(arguments.mb * 1e6), rounds=arguments.rounds)
            ours = [t for t in known.values() if not isinstance(t, JsonTokenizer)]
            print(table(compression(texts_of(corpus), ours)), flush=True)


if __name__ == "__main__":
    main()
