"""Training on a bucket, whole processes against a server that speaks S3: killed, and gone on with
on a fresh machine."""

import json
import shutil
import time
from pathlib import Path

import pytest
from bucket_runs import steps_on
from known import know_this_machine
from test_recovery import TINY, finished, one_line, tuppence

from tuppence import bucket, checkpoint
from tuppence.config import DataPlan
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration

pytest_plugins = ["bucket_places"]
WORDS = [*TINY, "train.precision=fp32", "train.attention=sdpa", "machine.threads=1", "name=x"]


@pytest.fixture(autouse=True)
def known(cache_home: Path, calibration: Calibration, data_plan: DataPlan) -> None:
    """No process measures the machine."""
    know_this_machine(calibration, data_plan, [["budget.steps=1", *WORDS]])


def local(url: str) -> RunFolder:
    return RunFolder(bucket.local_root(url) / "x")


def told(folder: RunFolder) -> tuple[list, list, str]:
    """Losses and token hashes, evaluations, and the hash of the last weights."""
    rows = [(r["step"], r["loss"], r["tokens_sha"]) for r in folder.latest("metrics")]
    evals = [(r["step"], r["loss"]) for r in folder.latest("evals")]
    last = checkpoint.pointer(folder, "last")
    assert last is not None
    return rows, evals, last.sha256


@pytest.mark.slow
def test_killed_and_gone_on_with_elsewhere_it_is_the_same_run(
    s3: str,
    tmp_path: Path,
) -> None:
    words = ["run", "budget.steps=600", "train.eval_every=200", *WORDS]
    code, _, err = finished(tuppence(*words, "--runs", "straight", cwd=tmp_path))
    assert code == 0, err
    straight = told(RunFolder(tmp_path / "straight/x"))
    runs = s3.rpartition("/")[0]
    for least in (20, 200):
        process = tuppence(*words, "--runs", runs, cwd=tmp_path)
        until = time.monotonic() + 120
        while (
            process.poll() is None
            and max(steps_on(s3), default=0) < least
            and time.monotonic() < until
        ):
            time.sleep(0.1)
        alive = process.poll() is None
        process.kill()
        assert alive, process.communicate()
        process.communicate()
        shutil.rmtree(bucket.local_root(runs))  # the machine is gone
    code, out, err = finished(tuppence(*words, "--runs", runs, "--json", cwd=tmp_path))
    assert code == 0, err
    assert "resuming from step" in err
    assert told(local(runs)) == straight
    receipt = json.loads(out)
    assert receipt["budget"]["fraction"] == 1.0
    assert {"lost"} <= {phase["phase"] for phase in receipt["phases"]}

    shutil.rmtree(bucket.local_root(runs))
    code, out, err = finished(tuppence("receipt", "x", "--runs", runs, "--json", cwd=tmp_path))
    assert code == 0, err
    assert json.loads(out)["hashes"] == receipt["hashes"]
    code, out, err = finished(tuppence("sample", f"{runs}/x", "A", "--tokens", "3", cwd=tmp_path))
    assert code == 0, err
    code, out, err = finished(tuppence(*words, "--runs", runs, cwd=tmp_path))
    assert code == 0, err
    assert "is finished" in err
    code, out, _ = finished(tuppence("runs", "--runs", runs, cwd=tmp_path))
    assert out.startswith("x ")


def test_a_bucket_that_is_not_there_is_one_line(s3: str, tmp_path: Path) -> None:
    where = s3.replace("bucket-", "nothing-").rpartition("/")[0]
    code, _, err = finished(
        tuppence("train", "budget.steps=5", *WORDS, "--runs", where, cwd=tmp_path)
    )
    assert code == 2
    assert where.removeprefix("s3://").partition("/")[0] in one_line(err)
