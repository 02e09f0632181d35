"""How well the planner predicts the peak memory of published training runs.

    error = |predicted / actual - 1| of the peak a GPU, in GiB

A row has the columns of published/throughput.csv; those with `peak_mem_gib` are scored. Most print
torch's max_memory_allocated, which is what `peak_memory_gib` predicts; where a row's source says
nvidia-smi or reserved memory, the prediction is of less, and the row counts as it is.
"""

import argparse
import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from published_rows import PUBLISHED, Row, number, read_job
from scores import Scored, by_group

from tuppence.plan.job import Job
from tuppence.plan.memory import peak_memory_gib
from tuppence.plan.throughput import framework_key

FP8_HEAD = "modded-nanogpt fp8 head"


def read_memory_job(row: Row) -> Job | str:
    """The row's job with what of a block it recomputes, or why there is none."""
    job = read_job(row)
    if isinstance(job, str):
        return job
    if not number(row, "micro_batch_seqs"):
        job = _with_usual_batch(job)
    if job.framework == "modded-nanogpt":
        job = _at_record(job, row)
    text = row.get("act_ckpt", "").lower()
    if "selective" in text or "sac" in text or text == "op":
        return dataclasses.replace(job, checkpointing=False, recompute="selective")
    if "gelu" in text or (job.framework == "llm.c" and not text):  # its default, -r 1
        return dataclasses.replace(job, recompute="norm" if "ln" in text else "activation")
    return job


def _with_usual_batch(job: Job) -> Job:
    """The micro-batch that the framework's own scripts choose, where its row does not say it."""
    sequences = job.micro_batch * job.accumulation
    if job.framework == "modded-nanogpt":  # all tokens of a rank are one sequence
        micro = sequences
    elif job.framework == "nanochat":  # runs/miniseries.sh; a step of 2^19 tokens unless it says
        layers = job.shape.layers_run
        micro = 32 if layers < 20 else 16 if layers < 28 else 8
        sequences = max(micro, sequences)
    else:
        micro = job.micro_batch
        while micro > 1 and not _possible(dataclasses.replace(job, micro_batch=micro)):
            micro //= 2
    return dataclasses.replace(job, micro_batch=micro, accumulation=max(1, sequences // micro))


def _at_record(job: Job, row: Row) -> Job:
    """modded-nanogpt as it was at a record: from 2024-12 untied, with three value embeddings beside
    the token's (rows give GPT-2's shape), from 2025-01-13 with an fp8 head."""
    found = re.search(r"\d{4}-\d{2}-\d{2}", row.get("source", ""))
    date = found[0] if found else ""
    if date >= "2024-12":
        tables = 4 * job.shape.vocab_size * job.shape.n_embd
        job = dataclasses.replace(job, shape=dataclasses.replace(job.shape, params_lookup=tables))
    return dataclasses.replace(job, framework=FP8_HEAD) if date >= "2025-01-13" else job


def impossible(csv_path: Path | str) -> list[str]:
    """Ids of published runs, with a stated peak or without, that by our middle do not fit their
    card. They ran: an empty list is a check on every framework, also where none states a peak."""
    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        runs = [(row["id"], read_memory_job(row)) for row in csv.DictReader(file)]
    return [name for name, job in runs if not isinstance(job, str) and not _possible(job)]


def _possible(job: Job) -> bool:
    return peak_memory_gib(job).mid <= job.gpu.memory_gib


def score(csv_path: Path | str) -> dict[str, Any]:
    """Errors and coverage over the rows that give a peak; groups are frameworks."""
    scored = []
    for row, job, actual in jobs(csv_path):
        if isinstance(job, str):
            scored.append(Scored(row["id"], framework_key(row.get("framework") or "unknown")))
            continue
        group = job.framework.removesuffix(" fp8 head")
        scored.append(Scored(row["id"], group, actual, peak_memory_gib(job)))
    return by_group(scored)


def jobs(csv_path: Path | str) -> list[tuple[Row, Job | str, float]]:
    """Rows with a peak, their jobs (or why none), and the peak in GiB."""
    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (number(row, "peak_mem_gib") or 0) > 0]
    return [(row, read_memory_job(row), number(row, "peak_mem_gib") or 0) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("csv", nargs="?", default=PUBLISHED)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(score(args.csv), indent=2))
        return
    for row, job, actual in jobs(args.csv):
        if isinstance(job, str):
            print(f"{row['id']:24} skipped: {job}")
            continue
        peak = peak_memory_gib(job)
        print(
            f"{row['id']:24} {job.framework:16} {job.shape.n_embd:5} x {job.shape.layers_run:<3g}"
            f" batch {job.micro_batch:<3} x {job.accumulation:<2} {job.parallel:6}"
            f" {peak.mid:7.2f} of {actual:6.2f} GiB {100 * (peak.mid / actual - 1):+6.1f}%"
        )
    print(json.dumps(score(args.csv), indent=2))
    print("ran, and by our middle could not:", ", ".join(impossible(args.csv)) or "none")


if __name__ == "__main__":
    main()
