"""How fast text becomes tokens, beside nanoGPT's two data scripts on the same machine.

    python bench/prepare.py --corpus books.jsonl.xz --nanogpt ~/nanoGPT [--peer-python PYTHON]

Rounds are interleaved (ours, theirs, ours ...), each in a fresh process, so that a busy machine
slows both; the ratio of medians is the result, the seconds are not. The peers are the person's
own checkout, run as it is except for what follows from the corpus: `load_dataset` gives the local
file, the ranks come from our package instead of the network, `num_proc` is this machine's cores,
and `total_batches` is 1 because a corpus of fewer than 1,024 documents breaks it. Whole processes
are compared: start, reading the corpus, tokens on disk. The peer's map and writing alone, without
its reading and imports, stand beside that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CHAR_COPIES = 64

OURS = """
import sys, json
from pathlib import Path
from tuppence.data.prepare import prepare
source, tokenizer, root = sys.argv[1:]
manifest = prepare(source=source, tokenizer=tokenizer, root=Path(root)).manifest
print(json.dumps({"tokens": manifest.tokens, "bytes": manifest.bytes}))
"""

# Runs the checkout's own script with a local corpus in the place of the download.
DRIVER = """
import base64, json, runpy, sys, time
import datasets, tiktoken
script, corpus, ranks_path, cache = sys.argv[1:]
real_load = datasets.load_dataset
ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, open(ranks_path, "rb"))}
pattern = sys.stdin.read()
encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})
tiktoken.get_encoding = lambda name: encoding
began = [0.0]
def load_dataset(*args, **kwargs):
    local = real_load("json", data_files={"train": corpus}, cache_dir=cache)
    began[0] = time.perf_counter()
    return local.select_columns(["text"])
datasets.load_dataset = load_dataset
done = runpy.run_path(script, run_name="__main__")
seconds = time.perf_counter() - began[0]
tokens = sum(int(sum(split["len"])) for split in done["tokenized"].values())
print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""


@dataclass(frozen=True)
class Measured:
    """One run of one side; memory is that of its largest process, `core_seconds` its map alone."""

    seconds: float
    tokens: int
    peak_rss_mib: float
    core_seconds: float | None = None


def run(
    command: list[str], *, stdin: str = "", env: dict[str, str] | None = None
) -> tuple[str, float, float]:
    """(last line of stdout, wall seconds, peak RSS in MiB of the largest process of the tree)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        began = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=given, stdout=out, stderr=subprocess.STDOUT, env=os.environ | (env or {})
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        lines = out.read().strip().splitlines() or [""]
    if child.returncode:
        raise SystemExit("\n".join(lines[-20:]))
    scale = 1024 if sys.platform != "darwin" else 1024**2
    return lines[-1], seconds, usage.ru_maxrss / scale


def ours(source: str, tokenizer: str) -> tuple[Measured, int]:
    """Our preparation in a fresh process and a fresh folder; also the text's bytes."""
    with tempfile.TemporaryDirectory() as root:
        line, seconds, rss = run(
            [sys.executable, "-c", OURS, source, tokenizer, root],
            env={"PYTHONPATH": str(REPOSITORY)},
        )
    made = json.loads(line)
    return Measured(seconds, made["tokens"], rss), made["bytes"]


def nanogpt_openwebtext(checkout: Path, corpus: Path, python: str) -> Measured:
    from tuppence.data.encoders import GPT2_PATTERN, GPT2_RANKS
    from tuppence.data.sources import asset

    script = (checkout / "data/openwebtext/prepare.py").read_text(encoding="utf-8")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    script = script.replace("num_proc = 8", f"num_proc = {cores}")
    script = script.replace("total_batches = 1024", "total_batches = 1")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "prepare.py"
        copy.write_text(script, encoding="utf-8")
        driver = Path(folder) / "driver.py"
        driver.write_text(DRIVER, encoding="utf-8")
        line, seconds, rss = run(
            [python, str(driver), str(copy), str(corpus), str(asset(GPT2_RANKS)), folder],
            stdin=GPT2_PATTERN,
            env={"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        )
    made = json.loads(line)
    return Measured(seconds, made["tokens"], rss, made["seconds"])


def nanogpt_char(checkout: Path, text: Path, python: str) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(checkout / "data/shakespeare_char/prepare.py", folder)
        shutil.copy(text, Path(folder) / "input.txt")
        _, seconds, rss = run([python, str(Path(folder) / "prepare.py")])
        made = sum((Path(folder) / name).stat().st_size // 2 for name in ("train.bin", "val.bin"))
    return Measured(seconds, made, rss)


def report(name: str, text_bytes: int, sides: dict[str, list[Measured]]) -> dict[str, object]:
    """Print one line a side and return the figures."""
    print(f"\n{name}: {text_bytes:,} bytes")
    figures: dict[str, object] = {"case": name, "bytes": text_bytes}
    for side, rounds in sides.items():
        seconds = statistics.median(each.seconds for each in rounds)
        tokens, rss = rounds[0].tokens, max(each.peak_rss_mib for each in rounds)
        print(
            f"  {side:8} {tokens:>12,} tokens {seconds:8.2f} s {tokens / seconds:>12,.0f} tok/s "
            f"{text_bytes / seconds / 1e6:8.2f} MB/s   peak {rss:6.0f} MiB"
        )
        figures[side] = {"seconds": seconds, "tokens": tokens, "peak_rss_mib": rss}
    if "nanoGPT" in sides:
        figures |= compared(sides["ours"], sides["nanoGPT"])
    return figures


def compared(ours_: list[Measured], theirs: list[Measured]) -> dict[str, float]:
    """Print and return how many times our median their median is."""
    mine = statistics.median(each.seconds for each in ours_)
    ratio = statistics.median(each.seconds for each in theirs) / mine
    print(f"  ratio    {ratio:.2f}x")
    core = [each.core_seconds for each in theirs if each.core_seconds is not None]
    if not core:
        return {"ratio": ratio}
    alone = statistics.median(core)
    print(f"  its map and writing alone: {alone:.2f} s, {alone / mine:.2f}x our whole process")
    return {"ratio": ratio, "ratio_to_core": alone / mine}


def compare_gpt2(arguments: argparse.Namespace, *, with_peer: bool) -> dict[str, object]:
    sides: dict[str, list[Measured]] = {"ours": []}
    if with_peer:
        sides["nanoGPT"] = []
    text_bytes = 0
    for _ in range(arguments.rounds):
        measured, text_bytes = ours(str(arguments.corpus), "gpt2")
        sides["ours"].append(measured)
        if with_peer:
            sides["nanoGPT"].append(
                nanogpt_openwebtext(arguments.nanogpt, arguments.corpus, arguments.peer_python)
            )
    return report(f"gpt2 on {arguments.corpus.name}", text_bytes, sides)


def compare_char(arguments: argparse.Namespace, *, copies: int) -> dict[str, object]:
    from tuppence.data.sources import asset

    sides: dict[str, list[Measured]] = {"ours": []}
    if arguments.nanogpt:
        sides["nanoGPT"] = []
    text_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "shakespeare.txt"
        with text.open("wb") as file:  # a child's peak RSS starts at its parent's, so stay small
            for _ in range(copies):
                file.write(asset("shakespeare.txt").read_bytes())
        for _ in range(arguments.rounds):
            measured, text_bytes = ours(str(text), "char")
            sides["ours"].append(measured)
            if arguments.nanogpt:
                sides["nanoGPT"].append(
                    nanogpt_char(arguments.nanogpt, text, arguments.peer_python)
                )
    return report(f"char on shakespeare x {copies}", text_bytes, sides)


def has_datasets(python: str) -> bool:
    command = [python, "-c", "import datasets, tqdm, tiktoken"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    sys.path.insert(0, str(REPOSITORY))
    parser = argparse.ArgumentParser(description="Time preparation beside nanoGPT's.")
    parser.add_argument("--corpus", type=Path, help="JSONL with a text field, plain or packed")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has `datasets`")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    figures = []
    if arguments.corpus:
        with_peer = bool(arguments.nanogpt) and has_datasets(arguments.peer_python)
        if not with_peer:
            print(
                "OpenWebText recipe: skipped (needs --nanogpt and a --peer-python with `datasets`)"
            )
        figures.append(compare_gpt2(arguments, with_peer=with_peer))
    figures += [compare_char(arguments, copies=copies) for copies in (1, CHAR_COPIES)]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
