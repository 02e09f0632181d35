"""Whether a preparation that is killed again and again comes to the same shards.

    python bench/prepare_kills.py --corpus books.jsonl.xz --kills 30

The corpus is written as plain JSONL, a few times over, and prepared once without a break. Then it
is prepared anew, with a random number of workers, and ended with SIGKILL at a random moment; the
same command goes on with it, and may be killed too, until one comes to its end: then its shards'
hashes are held against the unbroken run's. That again, until there were as many kills as asked for.
Processes that outlive the one that was killed by more than ten seconds are counted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from prepare_runs import ours_command, ours_environment, run, tree, varied

WORKERS = (1, 2, 4)
GRACE_SECONDS = 10.0


@dataclass
class Count:
    """What has come out so far."""

    kills: int = 0
    preparations: int = 0
    equal: int = 0
    outlived: int = 0


def killed(command: list[str], after_seconds: float, count: Count) -> str | None:
    """The last line of a run that was quicker than that, else None."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=ours_environment()
        )
        try:
            child.wait(after_seconds)
        except subprocess.TimeoutExpired:
            below = tree(child.pid)[1:]
            child.kill()
            child.wait()
            count.kills += 1
            count.outlived += _outlived(below)
            return None
        out.seek(0)
        lines = out.read().strip().splitlines() or [""]
    if child.returncode:
        raise SystemExit("\n".join(lines[-20:]))
    return lines[-1]


def _outlived(pids: list[int]) -> int:
    until = time.monotonic() + GRACE_SECONDS
    while (left := sum(_runs(pid) for pid in pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def broken(source: str, tokenizer: str, *, seconds: float, count: Count, most: int) -> object:
    """The shards of one preparation that was killed at random moments."""
    with tempfile.TemporaryDirectory() as root:
        while True:
            command = ours_command(source, tokenizer, root, workers=random.choice(WORKERS))
            after = random.uniform(0.0, 1.2 * seconds) if count.kills < most else 1e6
            line = killed(command, after, count)
            if line is not None:
                return json.loads(line)["shards"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a preparation at random moments.")
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL with a text field")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--copies", type=int, default=3, help="of the corpus, in one file")
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    count = Count()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        size = varied(arguments.corpus, path, copies=arguments.copies)
        source = str(path)
        with tempfile.TemporaryDirectory() as root:
            command = ours_command(source, arguments.tokenizer, root)
            whole = run(command, env=ours_environment())
        expected = json.loads(whole.line)["shards"]
        print(f"unbroken: {size / 1e6:,.0f} MB, {len(expected)} shards, {whole.seconds:.1f} s")
        while count.kills < arguments.kills:
            found = broken(
                source,
                arguments.tokenizer,
                seconds=whole.seconds,
                count=count,
                most=arguments.kills,
            )
            count.preparations += 1
            count.equal += found == expected
            print(
                f"{count.kills} kills, {count.preparations} preparations, {count.equal} with the "
                f"unbroken run's hashes, {count.outlived} processes that outlived theirs",
                flush=True,
            )
    print(json.dumps(vars(count)))
    if count.equal != count.preparations or count.outlived:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
