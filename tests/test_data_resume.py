"""Whatever kills a preparation, and whoever shares it: no document twice, none lost, same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import (
    MODULES,
    SMALL,
    child,
    contents,
    documents_of,
    hashes,
    made,
    shrink,
    texts,
    write,
)

from tuppence.data import stream
from tuppence.data.encode import Encoded
from tuppence.data.prepare import Options, Prepared, Progress, prepare, prepare_slices
from tuppence.data.shards import open_shard
from tuppence.data.work import SliceWriter, done_of
from tuppence.errors import UserError
from tuppence.files import file_sha256

# ---------------------------------------------------------------- kill -9


def _ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # nobody waits for it here, but it runs no more


def _wait_for_end(pids: list[int]) -> None:
    until = time.monotonic() + 30
    while not all(_ended(pid) for pid in pids):
        if time.monotonic() > until:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{pids} outlived the process that started them")
        time.sleep(0.02)


def _litter(partial: Path) -> None:
    """What the worst kill may leave behind the last commit."""
    for path in list(partial.glob("slice_*.json")):
        done = done_of(partial, int(path.stem.rpartition("_")[2]))
        begun = [part.file for part in done.parts[-1:]] + [f"{path.stem}.keys"]
        for torn in [partial / name for name in begun if not done.finished]:
            if torn.exists():
                with torn.open("ab") as file:
                    file.write(b"torn")
    (partial / "slice_000001.json.tmp").write_text('{"slice": 1, "wind')
    (partial / "slice_000002_007.bin").write_bytes(b"a shard that was not to be")
    (partial / "train_000000.bin.tmp").write_bytes(b"half")
    (partial / "manifest.json.tmp").write_text("{")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_kill_9_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: str
) -> None:
    path = write(tmp_path / "c.jsonl", texts(800) + texts(100))
    asked: dict[str, Any] = {"shard_tokens": 1500, "dedup": dedup, "workers": 2}
    rng = random.Random(5)
    kills = 0
    root = tmp_path / "killed"
    for _ in range(3):
        running = child(path, root, constants=SMALL, **asked)
        assert running.stdout is not None
        told = [line for line, _ in zip(running.stdout, range(rng.randrange(5, 25)), strict=False)]
        time.sleep(rng.random() * 0.01)
        running.kill()
        kills += running.wait() == -signal.SIGKILL
        workers = json.loads(told[-1])["workers"]
        assert len(workers) == 2
        _wait_for_end(workers)  # with their parent
        running.communicate()
        for partial in root.glob("*.partial"):
            _litter(partial)
    assert kills == 3
    shrink(monkeypatch)
    before = sum(done_of(partial, n).tokens for partial in root.glob("*.partial") for n in range(9))
    assert before > 1500, "nothing was gone on with"
    again = made(path, root, **asked)
    assert contents(again.folder) == contents(made(path, tmp_path / "whole", **asked).folder)
    assert not list(root.glob("*.partial"))


@pytest.mark.skipif(not hasattr(os, "kill"), reason="kills a process")
def test_a_worker_that_dies_is_said_and_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", texts(500))
    constants = SMALL | {"windows.WINDOW_BYTES": 300, "slices.SLICE_BYTES": 50_000}
    running = child(path, tmp_path, constants=constants, workers=2)
    assert running.stdout is not None
    for line in running.stdout:
        workers = json.loads(line)["workers"]
        if len(workers) == 2:
            os.kill(workers[0], signal.SIGKILL)
            break
    said = running.communicate()[1]
    assert running.returncode == 1
    assert "Fault: a worker process was killed" in said
    assert "data.workers" in said
    shrink(monkeypatch, **{name: value for name, value in constants.items() if name in SMALL})
    again = made(path, tmp_path)
    assert hashes(again) == hashes(made(path, tmp_path / "whole"))


# ---------------------------------------------------------------- at every step


class Killed(BaseException):
    """Stands for the end of the process."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, turn: int) -> list[str]:
    """The process ends before the `turn`-th (from 1) thing it does to the disk."""
    acts: list[str] = []

    def before(name: str, act: Any) -> Any:
        def acted(*words: Any, **more: Any) -> Any:
            acts.append(name)
            if len(acts) >= turn:
                raise Killed
            return act(*words, **more)

        return acted

    for name in ("replace", "rename", "unlink", "fsync"):
        monkeypatch.setattr(os, name, before(name, getattr(os, name)))
    return acts


@pytest.mark.parametrize(
    "asked",
    [
        {"shard_tokens": 3000},
        {"max_tokens": 4000, "val_tokens": 1500},
        {"dedup": "exact", "val_tokens": 1500},
        {"dedup": "exact", "max_tokens": 4000, "shard_tokens": 3000},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_an_end_before_any_step_changes_nothing(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = write(tmp_path / "c.jsonl", texts(60) + texts(15) + texts(25, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        acts = _kill_at(patch, 10**9)
        whole = made(path, tmp_path / "whole", **asked)
        expected = contents(whole.folder)
        assert acts.count("fsync") > 20
        assert acts.count("replace") > 10
        root = tmp_path / "killed"
        for turn in range(1, len(acts) + 1):
            with pytest.MonkeyPatch.context() as inner:
                _kill_at(inner, turn)
                with pytest.raises(Killed):
                    made(path, root, **asked)
            again = made(path, root, **asked)
            assert contents(again.folder) == expected, (turn, acts[turn - 1])
            shutil.rmtree(root)


def test_a_tokenizer_that_was_half_saved_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", texts(60))
    expected = contents(made(path, tmp_path / "whole", tokenizer="char").folder)
    for turn in (1, 2, 3):
        with pytest.MonkeyPatch.context() as inner:
            _kill_at(inner, turn)
            with pytest.raises(Killed):
                made(path, tmp_path / "killed", tokenizer="char")
        (partial,) = (tmp_path / "killed").glob("*.partial")
        saved = partial / "tokenizer" / "tokenizer.json"
        assert saved.exists()
        if not (partial / "tokenizer" / "tokenizer.meta.json").exists():
            saved.write_bytes(saved.read_bytes()[:20])
    again = made(path, tmp_path / "killed", tokenizer="char")
    assert contents(again.folder) == expected


def test_ends_one_after_another_still_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt does a little more than the last one, and dies."""
    path = write(tmp_path / "c.jsonl", texts(90))
    shrink(monkeypatch)
    expected = contents(made(path, tmp_path / "whole", shard_tokens=2000).folder)
    for _attempt in range(500):
        with pytest.MonkeyPatch.context() as inner:
            _kill_at(inner, 8)
            try:
                again = made(path, tmp_path / "killed", shard_tokens=2000)
                break
            except Killed:
                continue
    assert contents(again.folder) == expected


def test_a_slice_that_lacked_only_its_end_is_not_lost_under_a_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes when all of a slice's windows are certain, and before the slice is closed."""
    path = write(tmp_path / "c.jsonl", texts(300))
    shrink(monkeypatch)
    asked = {"max_tokens": 12_000, "val_tokens": 2000}
    whole = made(path, tmp_path / "whole", **asked)
    with pytest.MonkeyPatch.context() as patch:
        real = MODULES["work"].SliceWriter.finish

        def finish(writer: Any, *, all_: bool) -> Any:
            if writer.done.slice == 1:
                raise Killed
            return real(writer, all_=all_)

        patch.setattr(MODULES["work"].SliceWriter, "finish", finish)
        with pytest.raises(Killed):
            made(path, tmp_path / "killed", **asked)
    (partial,) = (tmp_path / "killed").glob("*.partial")
    assert done_of(partial, 1).tokens > 1000
    assert not done_of(partial, 1).finished
    again = made(path, tmp_path / "killed", **asked)
    assert contents(again.folder) == contents(whole.folder)


def test_an_interrupted_preparation_says_so_and_fresh_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", texts(60))
    shrink(monkeypatch)
    with pytest.MonkeyPatch.context() as inner:
        _kill_at(inner, 12)
        with pytest.raises(Killed):
            made(path, tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    for shard in partial.glob("slice_*.bin"):  # what is wrong in what is certain stays unseen ...
        content = bytearray(shard.read_bytes())
        content[1500:1510] = bytes(10)
        shard.write_bytes(content)
    phases: list[str] = []
    prepared = prepare(  # ... but not where everything is made anew
        source=str(path),
        tokenizer="byte",
        root=tmp_path,
        options=Options(workers=1),
        fresh=True,
        on_progress=lambda progress: phases.append(progress.phase),
    )
    assert not any("interrupted" in phase for phase in phases)
    assert sorted(documents_of(prepared)) == sorted(texts(60))


def test_finished_slices_are_not_read_again_and_count_as_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", texts(300))
    shrink(monkeypatch)
    with pytest.MonkeyPatch.context() as inner:
        _kill_at(inner, 60)
        with pytest.raises(Killed):
            made(path, tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    finished = [number for number in range(50) if done_of(partial, number).all]
    assert len(finished) >= 2
    seen: list[Progress] = []
    read: list[int] = []
    real = stream.windows_of

    def windows_of(slice_: Any, number: int, *files: Any, **more: Any) -> Any:
        read.append(number)
        return real(slice_, number, *files, **more)

    monkeypatch.setattr(stream, "windows_of", windows_of)
    prepare(
        source=str(path),
        tokenizer="byte",
        root=tmp_path,
        options=Options(workers=1),
        on_progress=seen.append,
    )
    assert read == list(range(len(finished), read[-1] + 1))
    tokenizing = [progress for progress in seen if progress.phase == "tokenizing"]
    assert tokenizing[0].done_bytes > tokenizing[0].total_bytes * len(finished) / 20
    assert tokenizing[-1].done_bytes == tokenizing[-1].total_bytes


def test_a_slice_that_is_gone_on_with_is_not_finished(tmp_path: Path) -> None:
    """As where duplicates took so much that a cap needs more of it."""

    def window(number: int) -> Encoded:
        ids, none = np.arange(50, dtype=np.uint16), np.empty((1, 0), dtype=np.uint64)
        return Encoded(0, number, ids, np.array([0]), 50, [], none, Counter())

    def writer() -> SliceWriter:
        return SliceWriter(tmp_path, 0, dtype=np.dtype("<u2"), shard_tokens=1000, bands=0)

    first = writer()
    first.append(window(0))
    assert first.finish(all_=False).finished
    again = writer()
    again.append(window(1))
    again.commit()
    again.close()
    assert not done_of(tmp_path, 0).finished
    last = writer()
    done = last.finish(all_=True)
    assert done.parts[0].sha256 == file_sha256(tmp_path / done.parts[0].file)
    assert open_shard(tmp_path / done.parts[0].file).tolist() == [*range(50), *range(50)]


# ---------------------------------------------------------------- ranks


def _rank(path: Path, root: Path, rank: int, *, world: int = 3, **asked: Any) -> None:
    options = Options(**{"workers": 1, "rank": rank, "world": world} | asked)
    prepare_slices(source=str(path), tokenizer="byte", root=root, options=options)


def _merged(path: Path, root: Path, *, world: int = 3, **asked: Any) -> Prepared:
    options = Options(**{"workers": 1} | asked)
    return prepare(source=str(path), tokenizer="byte", root=root, options=options, merge=world)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"dedup": "exact"},
        {"max_tokens": 12_000},
        {"max_tokens": 12_000, "dedup": "exact"},
    ],
    ids=lambda asked: "-".join(asked) or "all",
)
def test_ranks_make_what_one_machine_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    path = write(tmp_path / "c.jsonl", texts(300) + texts(100))
    shrink(monkeypatch)
    alone = made(path, tmp_path / "alone", **asked)
    for rank in (2, 0, 1):  # in any order
        _rank(path, tmp_path / "many", rank, **asked)
    together = _merged(path, tmp_path / "many", **asked)
    assert hashes(together) == hashes(alone)
    assert together.manifest.val_sha256 == alone.manifest.val_sha256
    assert together.manifest.documents == alone.manifest.documents
    if "max_tokens" not in asked:  # nobody read further than the other
        assert contents(together.folder) == contents(alone.folder)


def test_ranks_make_disjoint_slices_and_a_lost_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", texts(300))
    shrink(monkeypatch)
    root = tmp_path / "many"
    for rank in (0, 2):
        _rank(path, root, rank)
    (partial,) = root.glob("*.partial")
    finished = [number for number in range(20) if done_of(partial, number).finished]
    assert finished
    assert all(number % 3 in (0, 2) for number in finished)
    with pytest.raises(UserError, match=r"slices 1, 4, 7.* not made yet: run rank 1 of 3 again"):
        _merged(path, root)
    with pytest.MonkeyPatch.context() as inner:
        _kill_at(inner, 9)
        with pytest.raises(Killed):
            _rank(path, root, 1)
    with pytest.raises(UserError, match="run rank 1 of 3 again"):
        _merged(path, root)
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("slice_*[0369].json")}
    _rank(path, root, 1)
    after = {path.name: path.stat().st_mtime_ns for path in partial.glob("slice_*[0369].json")}
    assert after == before, "what other ranks made was made again"
    assert hashes(_merged(path, root)) == hashes(made(path, tmp_path / "alone"))


def test_more_ranks_than_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", texts(20))
    for rank in range(3):
        _rank(path, tmp_path, rank)
    assert sorted(documents_of(_merged(path, tmp_path))) == sorted(texts(20))


def test_a_slice_with_nothing_in_it_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the machine that has it comes to the cap in its next one."""
    shrink(monkeypatch)
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "0.jsonl", texts(40))
    (folder / "1.jsonl").write_bytes(b"\n" * 12_002)  # a slice for either rank, and one more
    write(folder / "2.jsonl", texts(40, seed=2))
    write(folder / "3.jsonl", texts(40, seed=3))
    first = sum(len(text.encode()) + 1 for text in texts(40))
    asked = {"max_tokens": first, "val_tokens": 2000}  # full in the slice behind it
    alone = made(folder, tmp_path / "alone", **asked)
    for rank in (0, 1):
        _rank(folder, tmp_path / "many", rank, world=2, **asked)
    assert hashes(_merged(folder, tmp_path / "many", world=2, **asked)) == hashes(alone)


def test_a_preparation_is_of_one_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", texts(20))
    with pytest.raises(UserError, match="rank 2 of 2: ranks are 0 to 1"):
        _rank(path, tmp_path, 2, world=2)
    with pytest.raises(AssertionError, match="prepare_slices"):
        made(path, tmp_path, world=2)
