"""A run folder made by hand, killed once, resumed and finished: for tests of what reads one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tuppence.config import DataPlan, Interval, Plan, Predicted, Run, Warning
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve

T0 = 1_767_225_600.0  # 2026-01-01, midnight


def promised() -> Predicted:
    """Fixed numbers: the receipt is tested here, not the planner."""

    def around(mid: float) -> Interval:
        return Interval(0.8 * mid, mid, 1.25 * mid)

    return Predicted(
        step_seconds=around(0.25),
        tokens_per_second=around(2048.0),
        mfu=around(0.25),
        steps=around(640.0),
        tokens=around(327_680.0),
        hours=around(0.05),
        usd=around(0.02),
        phase_seconds={"provision": 3.0, "train": 160.0, "evaluate": 10.0, "save": 7.0},
        eval_seconds=10.0,
        save_seconds=1.0,
        peak_memory_gib=around(0.5),
        checkpoint_bytes=1_000_000,
        disk_bytes=4 * 1_000_000,
        epochs=0.33,
        val_loss=Interval(1.9, 2.0, 2.1),
        val_loss_source="fit of 5 runs of this recipe",
        basis="measured by calibrate",
    )


def canned_plan(run: Run, data: DataPlan, calibration: Calibration) -> Plan:
    """Two cents at 40 cents an hour: 180 seconds."""
    solved = solve(run, data, calibration)
    ceiling = 512 / 0.25 * solved.model.flops_per_token / 0.25 / 1e12  # so that MFU is 25%
    machine = dataclasses.replace(
        solved.machine, precision="bf16", peak_tflops=ceiling, peak_source="the bf16 ceiling here"
    )
    return dataclasses.replace(
        solved,
        machine=machine,
        predicted=promised(),
        warnings=(Warning("epochs_4", "5.0 epochs: <beyond> 4"),),
    )


STOP = {
    **{"reason": "turned", "step": 6, "tokens": 3072, "back_to": 4, "turned_tokens": 2048},
    **{"best_val_loss": 2.25, "val_loss": 2.5, "test": "Three of three lie <above> the best."},
    **{"anneal_steps": 2, "anneal_share": 0.05, "remaining": {"kind": "usd", "left": 0.011}},
}

SAMPLE = "\nROMEO:\n<script>alert('x')</script> & ```so``` {{ROWS}}\n"


def fill(folder: RunFolder, plan: Plan) -> None:
    """Two attempts: 9 steps, killed; resumed from step 2, then 4 more to the end."""
    folder.write_json("plan.json", dataclasses.asdict(plan))
    env = {"attempt": 1, "versions": {"torch": "2.11"}, "cpu": "Test CPU", "usable_cores": 2}
    env |= {"system": "Linux", "code_sha256": "c" * 64, "data_folder": "/home/me/data"}
    earlier = {**env, "versions": {"torch": "2.10"}}
    folder.write_json("env.json", {**env, "attempt": 2, "earlier_attempts": [earlier]})
    folder.file("argv.txt").write_text("tuppence run small budget.usd=0.02\n")
    folder.checkpoints.mkdir()
    best = {"step": 4, "path": "step_00000004", "sha256": "d" * 64}
    folder.file("checkpoints/best.json").write_text(json.dumps(best))

    def charge(attempt: int, phases: list[tuple[str, float, float]]) -> None:
        for phase, start, end in phases:
            row: dict[str, Any] = {"start": T0 + start, "end": T0 + end, "phase": phase}
            row |= {"node": "here", "usd_per_hour": 0.4, "usd": (end - start) / 3600 * 0.4}
            folder.append("ledger", {**row, "attempt": attempt})

    def step(attempt: int, number: int, loss: float) -> None:
        row = {"step": number, "attempt": attempt, "tokens": 512 * number, "loss": loss}
        row |= {"lr": 1e-3, "grad_norm": 1.0, "step_seconds": 0.5, "tokens_per_second": 1024.0}
        row |= {"mfu": 0.125, "usd": 0.001 * number, "hours": 0.002 * number, "data_wait": 0.0}
        row |= {"progress": number / 6, "memory_gib": 0.6, "tokens_sha": f"{number}" * 64}
        folder.append("metrics", row)

    def evaluated(attempt: int, number: int, loss: float, text: str) -> None:
        row = {"step": number, "attempt": attempt, "split": "val", "loss": loss, "bpb": loss / 0.7}
        row |= {"tokens": 1000, "of_tokens": 2000, "progress": number / 6, "usd": 0.001 * number}
        folder.append("evals", {**row, "seconds": 2.0})
        folder.append("samples", {"step": number, "attempt": attempt, "prompt": "\n", "text": text})

    def event(at: float, code: str, message: str, **details: Any) -> None:
        row = {"time": T0 + at, "code": code, "message": message, **details}
        folder.append("events", row)

    event(3, "start", "from the beginning", attempt=1, step=0)
    charge(1, [("provision", 0, 3), ("prepare", 3, 4), ("train", 4, 44)])
    for number, loss in ((1, 4.25), (2, 3.5), (3, 9.0), (4, 9.0), (9, 9.0)):
        step(1, number, loss)
    event(24, "save", "step 2", step=2)
    event(500, "resume", "from step 2", attempt=2, step=2, saved_at=T0 + 24)
    charge(2, [("provision", 497, 501), ("train", 501, 600), ("evaluate", 600, 620)])
    for number, loss in ((3, 3.0), (4, 2.5)):
        step(2, number, loss)
    evaluated(2, 4, 2.25, "early")
    event(610, "nonfinite_step", "step 5 skipped: loss <nan>", step=5)
    for number, loss in ((5, 2.25), (6, 2.0)):
        step(2, number, loss)
    charge(2, [("save", 620, 623.6), ("train", 623.6, 629)])
    evaluated(2, 6, 2.5, SAMPLE)
    event(629, "end", "finished", attempt=2, peak_memory_gib=0.75)
