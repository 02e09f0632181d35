"""Several at one preparation, and inputs that change under it: kept apart, or refused in a line."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_corpora import contents, made, shrink, texts, write

import tuppence.data.prepare as preparation
from tuppence import cli
from tuppence.data import make, together
from tuppence.data.prepare import Options, Place, Prepared, Progress, prepare, prepare_slices
from tuppence.data.shards import HEADER_BYTES, MANIFEST
from tuppence.data.work import done_of
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256, locked, try_lock

Told = Callable[[Progress], None]


def rank(
    path: Path,
    root: Path | Place,
    number: int,
    *,
    world: int = 2,
    told: Told | None = None,
    **o: Any,
) -> Any:
    """One machine's slices."""
    options = Options(**{"workers": 1, "rank": number, "world": world} | o)
    return prepare_slices(
        source=str(path), tokenizer="byte", root=root, options=options, on_progress=told
    )


def whole(path: Path, root: Path | Place, *, merge: int = 0, told: Told | None = None) -> Prepared:
    """All slices, or those of all machines put together."""
    return prepare(
        source=str(path),
        tokenizer="byte",
        root=root,
        options=Options(workers=1),
        merge=merge,
        on_progress=told,
    )


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of a few slices."""
    shrink(monkeypatch)
    return write(tmp_path / "c.jsonl", texts(200))


def folder_of(root: Path) -> Path:
    """The folder that a preparation which has begun will become."""
    (partial,) = root.glob("*.partial")
    return partial.with_suffix("")


def nothing(phase: str) -> None:
    """For who does not care what is waited for."""


# ---------------------------------------------------------------- locks


def test_a_shared_lock_is_shared_with_those_who_share_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with path.open("a+b") as first, path.open("a+b") as second, path.open("a+b") as third:
        assert try_lock(first, shared=True)
        assert try_lock(second, shared=True)
        assert not try_lock(third)
        first.close()
        assert not try_lock(third)
        second.close()
        assert try_lock(third)
    with locked(path, on_wait=lambda: None), path.open("a+b") as other:
        assert not try_lock(other, shared=True)


def test_a_whole_preparation_is_refused_while_a_rank_is_at_work(
    tmp_path: Path, corpus: Path
) -> None:
    rank(corpus, tmp_path / "out", 0)
    folder = folder_of(tmp_path / "out")
    with together.one_rank(folder, 1, say=nothing):
        for merge in (0, 2):
            with pytest.raises(UserError, match="rank 1 of this preparation is at work"):
                whole(corpus, tmp_path / "out", merge=merge)
        rank(corpus, tmp_path / "out", 0)  # another rank is not
    rank(corpus, tmp_path / "out", 1)
    merged = whole(corpus, tmp_path / "out", merge=2)
    assert contents(merged.folder) == contents(made(corpus, tmp_path / "alone").folder)


def test_a_rank_waits_for_a_whole_preparation(tmp_path: Path, corpus: Path) -> None:
    rank(corpus, tmp_path / "out", 0)
    folder, phases = folder_of(tmp_path / "out"), list[str]()

    def other() -> None:
        rank(corpus, tmp_path / "out", 1, told=lambda progress: phases.append(progress.phase))

    running = threading.Thread(target=other)
    with together.alone(folder, say=nothing):
        running.start()
        until = time.monotonic() + 30
        while not any("waiting" in phase for phase in phases) and time.monotonic() < until:
            time.sleep(0.01)
        assert phases[-1] == "waiting for the process that prepares all of it"
        assert not done_of(folder.with_name(f"{folder.name}.partial"), 1).finished
    running.join()
    assert done_of(folder.with_name(f"{folder.name}.partial"), 1).finished


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("bucket", [False, True])
def test_ranks_are_of_one_world(tmp_path: Path, corpus: Path, bucket: bool) -> None:
    def place(machine: int) -> Path | Place:
        url = f"file://{tmp_path}/bucket"
        return Place(tmp_path / f"cache{machine}", url) if bucket else tmp_path / "out"

    rank(corpus, place(0), 0, world=3)
    with pytest.raises(UserError, match="shared by 3 machines, not 2; say --world 3"):
        rank(corpus, place(1), 1, world=2)
    rank(corpus, place(1), 1, world=3)
    with pytest.raises(UserError, match="run rank 2 of 3 again"):  # whatever the merge was told
        whole(corpus, place(0), merge=2)
    rank(corpus, place(2), 2, world=3)
    merged = whole(corpus, place(0), merge=3)
    assert merged.manifest.documents == 200
    assert not list(tmp_path.rglob(f"{together.WORLD}*"))


@pytest.mark.parametrize("bucket", [False, True])
def test_a_rank_that_is_run_again_after_the_merge_makes_nothing(
    tmp_path: Path, corpus: Path, bucket: bool
) -> None:
    url = f"file://{tmp_path}/bucket" if bucket else None
    one, other = (
        Place(tmp_path / "here", url),
        Place(tmp_path / ("there" if bucket else "here"), url),
    )
    for number in (0, 1):
        assert not rank(corpus, one, number).merged
    merged = whole(corpus, one, merge=2)
    before = contents(tmp_path / ("bucket" if bucket else "here"))
    assert before
    again = rank(corpus, other, 1)
    assert again.merged
    assert again.tokens == merged.manifest.tokens
    assert contents(tmp_path / ("bucket" if bucket else "here")) == before
    assert not list(tmp_path.glob("*here/*.partial"))
    assert not list(tmp_path.rglob("slice_*.json"))


def test_what_a_rank_does_not_do_is_refused(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["prepare", "data.source=c.jsonl", "data.tokenizer=byte", "data.workers=1"]
    words += ["--rank", "0", "--world", "1"]
    others = [["--merge"], ["--fresh"], ["--count"], ["--report"], ["--export", "llmc"]]
    for flag in [*others, ["--out", "x"]]:
        assert cli.main([*words, *flag]) == 2
        assert f"{flag[0]} beside --rank" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert "slices" in capsys.readouterr().out
    assert cli.main([*words[:-4], "--merge"]) == 0
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "already put together" in capsys.readouterr().out


# ---------------------------------------------------------------- broken documents


def test_refuse_does_not_finish_what_skip_began(tmp_path: Path, corpus: Path) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)
    corpus.write_bytes(b"".join([*lines[:5], b"broken\n", *lines[5:]]))
    root, said = tmp_path / "out", r"leaves out 1 broken documents \(.*not JSON.*on_bad=skip"
    rank(corpus, root, 0, on_bad="skip")
    assert done_of(root / f"{folder_of(root).name}.partial", 0).bad
    with pytest.raises(UserError, match=said):
        rank(corpus, root, 0)
    rank(corpus, root, 1)
    for merge in (2, 0):
        with pytest.raises(UserError, match=said):
            whole(corpus, root, merge=merge)
    assert not folder_of(root).exists()
    assert (root / f"{folder_of(root).name}.partial" / MANIFEST).exists()  # no work is lost
    skipped = made(corpus, root, on_bad="skip")
    assert skipped.manifest.documents == 200
    assert contents(skipped.folder) == contents(made(corpus, tmp_path / "b", on_bad="skip").folder)
    with pytest.raises(UserError, match=said):
        rank(corpus, root, 0)


# ---------------------------------------------------------------- inputs that change


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _written_over(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"tokens", b"TOKENS"))
    os.utime(path, ns=(1, 1))  # whatever the clock's grain is


def _gone(path: Path) -> None:
    path.unlink()


CHANGES = {
    "cut short": (_cut_short, "it has .* bytes, and had"),
    "written over": (_written_over, "it was written to"),
    "gone": (_gone, "gone since it was hashed"),
}


@pytest.mark.parametrize("moment", ["hashed", "tokenizing", "putting the shards"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_is_a_fault_and_nothing_of_it_stays(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    change, says = CHANGES[name]
    one_slice = {"slices.SLICE_BYTES": 1 << 30, "formats.BLOCK_BYTES": 500}
    shrink(monkeypatch, **one_slice)  # of many windows, which is open all the time
    content = write(corpus, texts(600)).read_bytes()
    expected = contents(made(corpus, tmp_path / "whole").folder)
    seen: list[str] = []

    def told(phase: str) -> None:
        seen.append(phase)
        if phase.startswith(moment) and sum(p.startswith(moment) for p in seen) == turn:
            change(corpus)

    def hashed(path: Path) -> str:
        found = file_sha256(path)
        told("hashed")
        return found

    turn = 2 if moment == "tokenizing" else 1  # when something is certain already
    monkeypatch.setattr(preparation, "file_sha256", hashed)
    with pytest.raises(Fault, match=says):
        whole(corpus, tmp_path / "out", told=lambda progress: told(progress.phase))
    assert not [path for path in tmp_path.glob("out/*/") if path.suffix != ".partial"]
    assert not list(tmp_path.glob(f"out/*/{MANIFEST}"))
    corpus.write_bytes(content)  # what it was has the same name again
    monkeypatch.setattr(preparation, "file_sha256", file_sha256)
    assert contents(made(corpus, tmp_path / "out").folder) == expected


def test_what_is_learned_of_a_file_that_changes_is_not_kept(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make.build_tokenizer

    def built(*words: Any, **more: Any) -> Any:
        found = real(*words, **more)
        _cut_short(corpus)
        return found

    monkeypatch.setattr(make, "build_tokenizer", built)
    with pytest.raises(Fault, match="is not what it was when it was hashed"):
        made(corpus, tmp_path / "out", tokenizer="char")
    assert not list(tmp_path.glob("out/*/tokenizer/*"))


# ---------------------------------------------------------------- half a shard


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_shard_without_its_header_is_not_put_together(
    tmp_path: Path, corpus: Path, dedup: str
) -> None:
    write(corpus, texts(200) + texts(50))
    for number in (0, 1):
        rank(corpus, tmp_path / "out", number, dedup=dedup)
    partial = folder_of(tmp_path / "out").with_suffix(".partial")
    last = sorted(partial.glob("slice_*.bin"))[-1]
    with last.open("r+b") as file:
        file.write(bytes(HEADER_BYTES))
    options = Options(workers=1, dedup=dedup)
    with pytest.raises(Fault, match=rf"{last.name}: has no header, so it was half written"):
        prepare(
            source=str(corpus), tokenizer="byte", root=tmp_path / "out", options=options, merge=2
        )
    assert not (partial / MANIFEST).exists()
