"""Which checkpoints stay, and which make room for newer ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import (
    Held,
    codes,
    names,
    newest_verified,
    retain,
    run_folder,
    saved_twice,
    savers,
    state_of,
    steps,
    trained,
)
from families import on_one_thread

from tuppence import checkpoint
from tuppence.checkpoint import Retention, retention, writing
from tuppence.folder import RunFolder

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)
folder = pytest.fixture(run_folder)
saved = pytest.fixture(saved_twice)


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_few_and_the_best_are_kept(folder: RunFolder, keep_last: int) -> None:
    made = trained()
    for step in (10, 20, 30, 40, 50):
        pointer = made.save(folder, step)
        if step == 20:
            checkpoint.point(folder, "best", pointer)
        retain(folder, keep_last=keep_last)
    last = [50, 40, 30][:keep_last]
    assert steps(folder) == sorted({20, *last})
    for path in checkpoint.complete(folder):
        checkpoint.verify(path)


def saves(folder: RunFolder, numbers: range, keep: Retention, best: int | None = None) -> None:
    saver = savers(folder, 1, keep=keep)[0]
    for step in numbers:
        saver.save(*trained(1).pieces(), state_of(step))
        if step == best:
            saver.point("best", step)
    saver.close()


def one_size(folder: RunFolder) -> int:
    """The bytes of the largest checkpoint: numbers in state.json have more or fewer digits."""
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in checkpoint.complete(folder)]
    assert max(sizes) - min(sizes) < 100
    return max(sizes)


def test_milestones_stay(folder: RunFolder) -> None:
    saves(folder, range(1, 15), Retention(2, keep_every=5), best=3)
    assert steps(folder) == [3, 5, 10, 13, 14]
    assert names(folder) == ["best.json", "last.json", *(f"step_{s:08d}" for s in steps(folder))]
    assert set(codes(folder)) == {"save"}


def test_over_the_limit_milestones_go_first_then_the_older(folder: RunFolder) -> None:
    saves(folder, range(1, 15), Retention(3, keep_every=4), best=3)
    assert steps(folder) == [3, 4, 8, 12, 13, 14]
    size = one_size(folder)
    kept = []
    for room in (6, 5, 4, 3, 2, 1, 0):
        retention.enforce(folder, Retention(3, keep_every=4, max_bytes=room * size))
        kept.append(steps(folder))
    assert kept == [
        [3, 4, 8, 12, 13, 14],
        [3, 8, 12, 13, 14],
        [3, 12, 13, 14],
        [3, 13, 14],
        [3, 14],  # last and best stay whatever is asked
        [3, 14],
        [3, 14],
    ]
    events = [(e["code"], e.get("step")) for e in folder.rows("events") if e["code"] != "save"]
    gone = [("milestone_deleted", step) for step in (4, 8, 12)]
    assert events == [*gone, ("over_disk_limit", None), ("over_disk_limit", None)]


def test_room_is_made_before_a_save(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    saves(folder, range(1, 5), Retention(9))
    size = one_size(folder)
    held = Held(monkeypatch, writing, "write_part")
    saver = savers(folder, 1, keep=Retention(9, max_bytes=3 * size + size // 2))[0]
    saver.save(*trained(1).pieces(), state_of(5))
    assert held.reached.wait(60)
    assert steps(folder) == [3, 4]  # and 5 is still to come
    held.go.set()
    saver.wait()
    assert steps(folder) == [3, 4, 5]
    free = [0]  # a disk that is full until all that may go has gone
    monkeypatch.setattr(retention, "_free", lambda folder: free[0])
    saver.save(*trained(1).pieces(), state_of(6))
    saver.close()
    assert steps(folder) == [5, 6]  # never the last good one


def test_going_back_leaves_nothing_later(folder: RunFolder) -> None:
    saves(folder, range(1, 6), Retention(9), best=4)
    checkpoint.drop_later(folder, 3)
    assert steps(folder) == [1, 2, 3]
    assert names(folder) == [f"step_0000000{step}" for step in (1, 2, 3)]  # no pointers
    assert newest_verified(folder) == folder.checkpoints / "step_00000003"


def test_deleting_is_done_by_name_first(saved: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill inside leaves no damaged checkpoint for a later attempt to complain of."""

    class Killed(BaseException):
        pass

    def kill(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(retention.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            retain(saved, keep_last=1)
    assert checkpoint.newest(saved).damaged == ()
    assert steps(saved) == [2]
    retain(saved, keep_last=1)
    assert names(saved) == ["last.json", "step_00000002"]
