"""nanoGPT's CPU quickstart shape: tokens a second, and seconds to val loss 1.886, side by side.

    python bench/quickstart.py [--nanogpt CHECKOUT] [--rounds 3]

Four layers, four heads, width 128, T = 64, batch 12, tiny Shakespeare by character. The peer runs
the command of its README (2,000 steps, which is what it takes to reach 1.886); tuppence runs its
`quickstart` recipe. Seconds are whole processes, start-up (and for tuppence the measuring of the
machine, the final evaluation, the sample and the receipt) included. Both final checkpoints are
judged on the same text in the same windows of 64; the peer's evaluations are off its clock.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment, machine, middle, rows, tuppence

TARGET = 1.886
PEER_FLAGS = [
    *("--device=cpu", "--compile=False", "--eval_iters=1", "--log_interval=1"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
    *("--eval_interval=2000", "--always_save_checkpoint=True"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of the peer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        peer = copy_peer(args.nanogpt, folder) if args.nanogpt else None
        ours, theirs = [], []
        for number in range(args.rounds):
            ours.append(run_ours(folder, number))
            print("tuppence  {:6.1f} s  val {:.4f}  {:,.0f} tok/s".format(*ours[-1]), flush=True)
            if peer:
                theirs.append(run_peer(peer))
                print(
                    "nanoGPT   {:6.1f} s  val {:.4f}  {:,.0f} tok/s".format(*theirs[-1]), flush=True
                )
        report(ours, theirs)


def run_ours(folder: Path, number: int) -> tuple[float, float, float]:
    """(seconds of the process, val loss in windows of 64, median tokens a second)."""
    name = f"quickstart{number}"
    words = ("run", "quickstart", f"name={name}", "machine.usd_per_hour=0.4")
    whole = ("train.eval_every=1000000", "train.eval_tokens=1000000")
    env = environment(folder / f"cache{number}")  # a fresh one: the measuring is on the clock
    seconds, receipt = tuppence(*words, *whole, folder=folder, env=env)
    steps = rows(folder / "runs" / name, "metrics")
    rate = 768 / statistics.median(row["step_seconds"] for row in steps)
    assert receipt["evaluated"][0] == receipt["evaluated"][1]
    return seconds, receipt["actual"]["val_loss"], rate


def copy_peer(checkout: Path, folder: Path) -> Path:
    """A working copy of the peer with its corpus prepared, nothing downloaded."""
    peer = folder / "peer"
    shutil.copytree(checkout, peer, ignore=shutil.ignore_patterns(".git"))
    corpus = Path(__file__).parents[1] / "tuppence" / "assets" / "shakespeare.txt"
    shutil.copy(corpus, peer / "data" / "shakespeare_char" / "input.txt")
    prepare = [sys.executable, "data/shakespeare_char/prepare.py"]
    subprocess.run(prepare, cwd=peer, check=True, capture_output=True)
    return peer


def run_peer(peer: Path) -> tuple[float, float, float]:
    """The same three figures of the peer's README command."""
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *PEER_FLAGS]
    started = time.monotonic()
    done = subprocess.run(command, cwd=peer, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - started
    milliseconds = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", done.stdout)[5:]]
    judge = [sys.executable, str(Path(__file__).with_name("judge_nanogpt.py")), str(peer)]
    judged = subprocess.run(judge, check=True, capture_output=True, text=True)
    return seconds, float(judged.stdout.split()[-1]), 768 / statistics.median(milliseconds) * 1e3


def report(ours: list[tuple[float, ...]], theirs: list[tuple[float, ...]]) -> None:
    """Medians, and the ratios pair by pair."""
    for name, found in (("tuppence", ours), ("nanoGPT", theirs)):
        if not found:
            continue
        seconds, loss, rate = zip(*found, strict=True)
        reached = "reached" if max(loss) <= TARGET else "NOT reached"
        print(
            f"{name:9s} {middle(list(seconds), '.1f')} s, val {middle(list(loss), '.4f')} "
            f"({TARGET} {reached}), {middle(list(rate), ',.0f')} tok/s"
        )
    if theirs:
        pairs = list(zip(ours, theirs, strict=True))
        print("speed     " + middle([a[2] / b[2] for a, b in pairs]) + " x nanoGPT's tokens/s")
        print("time      " + middle([b[0] / a[0] for a, b in pairs]) + f" x sooner at {TARGET}")


if __name__ == "__main__":
    main()
