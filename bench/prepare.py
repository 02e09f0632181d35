"""How fast text becomes tokens, beside nanoGPT's data scripts and llm.c's, and in what memory.

    python bench/prepare.py --corpus books.jsonl.xz --nanogpt ~/nanoGPT --llmc ~/llm.c
                            [--peer-python PYTHON] [--memory] [--no-chars]

Rounds are interleaved (ours, theirs, theirs, ours ...), each in a fresh process, so that a busy
machine slows all; the ratio of medians is the result, the seconds are not. Whole processes are
compared: start, reading the corpus, tokens on disk (`prepare_peers` says how the peers are run).
A peer's tokenizing and writing alone, without its reading and imports, stand beside that.

`--memory` prepares the corpus as plain JSONL, once and ten times over, and samples the PSS of all
processes of it together every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prepare_peers import can_run, llmc_fineweb, nanogpt_char, nanogpt_openwebtext
from prepare_runs import REPOSITORY, Measured, ours, varied

CHAR_COPIES = 64
MEMORY_COPIES = (1, 10)

Side = Callable[[], Measured]


def rounds_of(sides: dict[str, Side], count: int) -> dict[str, list[Measured]]:
    """Every side once a round, every other round the other way around."""
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for number in range(count):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in names:
            found[name].append(sides[name]())
    return found


def report(name: str, text_bytes: int, sides: dict[str, list[Measured]]) -> dict[str, object]:
    """Print one line a side and return the figures."""
    print(f"\n{name}: {text_bytes:,} bytes of text")
    figures: dict[str, object] = {"case": name, "bytes": text_bytes}
    for side, rounds in sides.items():
        seconds = statistics.median(each.seconds for each in rounds)
        tokens, largest = rounds[0].tokens, max(each.largest_mib for each in rounds)
        print(
            f"  {side:8} {tokens:>12,} tokens {seconds:8.2f} s {tokens / seconds:>12,.0f} tok/s "
            f"{text_bytes / seconds / 1e6:8.2f} MB/s   largest process {largest:6.0f} MiB"
        )
        figures[side] = {
            "seconds": seconds,
            "all_seconds": [round(each.seconds, 3) for each in rounds],
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "largest_mib": largest,
        }
    for side in list(sides)[1:]:
        figures[f"{side}_ratio"] = compared(side, sides["ours"], sides[side])
    return figures


def compared(side: str, ours_: list[Measured], theirs: list[Measured]) -> dict[str, float]:
    """Print and return how many times our median their median is."""
    mine = statistics.median(each.seconds for each in ours_)
    ratio = statistics.median(each.seconds for each in theirs) / mine
    print(f"  ratio to {side}: {ratio:.2f}x")
    core = [each.core_seconds for each in theirs if each.core_seconds is not None]
    if not core:
        return {"whole": ratio}
    alone = statistics.median(core)
    print(f"    tokenizing and writing alone: {alone:.2f} s, {alone / mine:.2f}x our whole process")
    return {"whole": ratio, "core": alone / mine}


def compare_gpt2(arguments: argparse.Namespace) -> dict[str, object]:
    """Ours beside those peers that there are."""
    corpus, python = arguments.corpus, arguments.peer_python
    text_bytes = [0]

    def we() -> Measured:
        measured, text_bytes[0] = ours(str(corpus), "gpt2")
        return measured

    sides: dict[str, Side] = {"ours": we}
    peers = {
        "nanoGPT": (arguments.nanogpt, nanogpt_openwebtext),
        "llm.c": (arguments.llmc, llmc_fineweb),
    }
    able = can_run(python)
    for name, (checkout, act) in peers.items():
        if checkout and able:
            sides[name] = partial(act, checkout, corpus, python)
        else:
            print(f"{name}: skipped (needs its checkout and a --peer-python with `datasets`)")
    found = rounds_of(sides, arguments.rounds)
    return report(f"gpt2 on {corpus.name}", text_bytes[0], found)


def compare_char(arguments: argparse.Namespace, *, copies: int) -> dict[str, object]:
    from tuppence.files import asset

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "shakespeare.txt"
        with text.open("wb") as file:  # a child's peak RSS starts at its parent's, so stay small
            for _ in range(copies):
                file.write(asset("shakespeare.txt").read_bytes())
        sides: dict[str, Side] = {"ours": lambda: ours(str(text), "char")[0]}
        if arguments.nanogpt:
            sides["nanoGPT"] = partial(nanogpt_char, arguments.nanogpt, text, arguments.peer_python)
        found = rounds_of(sides, arguments.rounds)
        return report(f"char on shakespeare x {copies}", text.stat().st_size, found)


def memory(corpus: Path) -> dict[str, object]:
    """Peaks of all processes together, of the corpus once and many times over."""
    figures: dict[str, object] = {"case": f"memory, gpt2 on {corpus.name} as plain JSONL"}
    print(f"\n{figures['case']}: the most PSS of all processes together")
    for copies in MEMORY_COPIES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.jsonl"
            size = varied(corpus, path, copies=copies)
            measured, _ = ours(str(path), "gpt2", sampled=True)
        print(
            f"  {size / 1e6:6.0f} MB {measured.tokens:>12,} tokens "
            f"{measured.tokens / measured.seconds:>12,.0f} tok/s   together "
            f"{measured.together_mib:6.0f} MiB, largest process {measured.largest_mib:6.0f} MiB"
        )
        figures[f"x{copies}"] = {
            "bytes": size,
            "together_mib": measured.together_mib,
            "largest_mib": measured.largest_mib,
            "tokens_per_second": measured.tokens / measured.seconds,
        }
    return figures


def main() -> None:
    sys.path.insert(0, str(REPOSITORY))
    parser = argparse.ArgumentParser(description="Time preparation beside others'.")
    parser.add_argument("--corpus", type=Path, help="JSONL with a text field, plain or packed")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--llmc", type=Path, help="a checkout of llm.c")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has `datasets`")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison; 0: none")
    parser.add_argument("--memory", action="store_true", help="of the corpus, and of ten times it")
    parser.add_argument("--no-chars", action="store_true", help="leave Shakespeare out")
    arguments = parser.parse_args()
    figures = []
    if arguments.corpus and arguments.rounds:
        figures.append(compare_gpt2(arguments))
    if arguments.corpus and arguments.memory:
        figures.append(memory(arguments.corpus))
    if arguments.rounds and not arguments.no_chars:
        figures += [compare_char(arguments, copies=copies) for copies in (1, CHAR_COPIES)]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
