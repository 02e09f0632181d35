"""Batches made ahead: the same ones, whatever the loop asks for, and no thread left behind."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import GPT2, finished
from test_data_loader import corpus

from tuppence.config import DataPlan
from tuppence.data.loader import Loader, rolling_sha
from tuppence.data.prepare import prepare
from tuppence.errors import Fault
from tuppence.plan.hardware import Calibration
from tuppence.ranks import ALONE, Ranks
from tuppence.train import loop
from tuppence.train.feed import Batch, Feed

SIZE: dict[str, Any] = {"sequence_len": 10, "batch_size": 8, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("feed"), tokens=2000, shard_tokens=300)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    assert not [t.name for t in threading.enumerate() if t.name in ("feed", "shards")]


def taken(feed: Feed, number: int, tokens_sha: str) -> Batch:
    feed.ask(number, tokens_sha)
    return feed.take()


def test_batches_and_hashes_are_those_made_in_line(folder: Path) -> None:
    loader, sha = Loader(folder, **SIZE), "0"
    feed = Feed(Loader(folder, **SIZE), ranks=ALONE, device="cpu")
    kept = []
    for number in range(60):
        expected = loader.batch(number)
        batch = taken(feed, number, sha)
        sha = rolling_sha(sha, expected)
        assert batch.tokens_sha == sha
        assert batch.rows.dtype == torch.int64
        kept.append((batch.rows, expected))
    feed.close()
    for rows, expected in kept:  # nothing wrote into what was handed out
        assert np.array_equal(rows.numpy(), expected)


def test_ranks_have_their_rows_and_the_lead_the_hash_of_all(folder: Path) -> None:
    whole = Loader(folder, **SIZE).batch(5)
    for rank in range(4):
        feed = Feed(Loader(folder, **SIZE), ranks=Ranks(rank, 4), device="cpu")
        batch = taken(feed, 5, "0")
        feed.close()
        assert np.array_equal(batch.rows.numpy(), whole[2 * rank : 2 * rank + 2])
        assert batch.tokens_sha == (rolling_sha("0", whole) if rank == 0 else "0")


def test_it_may_go_anywhere(folder: Path) -> None:
    loader, feed = Loader(folder, **SIZE), Feed(Loader(folder, **SIZE), ranks=ALONE, device="cpu")
    for number, sha in [
        (0, "a"),
        (7, "b"),
        (7, "b"),
        (8, "other"),
        (3, "c"),
        (1000, "c"),
        (0, "a"),
    ]:
        batch = taken(feed, number, sha)
        assert np.array_equal(batch.rows.numpy(), loader.batch(number))
        assert batch.tokens_sha == rolling_sha(sha, loader.batch(number))
    feed.ask(4, "x")  # and changes its mind before it takes
    batch = taken(feed, 5, "y")
    feed.close()
    assert batch.tokens_sha == rolling_sha("y", loader.batch(5))


def test_the_next_batch_is_made_while_nobody_waits(folder: Path) -> None:
    made = []

    class Noted(Loader):
        def fill(self, rows: Any, step: int, *, rank: int = 0) -> None:
            super().fill(rows, step, rank=rank)
            made.append((step, threading.current_thread().name))

    feed = Feed(Noted(folder, **SIZE), ranks=ALONE, device="cpu")
    sha = taken(feed, 0, "0").tokens_sha
    for _ in range(10_000):
        if len(made) == 2:
            break
        time.sleep(0.001)
    assert made == [(0, "feed"), (1, "feed")]
    feed.ask(1, sha)
    assert feed.there(within=10)
    feed.take()
    feed.close()
    assert [step for step, _ in made].count(1) == 1


def test_an_error_is_the_loops(folder: Path) -> None:
    fault = Fault("the disk is gone")

    class Broken(Loader):
        def fill(self, rows: Any, step: int, *, rank: int = 0) -> None:
            if step == 2:
                raise fault
            super().fill(rows, step, rank=rank)

    feed = Feed(Broken(folder, **SIZE), ranks=ALONE, device="cpu")
    sha = taken(feed, 0, "0").tokens_sha
    sha = taken(feed, 1, sha).tokens_sha
    feed.ask(2, sha)
    for _ in range(2):
        with pytest.raises(Fault) as caught:
            feed.take()
        assert caught.value is fault
    assert len(taken(feed, 3, sha).rows) == 8  # it goes on
    feed.close()


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return prepare(source="shakespeare", tokenizer="char", root=root).folder


@pytest.fixture
def run(tmp_path: Path, shards: Path, data_plan: DataPlan, calibration: Calibration) -> Any:
    """Train three steps of a small model."""
    return lambda: finished(tmp_path / "run", GPT2, data_plan, shards, calibration)


def test_a_wait_for_data_is_charged_as_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Loader.fill

    def slow(self: Loader, rows: Any, step: int, *, rank: int = 0) -> None:
        if step == 1:
            time.sleep(0.5)
        fill(self, rows, step, rank=rank)

    monkeypatch.setattr(Loader, "fill", slow)
    monkeypatch.setattr(loop, "PATIENCE_SECONDS", 0.05)
    folder = run()
    waited = [row["data_wait"] for row in folder.rows("metrics")]
    assert waited[1] == max(waited) > 0.05
    assert waited[1] < next(r["step_seconds"] for r in folder.rows("metrics") if r["step"] == 2)
    phases = [row["phase"] for row in folder.rows("ledger")]
    assert "data_wait" in phases
    after = phases.index("data_wait") + 1
    assert phases[after] == "train"


def test_a_run_ends_with_the_loaders_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, fill = Fault("the shards are gone"), Loader.fill

    def broken(self: Loader, rows: Any, step: int, *, rank: int = 0) -> None:
        if step == 2:
            raise fault
        fill(self, rows, step, rank=rank)

    monkeypatch.setattr(Loader, "fill", broken)
    with pytest.raises(Fault) as caught:
        run()
    assert caught.value is fault


def test_a_run_from_a_bucket_is_the_same_run(
    tmp_path: Path, shards: Path, data_plan: DataPlan, calibration: Calibration
) -> None:
    pytest.importorskip("fsspec")
    bare = tmp_path / "bare"
    shutil.copytree(shards, bare)
    place = tmp_path / "bucket"
    place.mkdir()
    for shard in bare.glob("*.bin"):
        shard.rename(place / shard.name)
    (bare / "bucket.json").write_text(json.dumps({"url": f"file://{place}", "cache_bytes": 10**9}))
    rows = []
    for name, data in (("here", shards), ("there", bare)):
        (tmp_path / name).mkdir()
        made = finished(tmp_path / name / "run", GPT2, data_plan, data, calibration)
        rows.append([(r["loss"], r["tokens_sha"]) for r in made.rows("metrics")])
        rows[-1] += [(r["loss"], r["tokens"]) for r in made.rows("evals")]
    assert rows[0] == rows[1]


# ---------------------------------------------------------------- to a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_same_batches(folder: Path) -> None:
    large: dict[str, Any] = {**SIZE, "batch_size": 800}
    loader = Loader(folder, **large)
    feed = Feed(Loader(folder, **large), ranks=ALONE, device="cuda")
    sha, kept = "0", []
    busy = torch.randn(4096, 4096, device="cuda")
    for number in range(40):
        batch = taken(feed, number, sha)
        sha = batch.tokens_sha
        for _ in range(20):
            busy = busy @ busy  # the stream lies behind, so that buffers are wanted in flight
        kept.append(batch.rows)
    feed.close()
    for number, rows in enumerate(kept):
        assert rows.dtype == torch.int64
        assert np.array_equal(rows.cpu().numpy(), loader.batch(number))
