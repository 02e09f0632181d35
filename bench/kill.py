"""`kill -9` at random moments of one run, also inside saves and evaluations: is it the same run?

    python bench/kill.py [--kills 20] [--seed 0] [key=value ...]

Compares every loss, every gradient norm, every tokens_sha, every evaluation and the final weights'
hash with those of an uninterrupted run. Exit 1 on any difference.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment, rows, tuppence

WORDS = [
    "train",
    "shakespeare",
    "budget.steps=400",
    "machine.usd_per_hour=0.4",
    "model.n_embd=64",
    "model.sequence_len=64",
    "train.batch_tokens=1024",
    "train.precision=bf16",  # what is fastest is measured anew, and two plans may differ in it
    "train.attention=matmul",
    "train.eval_every=20",
    "train.eval_tokens=20000",
    "train.save_every=7",
    "train.sample_tokens=20",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="overrides for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        env = environment(folder / "cache")
        words = [*WORDS, *args.words]
        straight_seconds, _ = tuppence(*words, "name=straight", folder=folder, env=env)
        killed = kill_until_done(folder, [*words, "name=killed"], env, args.kills, args.seed)
        straight, broken = told(folder / "runs/straight"), told(folder / "runs/killed")
        same = {key: straight[key] == broken[key] for key in straight}
        print(f"uninterrupted {straight_seconds:.1f} s; {json.dumps(killed)}")
        print(f"equal: {json.dumps(same)}")
        sys.exit(0 if all(same.values()) and killed["kills"] == args.kills else 1)


def kill_until_done(
    folder: Path, words: list[str], env: dict[str, str], kills: int, seed: int
) -> dict[str, object]:
    """Start, kill after a random time of training, start again, ..., then let it end."""
    chance, phases = random.Random(seed), []
    beat = folder / "runs/killed/heartbeat.json"
    while len(phases) < kills:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuppence", *words],
            cwd=folder,
            env=env,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and phase_of(beat, process.pid) in (
            "",
            "provision",
            "prepare",
        ):
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 1.5))
        if process.poll() is not None:
            break  # it ended: more steps or fewer kills
        phases.append(phase_of(beat, process.pid))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    tuppence(*words, folder=folder, env=env)
    by_phase = {phase: phases.count(phase) for phase in sorted(set(phases))}
    return {"kills": len(phases), "killed_in": by_phase}


def phase_of(beat: Path, pid: int) -> str:
    """What this process is charging for just now; empty before it charges anything."""
    try:
        said = json.loads(beat.read_text())
    except (OSError, json.JSONDecodeError):
        return ""
    return str(said["phase"]) if said["pid"] == pid else ""


def told(run: Path) -> dict[str, object]:
    """What must not depend on interruptions."""
    metrics = {row["step"]: row for row in rows(run, "metrics")}
    evals = {row["step"]: (row["loss"], row["bpb"]) for row in rows(run, "evals")}
    last = [metrics[step] for step in sorted(metrics)]
    return {
        "steps": len(last),
        "losses": [row["loss"] for row in last],
        "grad_norms": [row["grad_norm"] for row in last],
        "tokens_sha": [row["tokens_sha"] for row in last],
        "evals": evals,
        "weights": json.loads((run / "checkpoints/last.json").read_text())["sha256"],
        "best": json.loads((run / "checkpoints/best.json").read_text()),
    }


if __name__ == "__main__":
    main()
