"""How good the planner is on published runs: speed, memory and loss, by the shipped constants.

    python bench/planner_accuracy.py [--throughput CSV] [--loss CSV] [--json]

Any CSV with the columns of published/throughput.csv and published/loss_points.csv. The files in
bench/published are those that the constants were fitted to; how well they predict what they were
not fitted to, `bench/fit_throughput.py --leave-out shape` and `bench/fit_loss.py --leave-out size`
print. Coverage is the share of rows inside the 80% interval.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import published_loss
import published_memory
import published_throughput
from scores import HEADER, shown

from tuppence import recipes
from tuppence.corpus import surveyed
from tuppence.plan.options import options
from tuppence.plan.prices import price_book


def accuracy(throughput: Path, loss: Path) -> dict[str, Any]:
    """The three scores, and the exact counts of rows whose source states what it counts."""
    return {
        "throughput": published_throughput.score(throughput),
        "memory": published_memory.score(throughput),
        "loss": published_loss.score(loss),
        "counts": published_throughput.exact_counts(throughput),
    }


def price_book_seconds(recipe: str) -> tuple[int, float]:
    """Machines planned, and CPU seconds that planning all of them takes."""
    run = recipes.get(recipe)
    data = surveyed(run)
    began = time.process_time()
    found = options(run, data, price_book())
    return len(found), time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--throughput", type=Path, default=published_throughput.PUBLISHED)
    parser.add_argument("--loss", type=Path, default=published_loss.PUBLISHED)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = accuracy(args.throughput, args.loss)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for part in ("throughput", "memory", "loss"):
        print(f"{part:30}{HEADER}")
        for name, figures in [*found[part]["groups"].items(), ("all", found[part])]:
            print(f"  {name:28}{shown(figures)}")
    print(f"counts: {json.dumps(found['counts'])}")
    machines, seconds = price_book_seconds("llmc_gpt2_124m")
    print(f"the price book: {machines} machines planned in {seconds:.2f} s of CPU")


if __name__ == "__main__":
    main()
