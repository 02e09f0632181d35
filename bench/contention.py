"""Two runs at once on the same cores: does throughput fall in proportion, or off a cliff?

    python bench/contention.py [--rounds 3]

One run alone, then two at the same time: as tuppence runs (each core a worker with micro-batches
of its own), and as torch does by itself (one micro-batch whose every operation is split over the
cores by OpenMP, idle threads spinning). In proportion is 50% for each of two.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import environment, machine, middle, rows

WAYS = {
    "workers": ([], {}),
    "openmp": (["train.micro_batch=12"], {"GOMP_SPINCOUNT": "300000"}),
}
WORDS = [
    "run",
    "quickstart",
    "budget.hours=0.0055",
    "train.sample_tokens=0",
    "train.eval_tokens=64",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for label, (words, extra) in WAYS.items():  # measures the machine once, alone
            rates(folder, f"warm-{label}", 1, words, extra)
        found: dict[tuple[str, int], list[float]] = {}
        for number in range(args.rounds):
            for label, (words, extra) in WAYS.items():
                for at_once in (1, 2):
                    new = rates(folder, f"{label}{number}x{at_once}", at_once, words, extra)
                    found.setdefault((label, at_once), []).extend(new)
        for label in WAYS:
            alone, both = found[label, 1], found[label, 2]
            share = statistics.median(both) / statistics.median(alone)
            print(
                f"{label:9s} alone {middle(alone, ',.0f')} tok/s; two at once "
                f"{middle(both, ',.0f')} each: {share:.0%} of alone"
            )


def rates(
    folder: Path, name: str, at_once: int, words: list[str], extra: dict[str, str]
) -> list[float]:
    """Median tokens a second of each of `at_once` runs."""
    env = environment(folder / "cache", **extra)
    command = [sys.executable, "-m", "tuppence", *WORDS, *words]
    started = [
        subprocess.Popen(
            [*command, f"name={name}-{i}"],
            cwd=folder,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for i in range(at_once)
    ]
    for process in started:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors.decode())
    found = []
    for i in range(at_once):
        steps = rows(folder / "runs" / f"{name}-{i}", "metrics")
        found.append(768 / statistics.median(row["step_seconds"] for row in steps))
    return found


if __name__ == "__main__":
    main()
