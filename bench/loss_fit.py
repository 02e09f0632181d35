"""Trains the points behind the default recipe's promised loss, and fits L(D) = E + A D^-alpha.

    python bench/loss_fit.py [--steps 250 700 1300 2000] [--seeds 1]

Prints every point, the fit for plan/loss.py, its residuals, and what other seeds give at the middle
length. The 80% half-width is 1.28 standard deviations, of the residuals (three parameters taken
off) or of the seeds, whichever is larger.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from common import environment, machine, tuppence

SEED = 1337  # the plan's default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 700, 1300, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    print(machine())
    middle = sorted(args.steps)[len(args.steps) // 2]
    with tempfile.TemporaryDirectory() as place:
        points = [point(Path(place), steps, SEED) for steps in args.steps]
        others = [point(Path(place), middle, seed)[1] for seed in args.seeds]
    floor, scale, alpha = fit(points)
    residuals = [loss - (floor + scale * tokens**-alpha) for tokens, loss in points]
    by_fit = math.sqrt(sum(r * r for r in residuals) / max(1, len(points) - 3))
    seeds = [points[args.steps.index(middle)][1], *others]
    by_seed = statistics.stdev(seeds) if others else 0.0
    print(f"residuals {[round(r, 4) for r in residuals]}: standard deviation {by_fit:.4f}")
    print(f"seeds at {middle:,} steps {seeds}: standard deviation {by_seed:.4f}")
    spread = 1.28 * max(by_fit, by_seed)
    print(f"floor={floor:.4f}, scale={scale:.4g}, alpha={alpha:.3f}, spread={spread:.3f}")


def point(folder: Path, steps: int, seed: int) -> tuple[float, float]:
    """(tokens, val loss on the whole split) of the default recipe cut to so many steps."""
    whole = ("train.eval_tokens=1000000", "train.eval_every=1000000", "train.sample_tokens=0")
    more = (f"name=fit{steps}-{seed}", f"budget.steps={steps}", f"train.seed={seed}")
    _, receipt = tuppence(
        "run", "shakespeare", *more, *whole, folder=folder, env=environment(folder / "cache")
    )
    found = float(receipt["actual"]["tokens"]), float(receipt["actual"]["val_loss"])
    print(
        f"{steps:6,} steps  {found[0]:12,.0f} tokens  seed {seed}  val {found[1]:.4f}", flush=True
    )
    return found


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(floor, scale, alpha): for each alpha on a grid the other two by least squares."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for alpha in (a / 100 for a in range(5, 201)):
        xs, ys = [tokens**-alpha for tokens, _ in points], [loss for _, loss in points]
        scale, floor = statistics.linear_regression(xs, ys)
        rms = math.sqrt(
            statistics.fmean((floor + scale * x - y) ** 2 for x, y in zip(xs, ys, strict=True))
        )
        if rms < best[0] and floor > 0:
            best = (rms, floor, scale, alpha)
    return best[1:]


if __name__ == "__main__":
    main()
