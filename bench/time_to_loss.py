"""Tiny Shakespeare by character: seconds of a whole process against the loss at its end.

    python bench/time_to_loss.py [--nanogpt CHECKOUT] [--nanochat CHECKOUT] [--rounds 3]

Two marks: 1.886 nats a character, where nanoGPT's CPU quickstart ends, and 1.634, where nanochat's
model of four layers ends in a published run. Ours is the default recipe for a budget in hours, with
shorter sequences, smaller batches and higher rates, as so short a run wants; start-up, evaluation
of the whole val split, sample and receipt are on its clock. Its first round measures the machine,
too; the others find that measured. nanoGPT runs its README's command. nanochat is its model,
optimizer and schedules (peer_nanochat.py) on our batches, for a number of steps (--steps); its
first round compiles, the others find that compiled. The peers' evaluations are off their clock. All
are judged on the whole val split, in windows of the length that each was trained on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment, machine, middle, tuppence
from quickstart import copy_peer, run_peer

MARKS = {1.886: {"seconds": 15.0, "steps": 130}, 1.634: {"seconds": 40.0, "steps": 420}}
SHORT = ("model.sequence_len=128", "train.batch_tokens=1024", "train.decay=0.9")
RATES = {  # the shorter the higher: of matrices, embeddings, head
    1.886: (0.03, 0.1, 0.006),
    1.634: (0.02, 0.06, 0.004),
}
WHOLE = ("train.eval_every=1000000", "train.eval_tokens=1000000")
PEER_SHAPE = (
    *("model.family=depth", "model.depth=4", "model.sequence_len=256"),
    *("train.batch_tokens=2048", "train.precision=bf16", "train.attention=matmul"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of the peer")
    parser.add_argument("--nanochat", type=Path, help="a checkout of the peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, help="of nanochat, for each mark")
    parser.add_argument("--seconds", type=float, nargs=2, help="of ours, for each mark")
    parser.add_argument(
        "--peer-run", nargs=2, metavar=("CHECKOUT", "STEPS"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.peer_run:
        print(json.dumps(peer_run(Path(args.peer_run[0]), int(args.peer_run[1]))))
        return
    print(machine())
    for place, mark in enumerate(MARKS):
        if args.seconds:
            MARKS[mark]["seconds"] = args.seconds[place]
        if args.steps:
            MARKS[mark]["steps"] = args.steps[place]
    with tempfile.TemporaryDirectory() as here:
        rounds(Path(here), args)


def rounds(folder: Path, args: argparse.Namespace) -> None:
    """Everyone in turn, and the medians of the rounds that found their caches warm."""
    nanogpt = copy_peer(args.nanogpt, folder) if args.nanogpt else None
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for number in range(args.rounds + 1):
        for mark in MARKS:
            found.setdefault(("tuppence", mark), []).append(ours(folder, mark, number))
            if args.nanochat:
                steps = int(MARKS[mark]["steps"])
                found.setdefault(("nanochat", mark), []).append(
                    nanochat(folder, args.nanochat, steps)
                )
        if nanogpt and number:
            found.setdefault(("nanoGPT", 1.886), []).append(run_peer(nanogpt)[:2])
        for (who, mark), runs in found.items():
            print(f"round {number}  {who:9s} mark {mark}  {runs[-1][0]:6.1f} s  {runs[-1][1]:.4f}")
        sys.stdout.flush()
    for (who, mark), runs in found.items():
        warm = runs if who == "nanoGPT" else runs[1:]
        seconds, losses = zip(*warm, strict=True)
        cold = "" if who == "nanoGPT" else f"; the first round {runs[0][0]:.1f} s"
        print(
            f"{who:9s} mark {mark}: {middle(list(seconds), '.1f')} s, "
            f"val {middle(list(losses), '.4f')}{cold}"
        )


def ours(folder: Path, mark: float, number: int) -> tuple[float, float]:
    """(seconds of the process, val loss) of the default recipe for a budget in hours."""
    words = [f"name=m{mark}-{number}", f"budget.hours={MARKS[mark]['seconds'] / 3600:.6f}"]
    kinds = ("learning", "embedding", "head")
    rates = (f"train.{kind}_rate={rate}" for kind, rate in zip(kinds, RATES[mark], strict=True))
    words += [*WHOLE, *SHORT, *rates]
    env = environment(folder / "cache")
    seconds, receipt = tuppence("run", "shakespeare", *words, folder=folder, env=env)
    return seconds, float(receipt["actual"]["val_loss"])


def nanochat(folder: Path, checkout: Path, steps: int) -> tuple[float, float]:
    """(seconds of the process without its evaluation, val loss) of so many steps."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [sys.executable, __file__, "--peer-run", str(checkout.resolve()), str(steps)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return time.monotonic() - started - told["evaluation_seconds"], float(told["val_loss"])


def peer_run(checkout: Path, steps: int) -> dict[str, float]:
    """Train the peer's model here and judge it."""
    from families import round_numbers
    from family_runs import Job, train

    from tuppence import config, host
    from tuppence.config import Budget, Data, Run
    from tuppence.corpus import prepared
    from tuppence.plan.solve import solve

    run = Run(
        name="peer",
        budget=Budget(steps=steps),
        data=Data(source="shakespeare", tokenizer="char"),
    )
    made, data = prepared(run, Path("data"), fresh=False)
    plan = solve(config.override(run, list(PEER_SHAPE)), data, round_numbers(host.usable_cores()))
    row = train(Job("nanochat", plan, (), made.folder.resolve(), checkout))
    return {"val_loss": row["val_loss"], "evaluation_seconds": row["evaluation_seconds"]}


if __name__ == "__main__":
    main()
