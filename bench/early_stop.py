"""Does a run stop where validation turned, and only there?

    python bench/early_stop.py [--corpus FILE] [--seeds 20] [--only overfit|noisy]

Over-fitting: models on 50,000 characters for a hundred epochs, each twice: with early stop, and
without it until well after the turn. Validation turned where that second val curve, evaluated every
2.5% of the way to there and smoothed over three points, is lowest. The stop must come within 15% of
those tokens, the best checkpoint be kept, the rest of the budget be unspent.

Noisy: models too small to over-fit, at high rates, small batches, on few val characters, for
several epochs, with a plateau at the peak rate or at the end, evaluated eighty times. None may
stop. Exit 1 where one of these does not hold.
"""

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import environment, machine, rows, tuppence

CHARACTERS, WITHIN, BEYOND = 50_000, 0.15, 1.4
WAYS = ("data.tokenizer=char", "train.sample_tokens=0", "machine.usd_per_hour=0.4")


@dataclass(frozen=True)
class Setting:
    """One way to over-fit."""

    name: str
    words: tuple[str, ...]


def shape(family: str, layers: int, width: int, length: int) -> tuple[str, ...]:
    sizes = (f"model.n_layer={layers}", f"model.n_embd={width}", f"model.sequence_len={length}")
    return (f"model.family={family}", *sizes, f"model.n_head={max(2, width // 32)}")


SETTINGS = (
    Setting("the recipe, rate 0.01, batch 2048", ("train.batch_tokens=2048",)),
    Setting(
        "depth 4 x 256, rate 0.02, batch 4096",
        (*shape("depth", 4, 256, 128), "train.learning_rate=0.02", "train.batch_tokens=4096"),
    ),
    Setting(
        "gpt2 4 x 256, rate 0.002, batch 2048",
        (
            *shape("gpt2", 4, 256, 128),
            *("train.optimizer=adamw", "train.learning_rate=0.002", "train.batch_tokens=2048"),
            "model.exportable=none",
        ),
    ),
    Setting(
        "the recipe, rate 0.02, batch 4096",
        ("train.learning_rate=0.02", "train.batch_tokens=4096"),
    ),
    Setting(
        "the recipe, rate 0.005, batch 2048",
        ("train.learning_rate=0.005", "train.batch_tokens=2048"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a text; else tiny Shakespeare")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", choices=("overfit", "noisy"))
    args = parser.parse_args()
    print(machine())
    text, faults, started = _text(args.corpus), [], time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        if args.only != "noisy":
            faults += overfit(Path(place), text)
        if args.only != "overfit":
            faults += noisy(Path(place), text, args.seeds)
    print(f"{time.monotonic() - started:.0f} s; " + ("; ".join(faults) or "all hold"))
    sys.exit(1 if faults else 0)


def _text(corpus: Path | None) -> str:
    if corpus is not None:
        return corpus.read_text(encoding="utf-8")
    from tuppence.files import asset

    return asset("shakespeare.txt").read_text(encoding="utf-8")


# ---------------------------------------------------------------- runs that over-fit


def overfit(folder: Path, text: str) -> list[str]:
    """A line for each setting; what did not hold."""
    (folder / "small.txt").write_text(text[:CHARACTERS], encoding="utf-8")
    print(
        "run                   turned at   stopped at            best  val loss: best, end  unspent"
    )
    return [fault for setting in SETTINGS for fault in _overfit(folder, setting)]


def _overfit(folder: Path, setting: Setting) -> list[str]:
    name = f"over{SETTINGS.index(setting)}"
    batch = next(int(w.partition("=")[2]) for w in setting.words if "batch_tokens=" in w)
    budget = f"budget.tokens={100 * CHARACTERS // batch * batch}"
    words = ("shakespeare", budget, "data.source=small.txt", *WAYS, *setting.words)
    _, receipt = tuppence("run", *words, f"name={name}", folder=folder)
    stop = receipt["early_stop"]
    if stop is None:
        return [f"{setting.name} was not stopped"]
    turned = _turned(
        folder, (*words, f"name={name}_off"), around=stop["turned_tokens"], batch=batch
    )
    ratio, best = stop["tokens"] / turned, receipt["best"]
    evals = rows(folder / "runs" / name, "evals")
    print(
        f"{setting.name:38s} {turned:10,} {stop['tokens']:10,} ({ratio - 1:+.0%})  "
        f"{stop['best_val_loss']:.4f}, {evals[-1]['loss']:.4f}  "
        f"{1 - receipt['budget']['fraction']:.0%} of the tokens, ${receipt['unspent']['usd']:.4f}",
        flush=True,
    )
    faults = []
    if abs(ratio - 1) > WITHIN:
        faults.append(f"{setting.name} stopped at {ratio:.2f} of the turn")
    if best["val_loss"] > stop["best_val_loss"]:
        faults.append(f"{setting.name} did not keep its best")
    return faults


def _turned(folder: Path, words: tuple[str, ...], *, around: int, batch: int) -> int:
    """Tokens at which the same run's val curve is lowest, smoothed over three points."""
    every = max(1, round(0.025 * around / batch))
    run = folder / "runs" / next(w.partition("=")[2] for w in words if w.startswith("name="))
    command = [sys.executable, "-m", "tuppence", "run", *words, "train.early_stop=off"]
    process = subprocess.Popen(
        [*command, f"train.eval_every={every}", "train.save_every=1000000"],
        cwd=folder,
        env=environment(folder / "cache"),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and _last_step(run) * batch < BEYOND * around:
        time.sleep(0.5)
    process.terminate()
    process.wait()
    curve = [(row["step"] * batch, row["loss"]) for row in rows(run, "evals")]
    losses = [loss for _, loss in curve]
    smooth = [sum(losses[i - 1 : i + 2]) / 3 for i in range(1, len(losses) - 1)]
    return curve[1 + smooth.index(min(smooth))][0]


def _last_step(run: Path) -> int:
    evals = rows(run, "evals") if (run / "evals.jsonl").exists() else []
    return evals[-1]["step"] if evals else 0


# ---------------------------------------------------------------- runs that do not


def noisy(folder: Path, text: str, seeds: int) -> list[str]:
    """A line for each seed; those that were stopped."""
    stopped = []
    for seed in range(seeds):
        receipt, told = _noisy(folder, text, seed)
        print(told, "STOPPED" if receipt["early_stop"] else "not stopped", flush=True)
        if receipt["early_stop"]:
            stopped.append(f"seed {seed} was stopped")
    return stopped


def _noisy(folder: Path, text: str, seed: int) -> tuple[Any, str]:
    draw = random.Random(seed)
    characters, first = draw.choice((60_000, 100_000)), draw.randrange(len(text) // 2)
    source = folder / f"part{seed}.txt"
    source.write_text(text[first : first + characters], encoding="utf-8")
    layers, width = draw.choice(((1, 16), (1, 24), (2, 16)))
    rate, batch, epochs = draw.choice((0.02, 0.04)), draw.choice((128, 256)), draw.choice((3, 6, 9))
    steps = min(epochs * characters // batch, 3000)
    schedule = draw.choice(
        (("wsd", "decay", 0), ("wsd", "decay", 0.2), ("cosine", "lr_floor", 0.5))
    )
    receipt = tuppence(
        *("run", "shakespeare", f"name=noisy{seed}", f"data.source={source.name}", *WAYS),
        *shape("gpt2", layers, width, 32),
        f"budget.steps={steps}",
        f"train.eval_every={steps // 80}",
        f"data.val_tokens={draw.choice((500, 1000, 2000))}",
        f"train.batch_tokens={batch}",
        f"train.learning_rate={rate}",
        f"train.schedule={schedule[0]}",
        f"train.{schedule[1]}={schedule[2]}",
        "train.optimizer=adamw",
        f"train.seed={seed}",
        "machine.threads=1",
        folder=folder,
    )[1]
    evals = [row["loss"] for row in rows(folder / "runs" / f"noisy{seed}", "evals")]
    rises = sum(b > a for a, b in itertools.pairwise(evals))
    return receipt, (
        f"noisy {seed:2d}: {layers} x {width}, rate {rate}, batch {batch}, {schedule[0]} "
        f"{schedule[1]}={schedule[2]}: {len(evals)} evaluations, {rises} above the one before;"
    )


if __name__ == "__main__":
    main()
