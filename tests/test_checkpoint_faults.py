"""Every fault of bytes, disks, clocks and kills: no silent load, no loss of an older checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import by_rows, cut, equal, fresh, save_on, savers, state_of, trained

from tuppence import checkpoint
from tuppence.checkpoint import Retention
from tuppence.errors import Fault
from tuppence.folder import RunFolder

ONE = ("model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json")
TWO = tuple(
    f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)
)
EACH_FILE = [(1, name) for name in ONE] + [(2, name) for name in (*TWO, *ONE[2:])]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    yield made
    made.close()


def newest(folder: RunFolder) -> str | None:
    path = checkpoint.newest_verified(folder)
    return None if path is None else path.name


def contents(folder: RunFolder) -> dict[str, bytes]:
    """Every byte of every checkpoint and pointer."""
    files = (p for p in folder.checkpoints.rglob("*") if p.is_file())
    return {p.relative_to(folder.path).as_posix(): p.read_bytes() for p in files}


# ---------------------------------------------------------------- bytes

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 2),
    "half written": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "a byte longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "of zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "of noise": lambda file: file.write_bytes(random.Random(0).randbytes(file.stat().st_size)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "half old, half zeros": lambda file: file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2] + bytes(-(-file.stat().st_size // 2))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("world", "name"), EACH_FILE)
def test_a_damaged_file_is_passed_over_loudly(
    folder: RunFolder, world: int, name: str, damage: str
) -> None:
    good, made = trained(1), trained(2)
    older = save_on(folder, good, 1, world=world)
    before = {p.name: p.read_bytes() for p in older.iterdir()}
    path = save_on(folder, made, 2, world=world)
    DAMAGES[damage](path / name)
    other = fresh(seed=1)
    untouched = other.tensors()
    with pytest.raises(Fault, match="step_00000002 is damaged: ") as fault:
        checkpoint.load(path, other.model, other.optimizers)
    assert name in str(fault.value)
    assert "\n" not in str(fault.value)
    assert equal(other.tensors(), untouched)
    found = checkpoint.newest(folder)
    assert found.path == older
    assert [name in line for line in found.damaged] == [True]
    told = [(e["code"], e["path"]) for e in folder.rows("events") if e["code"] != "save"]
    assert told == [("checkpoint_damaged", path.name)]
    assert checkpoint.load_newest(folder, other.model, other.optimizers) == state_of(1)
    assert equal(other.tensors(), good.tensors())
    assert {p.name: p.read_bytes() for p in older.iterdir()} == before
    # and it is saved again in place of the damaged one
    assert save_on(folder, made, 2, world=world) == path
    checkpoint.verify(path)


@pytest.mark.parametrize(("world", "name"), EACH_FILE)
def test_any_flipped_bit_is_found(folder: RunFolder, world: int, name: str) -> None:
    path = save_on(folder, trained(), 2, world=world)
    whole = (path / name).read_bytes()
    right = checkpoint.manifest(path)
    passed = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(damaged)
        try:
            checkpoint.verify(path)
        except Fault as fault:
            assert name in str(fault) or name == "checkpoint.json"  # noqa: PT017
            continue
        passed += 1  # the number of the attempt, which is no part of what is loaded
        assert name == "checkpoint.json"
        assert checkpoint.manifest(path).files == right.files
    assert passed <= 7


HASH = {"sha256": "0" * 64, "bytes": 1}
FILES = dict.fromkeys(ONE[:3], HASH)
SHARDS = dict.fromkeys([*TWO, "state.json"], HASH)


@pytest.mark.parametrize(
    "found",
    [
        b"",
        b"\xff",
        [],
        {"version": 2, "attempt": 1, "files": {}},
        {"version": 2, "files": FILES},
        {"version": 2, "attempt": 1, "files": FILES, "more": 1},
        {"version": 1, "sha256": dict.fromkeys(ONE[:3], "0" * 64)},
        {"version": 3, "attempt": 1, "files": FILES},
        {"version": 2, "attempt": 1, "files": {**FILES, "../run.json": HASH}},
        {"version": 2, "attempt": 1, "files": {k: FILES[k] for k in ONE[1:3]}},
        {"version": 2, "attempt": 1, "files": {k: SHARDS[k] for k in [*TWO[:3], "state.json"]}},
        {"version": 2, "attempt": 1, "files": {k: SHARDS[k] for k in [*TWO[1:], "state.json"]}},
        {"version": 2, "attempt": 1, "files": {**FILES, **SHARDS}},
        {"version": 2, "attempt": 1, "files": {**FILES, "state.json": {"bytes": 1}}},
    ],
    ids=range(14),
)
def test_a_manifest_that_does_not_say_what_is_there(folder: RunFolder, found: Any) -> None:
    path = save_on(folder, trained(), 2)
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    (path / "checkpoint.json").write_bytes(text)
    with pytest.raises(Fault, match=r"step_00000002 is damaged: checkpoint\.json"):
        checkpoint.verify(path)


def test_a_header_is_not_believed(folder: RunFolder) -> None:
    """Files that match their hashes and yet are no tensors: `read` does not fill in nonsense."""
    path = save_on(folder, trained(), 2, world=2)
    file = path / TWO[1]
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    parts = json.loads(header["__metadata__"]["pieces"])

    def refused(entry: dict[str, Any], part: Any = None) -> str:
        told = {**parts, **({"wte.weight": part} if part is not None else {})}
        changed = {**header, "__metadata__": {"pieces": json.dumps(told)}}
        changed["wte.weight"] = header["wte.weight"] | entry
        text = json.dumps(changed).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        with pytest.raises(Fault) as fault:
            checkpoint.consolidated(path)
        return str(fault.value)

    begin, end = header["wte.weight"]["data_offsets"]
    assert "lie within" in refused({"data_offsets": [begin, end + 4]})
    assert "lie within" in refused({"data_offsets": [begin + 10**6, end + 10**6]})
    assert "lie within" in refused({"shape": [6, 6]})
    assert "damaged" in refused({"dtype": "F99"})
    assert "disagree on wte.weight" in refused({"dtype": "I32"})
    assert "disagree on wte.weight" in refused({}, {"start": 36, "shape": [12, 6]})
    assert "outside" in refused({}, {"start": 37, "shape": [11, 6]})
    assert "outside" in refused({}, {"start": -1, "shape": [11, 6]})
    assert "metadata" in refused({}, {"start": 36})
    assert "metadata" in refused({}, 5)
    assert "no file holds wte.weight" in refused({}, {"start": 30, "shape": [11, 6]})
    file.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(Fault, match="cut short"):
        checkpoint.consolidated(path)


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.root
def test_a_small_disk_that_fills(small_disk: Path) -> None:
    """Saves of a third of it: each that does not fit says so, and the last good one stays."""
    made = fresh(vocab=1900, width=16)  # about 360 kB with both moments
    folder = RunFolder(small_disk / "run")
    folder.path.mkdir()
    saver = savers(folder, 1, keep=Retention(4))[0]
    for step in range(1, 6):
        made.step(step)
        saver.save(*made.pieces(), state_of(step))
        saver.wait()  # older ones go before, where they are in the way
    assert newest(folder) == "step_00000005"
    checkpoint.retain(folder, keep_last=1)
    room = os.statvfs(small_disk)  # is taken by what is not for retention to delete
    (small_disk / "ballast").write_bytes(b"\0" * (room.f_bavail * room.f_bsize - 200_000))
    good = fresh(vocab=1900, width=16)
    for step in (6, 7):
        made.step(step)
        saver.save(*made.pieces(), state_of(step))
        with pytest.raises(
            Fault, match=r"No space left on device \(\d MiB free\); the last good one"
        ):
            saver.wait()
        assert checkpoint.load_newest(folder, good.model, good.optimizers) == state_of(5)
        assert not [p for p in folder.checkpoints.iterdir() if p.name.startswith(".")]
    (small_disk / "ballast").unlink()
    saver.save(*made.pieces(), state_of(7))
    saver.close()
    assert newest(folder) == "step_00000007"
    folder.close()


@pytest.mark.root
def test_a_read_only_disk(small_disk: Path) -> None:
    folder, made = RunFolder(small_disk / "run"), trained()
    folder.path.mkdir()
    save_on(folder, made, 1)
    saver = savers(folder, 1)[0]
    before = contents(folder)
    folder.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        saver.save(*made.pieces(), state_of(2))
        with pytest.raises(Fault, match=r"cannot save step 2 .* Read-only file system .* step 1"):
            saver.wait()
        other = fresh(seed=1)
        checkpoint.load(checkpoint.choose(folder, "last"), other.model, other.optimizers)
        assert equal(other.tensors(), made.tensors())
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
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
    state = checkpoint.load_newest(folder, other.model, other.optimizers)
    assert state is not None
    assert state.step == 4
    assert equal(other.tensors(), made.tensors())


# ---------------------------------------------------------------- kills

VICTIM = """
import os, random, signal, sys, time
from pathlib import Path
from checkpoints import by_rows, cut, savers, state_of, trained
from tuppence import checkpoint
from tuppence.checkpoint import Retention
from tuppence.folder import RunFolder

folder, world, kills = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
made, chance = trained(), random.Random(int(sys.argv[2]))
made.model.wte.weight.data[0, 0] = 0.0
newest = 0
for attempt in range(1, kills + 1):
    child = os.fork()  # nothing has started a thread here
    if not child:
        ranks = savers(folder, world, attempt=attempt, keep=Retention(2, keep_every=7))
        for step in range(newest + 1, newest + 1000):
            made.model.wte.weight.data[0, 0] = float(step)
            for rank, saver in enumerate(ranks):
                saver.save(*(cut(p, by_rows, rank, world) for p in made.pieces()), state_of(step))
                saver.point("best", step)
        os._exit(0)
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
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_there_is_always_a_whole_one(tmp_path: Path, world: int) -> None:
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, str(tmp_path / "run"), str(world), "14"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    newest = [int(line) for line in done.stdout.split()]
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
