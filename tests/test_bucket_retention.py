"""What stays on a bucket, and what goes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bucket_runs import (
    begun,
    codes,
    mirrored,
    objects,
    patched,
    same_bytes,
    save,
    settled,
    steps_on,
)

from tuppence import bucket, checkpoint, store
from tuppence.bucket import layout
from tuppence.folder import RunFolder

pytest.importorskip("fsspec")
pytest_plugins = ["bucket_places"]
pytestmark = pytest.mark.usefixtures("quick", "closed")


# ---------------------------------------------------------------- retention


def test_what_is_deleted_here_goes_once_the_newer_is_there(url: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, url)
    for step in (10, 20, 30):
        made.checkpoint(save(folder, step, best=step == 10))
    settled(made)
    assert steps_on(url) == {10, 20, 30}
    shutil.rmtree(folder.checkpoints / "step_00000020")
    made.checkpoint(save(folder, 40))
    assert made.close(60)
    assert steps_on(url) == {10, 30, 40}
    assert not [n for n in objects(url) if "step_00000020" in n]


def test_nothing_goes_before_the_newer_is_there(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    mirrored(folder, memory)
    begun(folder.path, attempt=2, token="bbbb2222")
    shutil.rmtree(folder.checkpoints / "step_00000010")
    save(folder, 20, attempt=2)

    def away(self: store.Store, local: Path, name: str, digest: store.Digest) -> None:
        raise store.Away("the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "send", away)
        made = bucket.Mirror(folder, memory)
        assert not made.close(0.2)
        made._thread.join()
    assert steps_on(memory) == {10}
    begun(folder.path, attempt=3, token="cccc3333")
    mirrored(folder, memory)
    assert steps_on(memory) == {20}
    assert {n.split("/")[0] for n in objects(memory)} == {"attempt.json", "a00003-cccc3333"}


def test_an_earlier_attempts_best_stays_until_it_is_there_again(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(tmp_path / "a/x")
    save(first, 10, best=True)
    save(first, 20)
    mirrored(first, memory)
    second = RunFolder(tmp_path / "b/x")
    bucket.restore(second, memory)
    begun(second.path, attempt=2, token="bbbb2222")
    save(second, 30, attempt=2)
    holds = store.Store.holds

    def away(self: store.Store, name: str, digest: store.Digest) -> bool:
        if "step_00000010" in name:
            raise store.Away("the network is away")
        return holds(self, name, digest)

    monkeypatch.setattr(store.Store, "holds", away)
    made = bucket.Mirror(second, memory)
    while 30 not in steps_on(memory):
        made.check()
    assert not made.close(0.2)
    made._thread.join()
    assert steps_on(memory) == {10, 20, 30}


def test_where_the_newest_here_is_damaged_nothing_goes(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, memory)
    for step in (10, 20):
        made.checkpoint(save(folder, step))
    settled(made)
    shutil.rmtree(folder.checkpoints / "step_00000020")
    bad = save(folder, 30)
    (bad / "state.json").write_text("")
    made.checkpoint(bad)
    assert made.close(60)
    assert steps_on(memory) == {10, 20}


def test_the_only_good_copy_stays_on_the_bucket(memory: str, tmp_path: Path) -> None:
    first = begun(tmp_path / "a/x")
    best = save(first, 10, best=True)
    save(first, 20)
    mirrored(first, memory)
    second = RunFolder(tmp_path / "b/x")
    bucket.restore(second, memory)
    (second.checkpoints / best.name / "state.json").write_text("")
    begun(second.path, attempt=2, token="bbbb2222")
    save(second, 30, attempt=2)
    mirrored(second, memory)
    found = bucket.fetched(memory)
    assert same_bytes(best, checkpoint.choose(found, "best"))


def test_what_is_deleted_here_while_it_is_sent_arrives(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    saved = save(folder, 10)
    shutil.copytree(saved, tmp_path / "copy")

    def deleting(send: Callable[..., None]) -> Callable[..., None]:
        def sent(self: store.Store, local: Path, *rest: Any) -> None:
            shutil.rmtree(saved, ignore_errors=True)
            send(self, local, *rest)

        return sent

    patched(monkeypatch, "send", deleting)
    mirrored(folder, url)
    assert steps_on(url) == {10}
    there = RunFolder(tmp_path / "there")
    bucket.restore(there, url)
    assert same_bytes(tmp_path / "copy", there.checkpoints / saved.name)
    assert list(folder.file(".bucket").iterdir()) == []


def test_where_saves_are_faster_than_sends_the_bucket_keeps_up_and_small(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every file that is sent there is a new save, and the folder keeps two and the best."""
    first = begun(tmp_path / "a/x")
    save(first, 10)
    mirrored(first, memory)
    folder = RunFolder(tmp_path / "b/x")
    bucket.restore(folder, memory)
    begun(folder.path, attempt=2, token="bbbb2222")
    seen, steps = [], iter(range(20, 80))

    def saving(send: Callable[..., None]) -> Callable[..., None]:
        def sent(self: store.Store, *words: Any) -> None:
            if step := next(steps, None):
                save(folder, step, attempt=2, best=step == 30)
                for path in layout.local_checkpoints(folder)[2:]:
                    if step < 30 or path.name != "step_00000030":
                        shutil.rmtree(path)
                seen.append((step, steps_on(memory), {n.split("/")[0] for n in objects(memory)}))
            send(self, *words)

        return sent

    patched(monkeypatch, "send", saving)
    save(folder, 11, attempt=2)
    mirrored(folder, memory)
    step, complete, owners = seen[-1]
    assert step == 79
    assert 30 in complete
    assert max(complete) > 70
    assert all(len(there) <= 5 for _, there, _ in seen)
    assert owners == {"attempt.json", "a00002-bbbb2222"}
    assert steps_on(memory) == {30, 78, 79}


def test_milestones_that_did_not_come_stay_on_the_bucket(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the run did not keep does not, though it was killed before it could delete it."""
    folder = begun(tmp_path / "a/x")
    for step in (10, 20, 30, 40):
        save(folder, step)
    made = bucket.Mirror(folder, memory)
    settled(made)

    def away(self: store.Store, name: str) -> None:
        raise store.Away("the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "delete", away)
        shutil.rmtree(folder.checkpoints / "step_00000020")
        assert not made.close(0.2)
        made._thread.join()
    assert steps_on(memory) == {10, 20, 30, 40}
    folder.close()
    for attempt, place in ((2, "b/x"), (3, "c/x")):
        there = RunFolder(tmp_path / place)
        bucket.restore(there, memory)
        assert "checkpoint_damaged" not in codes(there)
        begun(there.path, attempt=attempt, token=f"{attempt}" * 8)
        save(there, 50 + attempt, attempt=attempt)
        mirrored(there, memory)
    assert {10, 30} <= steps_on(memory)
    assert 20 not in steps_on(memory)
    found = bucket.fetched(memory, "10")
    assert same_bytes(folder.checkpoints / "step_00000010", checkpoint.choose(found, "10"))


def test_what_was_left_and_is_no_milestone_goes_with_the_second_newer(
    memory: str, tmp_path: Path
) -> None:
    first = begun(tmp_path / "a/x")
    for step in (10, 15, 20):
        save(first, step)
    mirrored(first, memory)
    second = RunFolder(tmp_path / "b/x")
    bucket.restore(second, memory)
    begun(second.path, attempt=2, token="bbbb2222")
    made = bucket.Mirror(second, memory, is_milestone=lambda path: path.name.endswith("10"))
    settled(made)
    assert steps_on(memory) == {10, 15, 20}
    made.checkpoint(save(second, 30, attempt=2))
    assert made.close(60)
    assert steps_on(memory) == {10, 20, 30}


def test_a_step_that_was_reached_again_replaces_the_old(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rewind the same attempt saves a step anew; between the two it is not complete."""
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, memory)
    made.checkpoint(save(folder, 10))
    settled(made)
    again, complete = save(folder, 10, attempt=1, large=4000), []
    patched(
        monkeypatch,
        "send",
        lambda send: lambda *words: (complete.append(steps_on(memory)), send(*words)),
    )
    made.checkpoint(again)
    assert made.close(60)
    there = RunFolder(tmp_path / "there")
    bucket.restore(there, memory)
    assert same_bytes(again, there.checkpoints / again.name)
    assert complete == [set()] * 3
