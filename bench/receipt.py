"""What a receipt of a long run takes: seconds of reading, building and drawing, and bytes.

    python bench/receipt.py [--steps 1000000] [--folder .] [--keep]

The run is made up: a month of steps, three attempts, a save every thousand steps, an evaluation
every two thousand. The last line is what a step adds: `RECEIPT_STEP_SECONDS` of train/pace.py has
to be above it.
"""

import argparse
import dataclasses
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import machine

from tuppence import report
from tuppence.config import Budget, Data, DataPlan, Machine, Model, Plan, Run, Train
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.report import history

BATCH, STEP_SECONDS, PRICE = 2048, 2.6, 0.40
T0 = 1_767_225_600.0
SAVE_EVERY, EVAL_EVERY = 1000, 2000


def planned(steps: int) -> Plan:
    """The plan of a made-up machine."""
    seconds = {"fp32": 0.15, "bf16": 0.6}
    made_up = Calibration(
        *(1, "Made-up CPU", "cpu", 2, "2.13.0", "2026-01-01T00:00:00+00:00"),
        *(seconds, 20.0, 8.0, 500.0, 3.0, 0.3, {}),
    )
    data = DataPlan(
        *("shakespeare", "char", "text", None, None, 65, 10**12, 111_540, 1.0, "0" * 64),
        *(True, "plain"),
    )
    run = Run(
        name="month",
        budget=Budget(steps=steps),
        machine=Machine(usd_per_hour=PRICE),
        model=Model(family="gpt2", n_layer=2, n_head=2, n_embd=64, sequence_len=32),
        data=Data(source="shakespeare", tokenizer="char"),
        train=Train(batch_tokens=BATCH, learning_rate=1e-3),
    )
    return solve(run, data, made_up)


def losses(steps: int) -> Iterator[tuple[int, float]]:
    draw = random.Random(0)
    for step in range(1, steps + 1):
        yield step, 1.4 + 2.8 / math.sqrt(1 + step / 200) + draw.gauss(0, 0.05)


def fill(folder: RunFolder, steps: int) -> None:
    """A finished run of so many steps, killed at a third and two thirds."""
    folder.write_json("plan.json", dataclasses.asdict(planned(steps)))
    folder.write_json("env.json", {"attempt": 3, "versions": {"python": "3.11"}, "cpu": "made up"})
    folder.file("argv.txt").write_text("tuppence run name=month\n")
    kills = {steps // 3: 2, 2 * steps // 3: 3}
    attempt = 1
    folder.event("start", "from the beginning", attempt=1, step=0)
    with folder.file("metrics.jsonl").open("w") as lines:
        for step, loss in losses(steps):
            lines.write(json.dumps(row(step, attempt, loss, steps)) + "\n")
            bill(folder, step, attempt)
            if step in kills:
                back = step - step % SAVE_EVERY
                for again in range(back + 1, step + 1):
                    lines.write(json.dumps(row(again, attempt + 1, loss, steps)) + "\n")
                attempt = kills[step]
                at = T0 + back * STEP_SECONDS
                folder.event("resume", f"from step {back}", attempt=attempt, step=back, saved_at=at)
    folder.event("end", "finished", attempt=attempt, peak_memory_gib=0.5)
    folder.close()


def row(step: int, attempt: int, loss: float, steps: int) -> dict[str, Any]:
    hours = step * STEP_SECONDS / 3600
    return {
        **{"step": step, "attempt": attempt, "tokens": step * BATCH, "loss": loss},
        **{"lr": 1e-3 * (1 - step / steps), "grad_norm": 0.3 + loss / 10},
        **{"step_seconds": STEP_SECONDS, "data_wait": 1e-5, "tokens_per_second": 787.7},
        **{"mfu": 0.31234567, "usd": hours * PRICE, "hours": hours, "progress": step / steps},
        **{"memory_gib": 0.45, "tokens_sha": "a" * 64},
    }


def bill(folder: RunFolder, step: int, attempt: int) -> None:
    """Saves and evaluations, with the intervals that they end and begin."""

    def charge(phase: str, start: float, end: float) -> None:
        usd = (end - start) / 3600 * PRICE
        told = {"start": start, "end": end, "phase": phase, "node": "here", "usd_per_hour": PRICE}
        folder.append("ledger", {**told, "usd": usd, "attempt": attempt})

    now = T0 + step * STEP_SECONDS
    if step % SAVE_EVERY == 0:
        charge("train", now - SAVE_EVERY * STEP_SECONDS, now - 1)
        charge("save", now - 1, now)
        folder.append("events", {"time": now, "code": "save", "message": f"step {step}"})
    if step % EVAL_EVERY == 0:
        loss, usd = 1.45 + 2.8 / math.sqrt(1 + step / 200), step * STEP_SECONDS / 3600 * PRICE
        told = {"step": step, "attempt": attempt, "split": "val", "loss": loss, "bpb": loss / 0.7}
        folder.append("evals", {**told, "tokens": 111_539, "of_tokens": 111_539, "usd": usd})
        said = {"step": step, "attempt": attempt, "prompt": "\n", "text": "x" * 400}
        folder.append("samples", said)


def timed(what: str, act: Callable[[], Any]) -> Any:
    started = time.monotonic()
    made = act()
    print(f"{what:10s}{time.monotonic() - started:8.2f} s", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="receipt", dir=args.folder))
    folder = RunFolder(place)
    print(machine())
    fill(folder, args.steps)
    size = folder.file("metrics.jsonl").stat().st_size
    print(f"{args.steps:,} steps, {size / 1e6:,.0f} MB of metrics")
    started = time.monotonic()
    steps = timed("reading", lambda: history.read(folder))
    told = timed("building", lambda: report.build(folder, steps))
    timed("drawing", lambda: (report.as_html(told, steps), report.as_markdown(told)))
    print(f"{'together':10s}{time.monotonic() - started:8.2f} s")
    started = time.monotonic()
    report.write(folder)
    whole = time.monotonic() - started
    print(f"{'again':10s}{whole:8.2f} s, {whole / args.steps:.2e} s a step")
    for name in ("receipt.html", "receipt.md", "receipt.json"):
        print(f"{name:14s}{folder.file(name).stat().st_size / 1e6:8.3f} MB")
    if args.keep:
        print(f"kept in {place}")
    else:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
