"""The families at equal tokens, each with its optimizer, beside nanochat's model: bits per byte.

    python bench/families.py --corpus enwik8_articles.jsonl.xz [--nanochat CHECKOUT] --tune
    python bench/families.py --corpus enwik8_articles.jsonl.xz [--nanochat CHECKOUT]
    python bench/families.py --corpus ... [--nanochat CHECKOUT] --report     the table so far
    python bench/families.py --corpus ... --nanochat CHECKOUT --speed        tokens/s, interleaved

Four layers of width 256, T = 256, a learned vocabulary of 4,096, batches of 8,192 tokens, bf16. All
arms see the same batches for a seed and are judged in the same windows of the val split by the same
code. Ours follow the plan's laws. The two arms under AdamW have the schedule of `depth`, and as
their rate (in the modern decoder that of its matrices: the other kinds keep theirs) the best of a
grid that --tune walks on a seed of its own. Each run is a process of one thread. Results are lines
of --out: what is there is not run again, and a changed recipe is another run. --set's words go on
top of every arm of ours.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, middle
from family_runs import Job, burst, train
from welch import welch

from tuppence import config, host
from tuppence.config import Budget, Data, DataPlan, Run
from tuppence.corpus import prepared
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve

PEER = "nanochat"
SHARED = (
    *("model.sequence_len=256", "train.batch_tokens=8192"),
    *("train.precision=bf16", "train.attention=matmul"),
)
DEPTH = ("model.family=depth", "model.depth=4")
MAIN = {
    "depth": DEPTH,
    PEER: DEPTH,  # its plan says depth, batch, steps and seed; the rest is its own
    "gpt2": ("model.family=gpt2", "model.n_layer=4", "model.n_embd=256", "model.tied_head=off"),
    "depth adamw": (*DEPTH, "train.optimizer=adamw"),
}
SECOND = {"depth exportable": (*DEPTH, "model.exportable=on")}
ABLATIONS = {
    "no value embeddings": (*DEPTH, "model.value_embeddings=off"),
    "no residual scalars": (*DEPTH, "model.residual_scalars=off"),
    "windows SL": (*DEPTH, "model.window_pattern=SL"),
    "one key-value head": (*DEPTH, "model.n_kv_head=1"),
}
ARMS = MAIN | SECOND | ABLATIONS
SEEDS, ABLATION_SEEDS = 5, 2
TUNED = ("depth adamw", "gpt2")
TUNE_SEED = 1000  # that no result has
RATES, MOST_RATES = (2.5e-4, 5e-4, 1e-3), 9  # and further while the best is at an edge


# ---------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Bench:
    """The corpus, the peer and what was asked; jobs are made of it."""

    shards: Path
    data: DataPlan
    checkout: Path | None
    out: Path
    tokens: int
    words: tuple[str, ...]
    tune_share: int

    def rows(self, kind: str = "arm") -> list[dict[str, Any]]:
        """The lines of the results so far: of runs ("arm"), or of timing ("speed")."""
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        return [row for row in map(json.loads, lines) if kind in row]

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def job(
        self,
        arm: str,
        seed: int,
        *,
        tokens: int | None = None,
        rate: float | None = None,
        threads: int = 1,
    ) -> Job:
        """One run; a tuned arm takes its grid's best rate so far where none is given."""
        rate = self.best_rate(arm) if rate is None else rate
        tuned = self.schedule() if arm in TUNED else ()
        tuned += () if rate is None else (f"train.learning_rate={rate:g}",)
        overrides = () if arm == PEER else (*tuned, *self.words)
        run = Run(
            budget=Budget(tokens=tokens or self.tokens),
            data=Data(source=self.data.source, tokenizer=self.data.tokenizer),
        )
        seeded = f"train.seed={seed}"
        run = config.override(run, [*SHARED, *ARMS[arm], *overrides, seeded])
        plan = solve(run, self.data, round_numbers(threads))
        return Job(arm, plan, overrides, self.shards, self.checkout if arm == PEER else None)

    def schedule(self) -> tuple[str, ...]:
        """The schedule of `depth` in words, so that optimizers differ in nothing else."""
        plan = self.job("depth", 1).plan.schedule
        words = {"schedule": plan.shape, "warmup": plan.warmup, "decay": plan.decay}
        return tuple(f"train.{key}={value}" for key, value in words.items())

    def tuning(self, arm: str, rate: float) -> Job:
        """A run of the grid."""
        return self.job(arm, TUNE_SEED, tokens=self.tokens // self.tune_share, rate=rate)

    def grid(self, arm: str) -> dict[float, float]:
        """Bits per byte by rate, as far as the grid has been walked."""
        known = {(row["arm"], row["recipe"], row["seed"]): row["val_bpb"] for row in self.rows()}
        rates = [RATES[0] * 2.0**n for n in range(-MOST_RATES, 2 * MOST_RATES)]
        found = {rate: known.get(self.tuning(arm, rate).key) for rate in rates}
        return {rate: bpb for rate, bpb in found.items() if bpb is not None}

    def best_rate(self, arm: str) -> float | None:
        """The grid's best; None (the law's) where there is no grid."""
        grid = self.grid(arm) if arm in TUNED else {}
        return min(grid, key=lambda rate: grid[rate]) if grid else None

    def next_rates(self, arm: str) -> list[float]:
        """What is to be tried next: the grid, then beyond the edge where the best lies."""
        grid = self.grid(arm)
        missing = [rate for rate in RATES if rate not in grid]
        if missing or len(grid) >= MOST_RATES:
            return missing
        best = min(grid, key=lambda rate: grid[rate])
        further = {min(grid): best / 2, max(grid): best * 2}
        return [further[best]] if best in further else []


def round_numbers(threads: int) -> Calibration:
    """A machine that was not measured: no rate, batch or model of these plans depends on it."""
    return Calibration(
        version=1,
        name=host.cpu_name(),
        device="cpu",
        threads=threads,
        torch=torch.__version__,
        measured_at="",
        matmul_tflops={"fp32": 0.1, "bf16": 0.5},
        memory_gbs=20.0,
        memory_gib=16.0,
        disk_write_mbs=500.0,
        startup_seconds=3.0,
        startup_rss_gib=0.4,
        timings={},
    )


def wanted(bench: Bench, arms: Iterable[str], seeds: int | None) -> Iterator[tuple[str, int]]:
    """(arm, seed) in the order of running: seed by seed, what matters most first."""
    for group, count in ((MAIN, SEEDS), (SECOND, SEEDS), (ABLATIONS, ABLATION_SEEDS)):
        for seed in range(1, (seeds or count) + 1):
            for arm in group:
                if arm in arms and (arm != PEER or bench.checkout):
                    yield arm, seed


def spend(bench: Bench, jobs: list[Job], at_once: int) -> None:
    """Run what has no line yet, each in a process of its own, and append the lines."""
    known = {(row["arm"], row["recipe"], row["seed"]) for row in bench.rows()}
    left = [job for job in jobs if job.key not in known]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already", flush=True)
    pool = fresh_processes(at_once)
    try:
        for done in as_completed([pool.submit(train, job) for job in left]):
            row = done.result()
            bench.write(row)
            print(
                f"{row['arm']:20} seed {row['seed']:<4} {row['val_bpb']:.4f} bits/byte "
                f"{row['tokens_per_second']:6,.0f} tok/s {row['train_seconds']:4.0f} s {told(row)}",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)


def fresh_processes(
    at_once: int, *, threads: int = 1, tasks: int | None = 1
) -> ProcessPoolExecutor:
    """A pool of processes that start with nothing, and end after `tasks`."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(at_once, mp_context=spawn, max_tasks_per_child=tasks)


def tune(bench: Bench, at_once: int) -> None:
    """Walk the grids of learning rates, and print them."""
    for arm in TUNED:
        while rates := bench.next_rates(arm):
            spend(bench, [bench.tuning(arm, rate) for rate in rates], at_once)
        best = bench.best_rate(arm)
        for rate, bpb in sorted(bench.grid(arm).items()):
            print(f"{arm:20} {bpb:.4f} bits/byte  rate {rate:g}{' *' * (rate == best)}", flush=True)


# ---------------------------------------------------------------- tokens a second


def speed(bench: Bench, *, rounds: int, steps: int) -> None:
    """Tokens a second of both sides in turn, on one thread and on two cores."""
    if bench.checkout is None:
        return
    for threads in (1, 2):
        jobs = [bench.job(arm, 1, threads=threads) for arm in ("depth", PEER)]
        pools = [fresh_processes(1, threads=threads, tasks=None) for _ in jobs]
        for pool, job in zip(pools, jobs, strict=True):
            pool.submit(burst, job, 1).result()
        found: list[list[float]] = [[], []]
        for _ in range(rounds):
            for pool, job, rates in zip(pools, jobs, found, strict=True):
                taken = pool.submit(burst, job, steps).result()
                rates.append(job.plan.step.batch_tokens / taken)
        for pool in pools:
            pool.shutdown()
        timed = {"speed": threads, "depth": found[0], PEER: found[1], "words": bench.words}
        bench.write(timed)
        print(ratio(timed), flush=True)


def ratio(timed: dict[str, Any]) -> str:
    """Both sides' tokens a second, and ours over theirs round by round: median (least to most)."""
    depth, peer = timed["depth"], timed[PEER]
    ratios = [ours / theirs for ours, theirs in zip(depth, peer, strict=True)]
    return (
        f"{timed['speed']} thread(s): depth {middle(depth, ',.0f')} tok/s, "
        f"{PEER} {middle(peer, ',.0f')} tok/s: {middle(ratios)} x  {' '.join(timed['words'])}"
    )


# ---------------------------------------------------------------- the table


def report(bench: Bench) -> None:
    """Every arm's mean, the comparisons, and what --speed found last."""
    rows = [row for row in bench.rows() if row["seed"] != TUNE_SEED]
    found: dict[str, list[float]] = {}
    print(f"{'arm':20} runs  bits/byte      sd    tok/s  min    weights")
    for arm in ARMS:
        if arm == PEER and bench.checkout is None:
            continue
        recipe = bench.job(arm, 1).recipe
        mine = [row for row in rows if (row["arm"], row["recipe"]) == (arm, recipe)]
        found[arm] = [row["val_bpb"] for row in mine]
        if mine:
            print(f"{arm:20} {line(mine)}")
    compared(found, "depth", "gpt2")
    compared(found, "depth", "depth adamw")
    compared(found, "depth", PEER)
    for timed in {row["speed"]: row for row in bench.rows("speed")}.values():  # the newest of each
        print(ratio(timed))


def line(rows: list[dict[str, Any]]) -> str:
    """An arm's runs as columns."""
    bpb = [row["val_bpb"] for row in rows]
    spread = f"{statistics.stdev(bpb):7.4f}" if len(bpb) > 1 else "      -"
    rate = statistics.median(row["tokens_per_second"] for row in rows)
    minutes = statistics.median(row["train_seconds"] for row in rows) / 60
    return (
        f"{len(bpb):4d} {statistics.fmean(bpb):10.4f} {spread} {rate:8,.0f} {minutes:4.1f} "
        f"{rows[0]['params_matmul']:>10,}  {told(rows[0])}"
    )


def told(row: dict[str, Any]) -> str:
    """The matrices' rate and weight decay, of ours."""
    if row["rate_decay"] is None:
        return ""
    return "rate {:.3g}, decay {:.3g}".format(*row["rate_decay"])


def compared(found: dict[str, list[float]], a: str, b: str) -> None:
    """Welch's test of two arms, and the 95% interval of their difference."""
    if min(len(found.get(arm, [])) for arm in (a, b)) < 2:
        return
    test, base = welch(found[a], found[b]), statistics.fmean(found[b])
    low, high = test.interval()
    print(
        f"{a} - {b}: {test.difference / base:+.2%} of its bits/byte "
        f"(95%: {low / base:+.2%} to {high / base:+.2%}), t {test.t:.2f}, p {test.p:.2g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="enwik8_articles.jsonl.xz, or another text")
    parser.add_argument("--nanochat", type=Path, help="a checkout of the peer")
    parser.add_argument("--out", type=Path, default=Path("families.jsonl"), help="the results")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where shards are kept")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, help=f"{SEEDS}, and {ABLATION_SEEDS} of an ablation")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--tune", action="store_true", help="walk AdamW's grids of learning rates")
    parser.add_argument("--tune-share", type=int, default=2, help="a grid's run: half the tokens")
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    parser.add_argument("--speed", action="store_true", help="tokens/s of both sides in turn")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--steps", type=int, default=12, help="of each round of --speed")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="words")
    args = parser.parse_args()
    print(machine())
    if args.nanochat is None:
        print(f"{PEER}: skipped (--nanochat CHECKOUT adds it)")
    source = Run(data=Data(source=args.corpus, tokenizer="bpe:4096"))
    made, data = prepared(source, args.data, fresh=False)
    checkout = args.nanochat.resolve() if args.nanochat else None
    bench = Bench(
        made.folder.resolve(),
        data,
        checkout,
        args.out,
        args.tokens,
        tuple(args.words),
        args.tune_share,
    )
    if args.tune:
        tune(bench, args.jobs)
    elif args.speed:
        speed(bench, rounds=args.rounds, steps=args.steps)
    elif args.report:
        report(bench)
    else:
        jobs = [bench.job(arm, seed) for arm, seed in wanted(bench, args.arms, args.seeds)]
        spend(bench, jobs, args.jobs)
        report(bench)


if __name__ == "__main__":
    main()
