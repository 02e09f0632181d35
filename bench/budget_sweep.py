"""Thirty runs over dollars, hours, tokens and steps: is the spend 97-100%, and never above?

    python bench/budget_sweep.py [--runs 30] [--seed 0]

Tiny models, prices from $0.01 to $100 an hour, charged time from 5 to 120 s. Checks the promise of
docs/budgets.md on each: never above; within 97-100% from one minute on; tokens and steps exact; the
learning rate at its floor on the last step. Exit 1 where one does not hold.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from common import environment, machine, rows, tuppence

SHAPES = ((2, 32, 32, 512), (2, 64, 64, 1024), (4, 128, 64, 768), (1, 32, 16, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine())
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        broken = [one_run(Path(place), i, chance) for i in range(args.runs)]
    print(f"{args.runs} runs, {sum(broken)} broken promises")
    sys.exit(1 if any(broken) else 0)


def one_run(folder: Path, number: int, chance: random.Random) -> bool:
    """Run one budget; True where a promise is broken."""
    layers, width, length, batch = chance.choice(SHAPES)
    price = 10 ** chance.uniform(-2, 2)
    seconds = [5, 10, 20, 40, 60, 60, 75, 90, 120][number % 9]
    kind = ("usd", "hours", "usd", "hours", "steps", "tokens")[number % 6]
    budget = {
        "usd": f"budget.usd={seconds * price / 3600!r}",
        "hours": f"budget.hours={seconds / 3600!r}",
        "steps": f"budget.steps={chance.randint(1, 300)}",
        "tokens": f"budget.tokens={batch * chance.randint(1, 300)}",
    }[kind]
    name = f"name=sweep{number}"
    shape = (f"model.n_layer={layers}", f"model.n_embd={width}", f"model.sequence_len={length}")
    more = (f"train.batch_tokens={batch}", f"machine.usd_per_hour={price!r}", "model.n_head=2")
    words = ("run", "shakespeare", name, budget, *shape, *more)
    wall, receipt = tuppence(*words, folder=folder, env=environment(folder / "cache"))
    last = rows(folder / "runs" / f"sweep{number}", "metrics")[-1]
    fraction = receipt["budget"]["fraction"]
    faults = []
    if fraction > 1:
        faults.append("above")
    if kind in ("usd", "hours"):
        if wall > seconds:
            faults.append(f"process took {wall:.2f} s")
        if seconds >= 60 and fraction < 0.97:
            faults.append("below 97%")
    elif fraction != 1:
        faults.append("not exact")
    if last["lr"] != 0:
        faults.append(f"last lr {last['lr']:.2g}")
    asked = f"{seconds} s" if kind in ("usd", "hours") else ""
    print(
        f"{number:3d} {kind:6s} ${price:8.3f}/h {asked:>5s} spent {fraction:8.3%} "
        f"wall {wall:6.1f} s {last['step']:6,} steps  {' '.join(faults) or 'ok'}",
        flush=True,
    )
    return bool(faults)


if __name__ == "__main__":
    main()
