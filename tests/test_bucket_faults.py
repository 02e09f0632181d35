"""Damaged objects, writers that should be dead, who is ahead."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bucket_runs import (
    begun,
    codes,
    harm_delete,
    harm_empty,
    harm_flip,
    harm_truncate,
    mirrored,
    objects,
    same_bytes,
    save,
    settled,
    store_at,
)

from tuppence import bucket, checkpoint, store
from tuppence.bucket import layout
from tuppence.errors import Fault, Overtaken, UserError
from tuppence.folder import RunFolder

pytest.importorskip("fsspec")
pytest_plugins = ["bucket_places"]
pytestmark = pytest.mark.usefixtures("quick", "closed")


# ---------------------------------------------------------------- damaged on the bucket


@pytest.mark.parametrize("file", [*("model", "optimizer"), "state.json", "checkpoint.json"])
@pytest.mark.parametrize("harm", [harm_truncate, harm_flip, harm_empty, harm_delete])
def test_a_damaged_object_is_passed_over_loudly(
    memory: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    harm: Callable[[store.Store, str], None],
) -> None:
    folder = begun(tmp_path / "x")
    good = save(folder, 10, best=True)
    save(folder, 20)
    mirrored(folder, memory)
    name = next(n for n in objects(memory) if "step_00000020/" + file in n)
    harm(store_at(memory), name)
    there = RunFolder(tmp_path / "there")
    assert bucket.restore(there, memory)
    assert [p.name for p in checkpoint.complete(there)] == [good.name]
    assert same_bytes(good, there.checkpoints / good.name)
    assert not list(there.checkpoints.glob(".*"))
    assert there.read_json("checkpoints/last.json")["step"] == 10
    unmarked = file == "checkpoint.json" and harm is harm_delete  # it was never complete
    told = "is damaged and passed over" in capsys.readouterr().err
    assert told is not unmarked
    assert codes(there).count("checkpoint_damaged") == (0 if unmarked else 1)
    there.close()


def test_all_damaged_is_a_fault(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    mirrored(folder, memory)
    harm_flip(store_at(memory), "a00001-aaaa1111/checkpoints/step_00000010/model.safetensors")
    with pytest.raises(Fault, match="all 1 checkpoints on"):
        bucket.restore(there := RunFolder(tmp_path / "there"), memory)
    there.close()


def test_a_marker_cannot_name_files_elsewhere() -> None:
    entry = {"sha256": "0", "bytes": 1}
    with pytest.raises(layout.Damaged):
        layout.entries(json.dumps({"files": {"../../run.json": entry}}).encode())


def test_a_restore_that_was_cut_is_finished_by_the_next(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10, best=True)
    last = save(folder, 20)
    mirrored(folder, memory)
    there, kept_fetch = RunFolder(tmp_path / "there"), store.Store.fetch
    total: list[str] = []

    def cut_at(count: int) -> Callable[..., None]:
        def fetch(self: store.Store, name: str, local: Path) -> None:
            total.append(name)
            if len(total) > count:
                raise store.Away("the network is away")
            kept_fetch(self, name, local)

        return fetch

    for count in range(0, 20):
        total.clear()
        monkeypatch.setattr(store.Store, "fetch", cut_at(count))
        with contextlib.suppress(UserError):
            assert bucket.restore(there, memory)
            break
        complete = checkpoint.complete(there)
        assert all(same_bytes(path, folder.checkpoints / path.name) for path in complete)
    assert count > 5
    assert same_bytes(last, there.checkpoints / last.name)
    assert not list(there.checkpoints.glob(".*"))


# ---------------------------------------------------------------- two writers


def test_a_late_writer_stops_and_spoils_nothing(url: str, tmp_path: Path) -> None:
    old = begun(tmp_path / "old/x")
    save(old, 10)
    zombie = bucket.Mirror(old, url)
    settled(zombie)
    new = RunFolder(tmp_path / "new/x")
    bucket.restore(new, url)
    begun(new.path, attempt=2, token="bbbb2222")
    save(new, 20, attempt=2)
    mirrored(new, url)
    before = {name: store_at(url).read(name) for name in objects(url)}
    zombie.checkpoint(save(old, 20))
    assert not zombie.close(60)
    with pytest.raises(Overtaken, match="attempt 2 has taken this run over"):
        zombie.check()
    assert {name: store_at(url).read(name) for name in objects(url)} == before


def test_a_late_writer_that_no_look_stops_spoils_nothing_either(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept between its look at attempt.json and its writes: as if it never looked."""
    old = begun(tmp_path / "old/x")
    save(old, 10)
    zombie = bucket.Mirror(old, memory)
    settled(zombie)
    for part in (zombie, zombie._documents):
        monkeypatch.setattr(part, "fence", lambda: None)
    new = RunFolder(tmp_path / "new/x")
    bucket.restore(new, memory)
    begun(new.path, attempt=2, token="bbbb2222")
    mine = save(new, 20, attempt=2)
    mirrored(new, memory)
    start = "a00002-bbbb2222"
    before = {n: store_at(memory).read(n) for n in objects(memory) if n.startswith(start)}
    shutil.rmtree(old.checkpoints / "step_00000010")
    zombie.checkpoint(save(old, 20))
    zombie.checkpoint(save(old, 9990))
    assert zombie.close(60)
    after = {n: store_at(memory).read(n) for n in objects(memory) if n.startswith(start)}
    assert after == before
    there = RunFolder(tmp_path / "there")
    bucket.restore(there, memory)
    assert same_bytes(mine, checkpoint.choose(there, "last"))


@pytest.mark.parametrize("sent", range(5))
def test_an_attempt_cut_off_in_its_first_documents_overtakes_nothing(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    first = begun(tmp_path / "a/x")
    save(first, 10)
    mirrored(first, memory)
    second = RunFolder(tmp_path / "b/x")
    bucket.restore(second, memory)
    begun(second.path, attempt=2, token="bbbb2222")
    real = store.Store.write

    def cut_off(self: store.Store, name: str, content: bytes) -> None:
        if sum(name.startswith("a00002") for name in objects(memory)) >= sent:
            raise store.Away("the network is away")
        real(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write", cut_off)
        made = bucket.Mirror(second, memory)
        assert not made.close(0.05)
        made._thread.join()
    third = RunFolder(tmp_path / "c/x")
    assert bucket.restore(third, memory)
    for name in ("run.json", "plan.json", "metrics.jsonl", "tokenizer/tokenizer.json"):
        assert third.file(name).read_bytes() == first.file(name).read_bytes()
    assert checkpoint.choose(third, "last").name == "step_00000010"
    assert bucket.attempts_begun(third) == 2


def test_of_two_that_took_one_number_the_later_goes_on(memory: str, tmp_path: Path) -> None:
    first, second = begun(tmp_path / "1/x"), begun(tmp_path / "2/x", token="bbbb2222")
    made = bucket.Mirror(first, memory)
    settled(made)
    store_at(memory).delete("attempt.json")  # as if both had looked before either wrote
    mirrored(second, memory)
    made.checkpoint(save(first, 10))
    assert not made.close(60)
    with pytest.raises(Overtaken, match="attempt 1 has taken this run over"):
        made.check()
    with pytest.raises(Overtaken, match="attempt 1 has taken this run over"):
        bucket.Mirror(first, memory)


def test_an_older_claim_that_came_late_does_not_stop_the_newer(memory: str, tmp_path: Path) -> None:
    new = begun(tmp_path / "2/x", attempt=2, token="bbbb2222")
    made = bucket.Mirror(new, memory)
    settled(made)
    store_at(memory).write("attempt.json", b'{"attempt": 1, "token": "aaaa1111"}')
    made.checkpoint(save(new, 10, attempt=2))
    assert made.close(60)
    assert json.loads(store_at(memory).read("attempt.json") or b"")["attempt"] == 2


# ---------------------------------------------------------------- which is ahead


def test_a_folder_that_is_ahead_stays_as_it_is(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    mirrored(folder, memory)
    save(folder, 20)  # killed before it was sent
    folder.close()
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    assert not bucket.restore(folder, memory)
    after = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    assert {p: c for p, c in after.items() if p.name != "bucket.json"} == before


def test_a_folder_that_was_overtaken_is_kept_aside(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path / "a/x")
    save(folder, 10)
    mirrored(folder, memory)
    other = RunFolder(tmp_path / "b/x")
    bucket.restore(other, memory)
    begun(other.path, attempt=2, token="bbbb2222")
    save(other, 20, attempt=2)
    mirrored(other, memory)
    ahead = save(folder, 9990)  # trained on with no network
    content = (ahead / "model.safetensors").read_bytes()
    assert bucket.restore(folder, memory)
    assert checkpoint.choose(folder, "last").name == "step_00000020"
    kept = tmp_path / "a/x.1/checkpoints" / ahead.name
    assert (kept / "model.safetensors").read_bytes() == content
    assert "is kept as" in capsys.readouterr().err
    assert bucket.attempts_begun(folder) == 2


def test_a_claim_that_sent_nothing_overtakes_nothing(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    mirrored(folder, memory)
    store_at(memory).write("attempt.json", b'{"attempt": 7, "token": "dead0000"}')
    assert not bucket.restore(folder, memory)
    assert bucket.attempts_begun(folder) == 7
    with pytest.raises(Overtaken, match="attempt 7 has taken"):
        bucket.Mirror(folder, memory)
    begun(folder.path, attempt=8, token="eeee8888")
    mirrored(folder, memory)


def test_a_checkpoint_that_was_lost_here_comes_back(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    last = save(folder, 20)
    mirrored(folder, memory)
    shutil.rmtree(last)
    assert bucket.restore(folder, memory)
    assert last.exists()
    assert folder.read_json("checkpoints/last.json")["step"] == 20


def test_checkpoints_go_by_attempt_and_then_by_step(memory: str, tmp_path: Path) -> None:
    """One that passed over a damaged step went on from an older one: its own are the newer."""
    folder = begun(tmp_path / "x", attempt=2)
    save(folder, 9990, attempt=1)
    mine = save(folder, 600, attempt=2)
    mirrored(folder, memory)
    there = RunFolder(tmp_path / "there")
    bucket.restore(there, memory)
    assert [p.name for p in checkpoint.complete(there)] == [mine.name]
