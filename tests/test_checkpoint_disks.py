"""Every fault of disks, clocks and kills: no loss of an older checkpoint."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoints import (
    Trained,
    by_rows,
    cut,
    equal,
    fresh,
    load_newest,
    newest_verified,
    retain,
    run_folder,
    save_on,
    savers,
    state_of,
    trained,
)
from forked import Forked

from tuppence import checkpoint
from tuppence.checkpoint import Retention, Saver
from tuppence.errors import Fault
from tuppence.folder import RunFolder

folder = pytest.fixture(run_folder)


def newest(folder: RunFolder) -> str | None:
    path = newest_verified(folder)
    return None if path is None else path.name


def contents(folder: RunFolder) -> dict[str, bytes]:
    """Every byte of every checkpoint and pointer."""
    files = (p for p in folder.checkpoints.rglob("*") if p.is_file())
    return {p.relative_to(folder.path).as_posix(): p.read_bytes() for p in files}


# ---------------------------------------------------------------- disks

CALLS = ("mkdir", "open", "write", "fsync", "replace", "unlink")


class Disk:
    """Counts the calls that change the disk below a folder, made in the saver's thread; from the
    `first` one on they fail for ever, or it alone does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first: int | None = None
        self.code, self.once, self.count = errno.ENOSPC, False, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def arm(self, first: int | None, *, code: int = errno.ENOSPC, once: bool = False) -> None:
        self.first, self.code, self.once, self.count = first, code, once, 0

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name != "saver":
                return call(*args, **kwargs)
            if call is not _open or args[1] & os.O_CREAT:
                self.count += 1
                late = self.first is not None and self.count >= self.first
                if late and (not self.once or self.count == self.first):
                    raise OSError(self.code, os.strerror(self.code))
            return call(*args, **kwargs)

        return failing


_open = os.open


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize(
    ("code", "once"), [(errno.ENOSPC, True), (errno.ENOSPC, False), (errno.EROFS, False)]
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_fails_at_any_moment(
    folder: RunFolder, disk: Disk, world: int, code: int, once: bool
) -> None:
    made, later = trained(1), trained(2)
    older = save_on(folder, made, 1, world=world)
    before = contents(folder)
    weights, moments = later.pieces()

    def save(step: int) -> list[str]:
        ranks, told = savers(folder, world, keep=Retention(1), patience=0.1), []
        for rank, saver in enumerate(ranks):
            held = cut(weights, by_rows, rank, world), cut(moments, by_rows, rank, world)
            saver.save(*held, state_of(step))
        for saver in ranks:
            try:
                saver.close()
            except Fault as fault:
                told.append(str(fault))
        return told

    disk.arm(None)
    shutil.copytree(folder.path, folder.path.with_name("copy"))
    assert save(2) == []
    calls = disk.count
    assert calls > 10
    committed = 0
    for first in range(1, calls + 1):
        shutil.rmtree(folder.path)
        shutil.copytree(folder.path.with_name("copy"), folder.path)
        folder.close()
        disk.arm(first, code=code, once=once)
        told = save(2)
        disk.arm(None)
        for line in told:
            assert line.startswith("cannot save step 2 in"), first
            assert "run the same command to continue" in line
            assert "\n" not in line
        assert any(os.strerror(code) in line for line in told) or not told
        there = checkpoint.newest(folder)
        assert there.damaged == ()
        assert told or there.path != older, first  # a leftover that stays goes with the next save
        if there.path != older:
            committed += 1
            assert there.path is not None
            assert equal(
                checkpoint.consolidated(there.path), {k: p.tensor for k, p in weights.items()}
            )
        else:
            assert {k: v for k, v in contents(folder).items() if "/." not in k} == before
        assert save(3) == []  # room again: as if nothing had been
        assert newest(folder) == "step_00000003"
        assert [p.name for p in checkpoint.complete(folder)] == ["step_00000003"]
        hidden = [p.name for p in folder.checkpoints.iterdir() if p.name.startswith(".step")]
        assert hidden == [], first
    assert 0 < committed < calls / 2


def test_a_failed_save_leaves_nothing(folder: RunFolder, disk: Disk) -> None:
    save_on(folder, trained(1), 1)
    before = contents(folder)
    saver = savers(folder, 1)[0]
    disk.arm(4, once=True)
    saver.save(*trained(2).pieces(), state_of(2))
    with pytest.raises(
        Fault, match=r"No space left on device .* the last good one is step 1: make"
    ):
        saver.wait()
    saver.check()  # it is told once
    assert contents(folder) == before
    disk.arm(4, once=True)
    saver.save(*trained(2).pieces(), state_of(2))
    saver._jobs.join()
    with pytest.raises(Fault, match="cannot save step 2"):
        saver.check()
    disk.arm(4, once=True)
    saver.save(*trained(2).pieces(), state_of(2))
    with pytest.raises(Fault, match="cannot save step 2"):
        saver.save(*trained(3).pieces(), state_of(3))
    assert contents(folder) == before
    disk.arm(1, once=True)
    saver.point("best", 1)
    with pytest.raises(Fault, match="cannot save step 1 in"):
        saver.close()
    assert contents(folder) == before
    assert newest(folder) == "step_00000001"


def test_a_step_that_cannot_be_replaced_stays(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its older save is put back when the new one cannot be renamed into its place."""
    path = save_on(folder, trained(1), 2)
    before = contents(folder)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == path and ".a1." in Path(source).name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(Fault, match=r"cannot save step 2 .* the last good one is step 2"):
        save_on(folder, trained(3), 2)
    assert contents(folder) == before


@pytest.mark.root
def test_a_small_disk_that_fills(small_disk: Callable[[int], Path]) -> None:
    """Saves of a third of it: each that does not fit says so, and the last good one stays."""
    made = fresh(vocab=1900, width=16)  # about 360 kB with both moments
    disk = small_disk(1)
    folder = RunFolder(disk / "run")
    folder.path.mkdir()
    saver = savers(folder, 1, keep=Retention(4))[0]
    for step in range(1, 6):
        made.step(step)
        saver.save(*made.pieces(), state_of(step))
        saver.wait()  # older ones go before, where they are in the way
    assert newest(folder) == "step_00000005"
    retain(folder, keep_last=1)
    room = os.statvfs(disk)  # is taken by what is not for retention to delete
    (disk / "ballast").write_bytes(b"\0" * (room.f_bavail * room.f_bsize - 200_000))
    good = fresh(vocab=1900, width=16)
    for step in (6, 7):
        made.step(step)
        saver.save(*made.pieces(), state_of(step))
        with pytest.raises(
            Fault, match=r"No space left on device \(\d MiB free\); the last good one"
        ):
            saver.wait()
        assert load_newest(folder, good.model, good.optimizers) == state_of(5)
        assert not [p for p in folder.checkpoints.iterdir() if p.name.startswith(".")]
    (disk / "ballast").unlink()
    saver.save(*made.pieces(), state_of(7))
    saver.close()
    assert newest(folder) == "step_00000007"
    folder.close()


@pytest.mark.root
def test_a_read_only_disk(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1)
    folder, made = RunFolder(disk / "run"), trained()
    folder.path.mkdir()
    save_on(folder, made, 1)
    saver = savers(folder, 1)[0]
    before = contents(folder)
    folder.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        saver.save(*made.pieces(), state_of(2))
        with pytest.raises(Fault, match=r"cannot save step 2 .* Read-only file system .* step 1"):
            saver.wait()
        other = fresh(seed=1)
        checkpoint.load(checkpoint.choose(folder, "last"), other.model, other.optimizers)
        assert equal(other.tensors(), made.tensors())
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert contents(folder) == before
    saver.save(*made.pieces(), state_of(2))
    saver.close()
    folder.close()


# ---------------------------------------------------------------- clocks


def test_a_clock_that_steps_back(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two years between two saves, the wrong way round: what is newest is not a matter of time."""
    now = [1.8e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    made = trained()
    for attempt, step in ((1, 1), (1, 2), (2, 3), (2, 4)):
        saver = savers(folder, 1, attempt=attempt, keep=Retention(2))[0]
        made.step(step)
        saver.save(*made.pieces(), state_of(step, saved_at=now[0]))
        saver.close()
        path = folder.checkpoints / f"step_{step:08d}"
        for file in (path, *path.iterdir()):
            os.utime(file, (now[0], now[0]))
        now[0] -= 3.15e7
    assert [p.name[-1] for p in checkpoint.complete(folder)] == ["3", "4"]
    other = fresh(seed=1)
    state = load_newest(folder, other.model, other.optimizers)
    assert state is not None
    assert state.step == 4
    assert equal(other.tensors(), made.tensors())


# ---------------------------------------------------------------- kills


def kill_again_and_again(path: Path, world: int, kills: int) -> None:
    """Whatever a kill hits, the newest that is found is whole, and no older than the one before."""
    folder, made, chance = RunFolder(path), trained(), random.Random(world)
    made.model.wte.weight.data[0, 0] = 0.0
    newest = 0
    for attempt in range(1, kills + 1):
        child = os.fork()  # nothing has started a thread here
        if not child:
            save_without_end(savers(folder, world, attempt=attempt, **KEPT), made, newest + 1)
        time.sleep(chance.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        there = checkpoint.newest(RunFolder(folder.path))
        assert not there.damaged, there
        if there.path is None:
            assert newest == 0, "the checkpoints of before are gone"
            continue
        state = checkpoint.state_of(there.path)
        assert state.step >= newest, (state.step, newest)
        assert checkpoint.consolidated(there.path)["wte.weight"][0, 0] == state.step
        checkpoint.mend_pointers(folder, there.path, state)
        newest = state.step
        print(newest, flush=True)


KEPT = {"keep": Retention(2, keep_every=7)}


def save_without_end(ranks: list[Saver], made: Trained, first: int) -> NoReturn:
    for step in itertools.count(first):
        made.model.wte.weight.data[0, 0] = float(step)
        for rank, saver in enumerate(ranks):
            saver.save(*(cut(p, by_rows, rank, len(ranks)) for p in made.pieces()), state_of(step))
            saver.point("best", step)
    raise AssertionError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_there_is_always_a_whole_one(tmp_path: Path, world: int) -> None:
    (tmp_path / "run").mkdir()
    process = Forked(kill_again_and_again, tmp_path / "run", world, 14)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    newest = [int(line) for line in out.split()]
    assert len(set(newest)) >= 3, newest  # saves came through between the kills


MOMENTS = [
    *("write_part", "tell", "gather", "seal", "commit", "_write_state"),
    *("flush_folder", "write_text"),
]


@pytest.mark.parametrize("where", MOMENTS)
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_each_part_of_a_save(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, where: str, after: bool
) -> None:
    """The thread ends there, as its process would; the next attempt finds what was committed."""
    made, later = trained(1), trained(2)
    save_on(folder, made, 1, world=2)
    call = getattr(checkpoint.writing, where)
    dead = threading.Event()

    def killed(*args: Any, **kwargs: Any) -> Any:
        if after:
            call(*args, **kwargs)
        dead.set()
        threading.Event().wait()  # for ever: nothing after it happens

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.writing, where, killed)
        for rank, saver in enumerate(savers(folder, 2, attempt=2)):
            saver.save(*(cut(p, by_rows, rank, 2) for p in later.pieces()), state_of(2))
        assert dead.wait(60)
        time.sleep(0.1)  # the other rank goes as far as it can
    there = checkpoint.newest(folder)
    assert there.damaged == ()
    assert there.path is not None
    committed = there.path.name == "step_00000002"
    assert committed == (after and where in ("commit", "tell"))  # rank 1's last word was enough
    state = checkpoint.state_of(there.path)
    checkpoint.mend_pointers(folder, there.path, state)
    other = fresh(seed=1)
    checkpoint.load(checkpoint.choose(folder, "last"), other.model, other.optimizers)
    assert equal(other.tensors(), (later if committed else made).tensors())
    saver = savers(folder, 1, attempt=3)[0]
    saver.save(*later.pieces(), state_of(2))
    saver.close()
    assert newest(folder) == "step_00000002"
    assert not [p.name for p in folder.checkpoints.iterdir() if p.name.startswith(".")]
