"""A bucket as people meet it: runs to be looked at, and errors in a line."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bucket_runs import (
    begun,
    harm_flip,
    mirrored,
    patched,
    same_bytes,
    save,
    settled,
    store_at,
)

from tuppence import bucket, checkpoint, store
from tuppence.bucket import documents, mirror
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder

pytest.importorskip("fsspec")
pytest_plugins = ["bucket_places"]
pytestmark = pytest.mark.usefixtures("quick", "closed")


# ---------------------------------------------------------------- to be looked at


def test_fetched_brings_what_was_asked_for_apart_from_a_run(url: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    best, last = save(folder, 10, best=True), save(folder, 20)
    mirrored(folder, url)
    documents = bucket.fetched(url, None)
    assert documents.run is not None
    assert not list(documents.checkpoints.glob("step_*"))
    found = bucket.fetched(url)
    assert same_bytes(best, checkpoint.choose(found, "best"))
    assert not (found.checkpoints / last.name).exists()
    assert same_bytes(last, checkpoint.choose(bucket.fetched(url, "20"), "20"))
    assert same_bytes(last, checkpoint.choose(bucket.fetched(url, "last"), "last"))
    runs = url.rpartition("/")[0]
    assert bucket.local_root(runs) in found.path.parents
    assert bucket.names(runs) == ["x"]


def test_fetched_again_brings_only_what_changed(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    mirrored(folder, memory)
    bucket.fetched(memory, "last")
    fetched: list[str] = []
    patched(
        monkeypatch,
        "fetch",
        lambda fetch: lambda self, name, to: (fetched.append(name), fetch(self, name, to)),
    )
    bucket.fetched(memory, "last")
    assert not [name for name in fetched if "checkpoints" in name]


def test_fetched_says_what_is_there(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    mirrored(folder, memory)
    with pytest.raises(UserError, match=r"no run 'y' on memory://bucket/runs.*x"):
        bucket.fetched("memory://bucket/runs/y")
    with pytest.raises(UserError, match=r"--checkpoint best: not on .*; steps there: 10"):
        bucket.fetched(memory)
    harm_flip(store_at(memory), "a00001-aaaa1111/checkpoints/step_00000010/state.json")
    with pytest.raises(Fault, match=r"state\.json does not match its sha256"):
        bucket.fetched(memory, "last")


# ---------------------------------------------------------------- errors for people


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_such_bucket_is_one_line(s3: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    for call in (bucket.Mirror, bucket.restore):
        line = refusal(lambda call=call: call(folder, "s3://not-there/runs/x"))  # type: ignore[misc]
        assert "there is no bucket not-there" in line


def test_no_credentials_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    assert "no credentials" in refusal(lambda: bucket.fetched(s3))


def test_no_network_is_one_line(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(store.S3_SECONDS, "retries", {"max_attempts": 0})
    folder = RunFolder(tmp_path / "x")
    assert "cannot be reached" in refusal(lambda: bucket.restore(folder, s3))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(loaded, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    line = refusal(lambda: bucket.fetched("s3://bucket/runs/x"))
    assert "pip install 'tuppence[bucket]'" in line


@pytest.mark.parametrize("url", ["ftp://host/runs/x", "s3://", "http://bucket/x"])
def test_other_places_are_refused(url: str) -> None:
    assert "s3://" in refusal(lambda: bucket.local_root(url))


def test_roots_are_apart_and_in_the_cache(cache_home: Path) -> None:
    one, other = bucket.local_root("s3://a/runs"), bucket.local_root("s3://b/runs")
    assert one != other
    assert one == bucket.local_root("s3://a/runs/")
    assert cache_home in one.parents
    assert bucket.is_url("s3://a/runs")
    assert not bucket.is_url("runs/s3")


def test_lines_that_grew_big_are_sent_less_often(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BIG_BYTES", 1000)
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, memory)
    settled(made)
    sent: list[str] = []
    patched(
        monkeypatch,
        "write",
        lambda write: lambda self, name, to: (sent.append(name), write(self, name, to)),
    )
    for step in range(100):
        folder.append("metrics", {"step": step, "attempt": 1})
    folder.append("evals", {"step": 1})
    made._documents.send()
    folder.append("metrics", {"step": 101, "attempt": 1})
    folder.append("evals", {"step": 2})
    made._documents.send()
    assert [name.rpartition("/")[2] for name in sent].count("evals.jsonl") == 2
    assert [name.rpartition("/")[2] for name in sent].count("metrics.jsonl") == 0
    assert made.close(60)
    assert [name.rpartition("/")[2] for name in sent].count("metrics.jsonl") == 1


def test_a_beat_sends_once_in_its_time(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, memory)
    settled(made)
    folder.append("evals", {"step": 1})
    made.beat()
    assert made.lag() == 0
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.0)
    made.beat()
    settled(made)
    assert b'"step": 1' in (store_at(memory).read("a00001-aaaa1111/evals.jsonl") or b"")
    assert made.close(60)
