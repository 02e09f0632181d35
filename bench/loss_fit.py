"""Trains the points behind the default recipe's promised loss, and fits L(D) = E + A D^-alpha.

    python bench/loss_fit.py [--steps 300 700 1500 2500 3500]

Prints every point, the fit for plan/loss.py, and its residuals. The 80% half-width is 1.28 times
the residuals' standard deviation, and never less than the difference that seeds make here.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from common import environment, machine, tuppence

SEED_SPREAD = 0.015  # nats; half-width between seeds of the same run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 700, 1500, 2500, 3500])
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        points = [point(Path(place), steps) for steps in args.steps]
    error, floor, scale, alpha = fit(points)
    residuals = [loss - (floor + scale * tokens**-alpha) for tokens, loss in points]
    spread = max(SEED_SPREAD, 1.28 * math.sqrt(sum(r * r for r in residuals) / len(residuals)))
    print(f"floor={floor:.4f}, scale={scale:.4g}, alpha={alpha:.3f}, spread={spread:.3f}")
    print(f"rms {error:.4f}; residuals {[round(r, 4) for r in residuals]}")
    print(f"median loss {statistics.median(loss for _, loss in points):.4f}")


def point(folder: Path, steps: int) -> tuple[float, float]:
    """(tokens, val loss on the whole split) of the default recipe cut to so many steps."""
    whole = ("train.eval_tokens=1000000", "train.eval_every=1000000", "train.sample_tokens=0")
    words = ("run", "shakespeare", f"name=fit{steps}", f"budget.steps={steps}", *whole)
    _, receipt = tuppence(*words, folder=folder, env=environment(folder / "cache"))
    found = float(receipt["actual"]["tokens"]), float(receipt["actual"]["val_loss"])
    print(f"{steps:6,} steps  {found[0]:12,.0f} tokens  val {found[1]:.4f}", flush=True)
    return found


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """(rms, floor, scale, alpha): for each alpha on a grid the other two by least squares."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for alpha in (a / 100 for a in range(5, 201)):
        xs, ys = [tokens**-alpha for tokens, _ in points], [loss for _, loss in points]
        scale, floor = statistics.linear_regression(xs, ys)
        rms = math.sqrt(
            statistics.fmean((floor + scale * x - y) ** 2 for x, y in zip(xs, ys, strict=True))
        )
        if rms < best[0] and floor > 0:
            best = (rms, floor, scale, alpha)
    return best


if __name__ == "__main__":
    main()
