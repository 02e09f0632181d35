"""A save whose parts come from machines that share no disk: gathered over the bucket."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from bucket_runs import begun, harm_flip, objects, patched, settled, steps_on, store_at
from checkpoints import by_rows, cut, equal, fresh, state_of, trained
from families import on_one_thread

from tuppence import bucket, checkpoint
from tuppence.bucket import Mirror, Relay, identity_of, relay
from tuppence.checkpoint import Retention, Saver
from tuppence.errors import Fault
from tuppence.files import file_sha256
from tuppence.folder import RunFolder
from tuppence.store import Away, Store

pytest_plugins = ["bucket_places"]
pytestmark = pytest.mark.usefixtures("quick", "closed")
one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


class Two:
    """A lead and a machine beside it, one rank each, with savers of their own."""

    def __init__(self, path: Path, url: str) -> None:
        self.url, self.made = url, trained()
        self.lead = begun(path / "lead")
        fence = checkpoint.claim(self.lead, 1)
        claim = identity_of(self.lead.read_json("attempt.json"))
        assert claim is not None
        self.mirror = Mirror(self.lead, url)
        self.identity = claim
        self.beside, way = bucket.beside(url, claim, rank=1)
        both = {"attempt": 1, "world": 2, "keep": Retention(2), "patience": 20.0}
        sent = self.mirror.checkpoint
        self.savers = [
            Saver(self.lead, relay=Relay(Store(url), claim), fence=fence, committed=sent, **both),
            Saver(self.beside, rank=1, relay=way, **both),
        ]

    def save(self, step: int, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            weights, moments = self.made.pieces()
            pieces = (cut(kind, by_rows, rank, 2) for kind in (weights, moments))
            self.savers[rank].save(*pieces, state_of(step))

    def wait(self) -> None:
        for saver in self.savers:
            saver.wait()

    def parts(self) -> set[str]:
        """What has come of saves that are not complete: folder and file."""
        found = (n.split("/")[-2:] for n in objects(self.url) if "/.step_" in n)
        return {f"{folder[:14]}/{file}" for folder, file in found}


@pytest.fixture
def two(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Two:
    monkeypatch.setattr("tuppence.checkpoint.writing.CHECK_SECONDS", 0.02)
    monkeypatch.setattr(relay, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(relay, "POLL_SECONDS", 0.02)
    return Two(tmp_path, url)


def test_both_parts_are_one_checkpoint_there_and_on_the_bucket(
    two: Two, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[tuple[Path, str]] = []

    def noting(send: Any) -> Any:
        def noted(self: Store, local: Path, name: str, digest: Any) -> None:
            sent.append((local, name))
            send(self, local, name, digest)

        return noted

    patched(monkeypatch, "send", noting)
    two.save(5)
    two.wait()
    path = two.lead.checkpoints / "step_00000005"
    checkpoint.verify(path)
    other = fresh(seed=1)
    checkpoint.load(path, other.model, other.optimizers)
    assert equal(other.tensors(), two.made.tensors())
    settled(two.mirror)
    assert steps_on(two.url) == {5}
    assert two.mirror.close(60)
    second = [local for local, name in sent if name.endswith("00002-of-00002.safetensors")]
    assert len(second) == 2  # the mirror copies them where they are
    assert all("beside" in local.parts for local in second)
    assert two.parts() == set()
    assert not [p for p in two.beside.checkpoints.rglob("*") if p.is_file()]
    brought = RunFolder(tmp_path / "again")
    assert bucket.restore(brought, two.url)
    checkpoint.verify(brought.checkpoints / "step_00000005")


def test_without_the_other_part_nothing_is_complete(two: Two) -> None:
    two.savers[0].patience = 0.2
    two.save(5, 0)
    with pytest.raises(Fault, match="the part of rank 1 did not come"):
        two.savers[0].wait()
    assert checkpoint.complete(two.lead) == []
    assert two.mirror.close(60)
    assert steps_on(two.url) == set()


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_part_that_is_damaged_on_the_way_is_no_checkpoint(
    file: str, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harming(send: Any) -> Any:
        def harmed(self: Store, local: Path, name: str, digest: Any) -> None:
            send(self, local, name, digest)
            if f"/{file}-00002" in name:
                harm_flip(self, name)

        return harmed

    patched(monkeypatch, "send", harming)
    two.save(5)
    with pytest.raises(Fault, match=rf"{file}-00002-of-00002.safetensors .* its sha256"):
        two.savers[0].wait()
    assert checkpoint.complete(two.lead) == []
    assert two.mirror.close(60)
    assert steps_on(two.url) == set()


def test_why_the_other_rank_could_not_write_is_heard(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.writing.write_part

    def full(aside: Path, images: Any, *, rank: int, world: int) -> Any:
        if rank == 1:
            aside.mkdir(parents=True)
            raise OSError(28, "No space left on device")
        return write(aside, images, rank=rank, world=world)

    monkeypatch.setattr("tuppence.checkpoint.writing.write_part", full)
    two.save(5)
    with pytest.raises(Fault, match="rank 1: No space left on device"):
        two.savers[0].wait()
    with pytest.raises(Fault, match=r"No space left .* the lead's machine has the last good one"):
        two.savers[1].wait()
    two.mirror.close(60)


def test_a_store_that_is_away_is_tried_again(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter(range(3))

    def failing(send: Any) -> Any:
        def failed(self: Store, local: Path, name: str, digest: Any) -> None:
            if "00002" in name and next(failures, None) is not None:
                raise Away("no network")
            send(self, local, name, digest)

        return failed

    patched(monkeypatch, "send", failing)
    two.save(5)
    two.wait()
    assert next(failures, None) is None
    assert [p.name for p in checkpoint.complete(two.lead)] == ["step_00000005"]
    two.mirror.close(60)


def test_a_machine_of_an_attempt_that_was_overtaken_sends_nothing(two: Two) -> None:
    two.mirror.close(60)
    store_at(two.url).write("attempt.json", b'{"attempt": 2, "token": "bbbb2222"}')
    before = objects(two.url)
    two.save(5, 1)
    with pytest.raises(Fault, match="attempt 2 has taken this run over"):
        two.savers[1].wait()
    assert objects(two.url) == before


def test_parts_of_saves_that_failed_go_and_those_under_way_stay(two: Two) -> None:
    for step in (5, 6, 7):  # the lead is behind: it does not know yet that these are saved
        two.save(step, 1)
        two.savers[1].wait()
    assert {name.partition("/")[0] for name in two.parts()} == {
        ".step_00000005",
        ".step_00000006",
        ".step_00000007",
    }
    for step in (5, 6, 7):
        two.save(step, 0)
        two.savers[0].wait()
    assert ".step_00000005" not in {name.partition("/")[0] for name in two.parts()}
    assert two.mirror.close(60)
    assert two.parts() == set()
    assert steps_on(two.url) == {6, 7}


# ---------------------------------------------------------------- what goes the other way


def marker_of(folder: RunFolder, step: int) -> str:
    return file_sha256(folder.checkpoints / checkpoint.name_of(step) / "checkpoint.json")


def test_a_checkpoint_is_waited_for_and_comes_whole(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for before its marker has been sent."""
    asked, go = threading.Event(), threading.Event()

    def holding(write: Any) -> Any:
        def held(self: Store, name: str, content: bytes) -> None:
            if name.endswith("/checkpoint.json"):
                assert go.wait(60)
            write(self, name, content)

        return held

    patched(monkeypatch, "write", holding)
    two.save(5)
    two.wait()
    name, sha256 = "step_00000005", marker_of(two.lead, 5)
    way = two.savers[1].relay
    assert way is not None
    old = two.beside.checkpoints / "step_00000001"
    old.mkdir()

    def fetch() -> None:
        asked.set()
        way.fetch(two.beside, name, sha256)

    bringing = threading.Thread(target=fetch)
    bringing.start()
    assert asked.wait(60)
    time.sleep(0.1)
    assert bringing.is_alive()
    go.set()
    bringing.join(60)
    assert not bringing.is_alive()
    checkpoint.verify(two.beside.checkpoints / name)
    assert not old.exists()
    two.mirror.close(60)


def test_another_checkpoint_of_that_name_is_not_taken(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.save(5)
    two.wait()
    settled(two.mirror)
    way = two.savers[1].relay
    assert way is not None
    monkeypatch.setattr(relay, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(Fault, match=r"step_00000005 did not come whole .*it is not there yet"):
        way.fetch(two.beside, "step_00000005", "0" * 64)
    assert checkpoint.complete(two.beside) == []
    [file] = [n for n in objects(two.url) if n.endswith("00005/model-00001-of-00002.safetensors")]
    harm_flip(store_at(two.url), file)
    with pytest.raises(Fault, match=r"did not come whole .*does not match its sha256"):
        way.fetch(two.beside, "step_00000005", marker_of(two.lead, 5))
    assert checkpoint.complete(two.beside) == []
    two.mirror.close(60)


def test_a_machine_begins_each_attempt_with_an_empty_folder(two: Two) -> None:
    (two.beside.checkpoints / "step_00000003").mkdir()
    again, _ = bucket.beside(two.url, two.identity, rank=2)  # of the same attempt: nothing goes
    assert (again.checkpoints / "step_00000003").exists()
    later = bucket.Identity(1, "cccc3333")
    again, _ = bucket.beside(two.url, later, rank=1)
    assert [*again.checkpoints.iterdir()] == []
    assert identity_of(again.read_json("attempt.json")) == later
    assert two.parts() == set()
    two.mirror.close(60)
