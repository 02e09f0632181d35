"""How well a plan predicts this machine: step seconds and peak memory against the receipt's.

    python bench/this_machine.py [--repeat 3]

Each run is planned by a cache folder of its own, so what is predicted was measured just before.
Prints actual / predicted; the machine's own drift between the two is in it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import environment, tuppence

RUNS = {
    "shakespeare": "shakespeare budget.steps=400",
    "quickstart": "quickstart budget.steps=500",
    "6 x 384, T=256, 8,192 tokens": (
        "shakespeare model.n_embd=384 model.n_layer=6 model.n_head=6 model.sequence_len=256 "
        "train.batch_tokens=8192 budget.steps=25"
    ),
    "shakespeare in fp32": "shakespeare train.precision=fp32 budget.steps=150",
    "GPT-2's vocabulary": "shakespeare data.tokenizer=gpt2 budget.steps=40",
}


def measured(words: str) -> tuple[float, float]:
    """(step seconds, peak memory), each actual / predicted, of one run in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, receipt = tuppence(
            "run", *words.split(), folder=folder, env=environment(folder / "cache")
        )
    promised, paid = receipt["predicted"], receipt["actual"]
    keys = ("step_seconds", "peak_memory_gib")
    return paid[keys[0]] / promised[keys[0]], paid[keys[1]] / promised[keys[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    print(f"{'run':30} {'step, actual / predicted':>26} {'memory':>20}")
    for name, words in RUNS.items():
        found = [measured(words) for _ in range(repeat)]
        steps, memory = zip(*found, strict=True)
        print(f"{name:30} {spread(steps):>26} {spread(memory):>20}", flush=True)


def spread(values: tuple[float, ...]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
