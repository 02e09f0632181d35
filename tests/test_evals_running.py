"""A suite asked in waves: the same answers whatever the batch, the ranks, and what was killed."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import SMALL, model_plan, on_one_thread, shaken
from gloo import start

from tuppence.errors import UserError
from tuppence.evals import journal, running, subject
from tuppence.evals.items import Answer, Ask, Judged, Task
from tuppence.evals.running import run
from tuppence.evals.subject import Subject
from tuppence.files import try_lock
from tuppence.ranks import ALONE, join
from tuppence.tokenizer.kinds import ByteTokenizer
from tuppence.workers import Workers

one_thread = pytest.fixture(autouse=True)(on_one_thread)

COUNTS = {"choices": 70, "words": 23, "none": 0}
Rows = dict[tuple[str, int], dict[str, Any]]


def subject_of(**identity: Any) -> Subject:
    model = shaken(model_plan(vocab_size=257, sequence_len=32, **SMALL["gpt2"]))
    workers = Workers(model, count=1, device="cpu", precision="fp32")
    identity = {"weights_sha256": "w", "precision": "fp32"} | identity
    return subject.of_run(workers, ByteTokenizer(), context=32, identity=identity)


def tasks_of(asked: list[tuple[str, int]] | None = None) -> list[Task]:
    """Two tasks of unlike length, and one that is empty; who asks for an item is noted."""

    def task(label: str, shortest: int, choices: int) -> Task:
        def asks(number: int) -> list[Ask]:
            if asked is not None:
                asked.append((label, number))
            rng = random.Random(f"{label} {number}")
            stem = rng.choices(range(256), k=rng.randint(shortest, shortest + 9))
            ends = (rng.choices(range(256), k=rng.randint(1, 6)) for _ in range(choices))
            return [Ask([*stem, *end], len(end)) for end in ends]

        def judge(number: int, answers: list[Answer]) -> Judged:
            means = [answer.nats / answer.tokens for answer in answers]
            choice = means.index(min(means))
            return {"choice": choice, "correct": choice == number % choices}

        return Task(label, COUNTS[label], asks, judge)

    return [task("choices", 4, 4), task("words", 12, 2), task("none", 1, 1)]


def file_of(path: Path) -> Path:
    """The one journal that is named after this path."""
    (found,) = path.parent.glob(f"{path.stem}.????????.jsonl")
    return found


def rows_of(path: Path) -> Rows:
    return {(row["task"], row["item"]): row for row in journal.rows_of(file_of(path))}


def same(found: Rows, whole: Rows) -> None:
    """Every choice equal, every score to 1e-5."""
    assert found.keys() == whole.keys()
    for key, row in whole.items():
        assert found[key]["judged"] == row["judged"]
        assert found[key]["tokens"] == row["tokens"]
        assert found[key]["nats"] == pytest.approx(row["nats"], abs=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Judged]], Rows]:
    """All items, one text a pass, on one rank."""
    path = tmp_path_factory.mktemp("whole") / "suite.jsonl"
    result = run(subject_of(), tasks_of(), journal=path, batch=1)
    return result, rows_of(path)


def test_every_item_is_judged_once_in_order(
    whole: tuple[dict[str, list[Judged]], Rows],
) -> None:
    result, rows = whole
    assert {label: len(judged) for label, judged in result.items()} == COUNTS
    for label, judged in result.items():
        assert judged == [rows[label, n]["judged"] for n in range(COUNTS[label])]
    assert len({row["judged"]["choice"] for row in rows.values()}) == 4
    assert run(subject_of(), tasks_of()) == result  # without a journal


def test_waves_take_the_first_items_of_every_task() -> None:
    asked: list[tuple[str, int]] = []
    run(subject_of(), tasks_of(asked), batch=16)
    waves = [(0, 4), (4, 16), (16, 23)]
    begun = [
        (label, n) for wave in waves[:2] for label in ("choices", "words") for n in range(*wave)
    ]
    assert asked[:32] == begun
    assert asked[32:39] == [("choices", n) for n in range(*waves[2])]
    assert len(asked) == len(set(asked)) == 93


def ranked(path: str, batch: int, kill_after: int | None, out: str) -> int:
    """In a rank of its own; it may kill itself between passes."""
    ranks = join("cpu")
    passes = []

    def tick() -> None:
        passes.append(1)
        if len(passes) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    result = run(subject_of(), tasks_of(), journal=Path(path), batch=batch, ranks=ranks, tick=tick)
    Path(f"{out}{ranks.rank}").write_text(json.dumps(result))
    ranks.part()
    return 0


@pytest.mark.parametrize(("batch", "passes"), [(1, 20), (16, 2)])
def test_two_ranks_killed_and_gone_on_with_by_one_and_by_two(
    batch: int, passes: int, tmp_path: Path, whole: tuple[dict[str, list[Judged]], Rows]
) -> None:
    result, rows = whole
    path, out = tmp_path / "suite.jsonl", tmp_path / "result"
    words = (str(path), batch, passes, str(out))
    killed = start(2, ranked, *words, folder=tmp_path / "first")
    assert set(killed.codes()) & {-signal.SIGKILL}
    before = rows_of(path)
    assert 0 < len(before) < 93
    kept = file_of(path).read_bytes()

    alone = tmp_path / "alone.jsonl"
    alone.with_name(file_of(path).name.replace("suite", "alone")).write_bytes(kept)
    asked: list[tuple[str, int]] = []
    assert run(subject_of(), tasks_of(asked), journal=alone, batch=17 - batch) == result
    assert not set(asked) & before.keys()
    same(rows_of(alone), rows)

    again = start(2, ranked, str(path), batch, None, str(out), folder=tmp_path / "second")
    assert again.codes() == [0, 0], again.said(0) + again.said(1)
    same(rows_of(path), rows)
    assert file_of(path).read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    for rank in range(2):
        assert json.loads(Path(f"{out}{rank}").read_text()) == result


def test_a_deadline_counts_the_waves_that_are_whole(
    tmp_path: Path, whole: tuple[dict[str, list[Judged]], Rows]
) -> None:
    result, _ = whole
    past = time.monotonic() - 1
    assert run(subject_of(), tasks_of(), deadline=past) == {label: [] for label in COUNTS}
    path = tmp_path / "suite.jsonl"
    answered = 40
    clock = Clock(answered)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuppence.evals.score.time", clock)
        cut = run(subject_of(), tasks_of(), journal=path, batch=1, deadline=1e12, told=clock.told)
    assert {label: len(judged) for label, judged in cut.items()} == {
        "choices": 16,
        "words": 16,
        "none": 0,
    }
    assert cut == {label: judged[:16] for label, judged in result.items()}
    assert answered <= len(rows_of(path)) < 70  # what a wave cut short has stays in the journal
    assert run(subject_of(), tasks_of(), journal=path) == result


class Clock:
    """A clock that stands still until so many items have answers, and then is beyond all."""

    def __init__(self, answered: int) -> None:
        self.answered, self.now = answered, time.monotonic()

    def told(self, done: int, of: int) -> None:
        if done >= self.answered:
            self.now = 1e13

    def monotonic(self) -> float:
        return self.now


def test_a_wave_that_would_not_be_whole_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, now = tasks_of(), 100.0
    monkeypatch.setattr("tuppence.evals.running.time.monotonic", lambda: now)
    how = {"asked": 10, "began": now - 10, "ranks": ALONE}  # a second an item

    def stop(first: int, left: float, found: dict[Any, Any] | None = None) -> int:
        return running._stop(tasks, found or {}, first, deadline=now + left, **how)  # type: ignore[arg-type]

    assert stop(16, math.inf) == 64
    assert stop(16, running.CAUTION * 55.1) == 64
    assert stop(16, running.CAUTION * 54.9) == 40
    assert stop(16, running.CAUTION * 10) == 19
    assert stop(16, 1.9) == 0
    assert stop(70, math.inf) == 0
    answered = {("choices", n): {"correct": True} for n in range(64)}
    assert stop(16, running.CAUTION * 7.1, answered) == 64


# ---------------------------------------------------------------- the journal


@pytest.fixture
def kept(tmp_path: Path, whole: tuple[dict[str, list[Judged]], Rows]) -> Path:
    """A journal of all items."""
    path = tmp_path / "suite.jsonl"
    run(subject_of(), tasks_of(), journal=path, batch=16)
    return path


def torn(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-9]]


def garbled(lines: list[bytes]) -> list[bytes]:
    return [*lines[:5], b'{"task": "choices", "it\xff\n', b"[]\n", *lines[7:]]


def changed(lines: list[bytes]) -> list[bytes]:
    """One that judged nothing, one of another choice, and one without its checksum."""
    rows = [json.loads(line) for line in lines[5:8]]
    rows[0]["judged"] = {}
    rows[1]["judged"]["choice"] += 1
    del rows[2]["crc32"]
    return [*lines[:5], *(json.dumps(row).encode() + b"\n" for row in rows), *lines[8:]]


@pytest.mark.parametrize(("damage", "lost"), [(torn, 1), (garbled, 2), (changed, 3)])
def test_damaged_lines_are_asked_again(
    kept: Path,
    whole: tuple[dict[str, list[Judged]], Rows],
    damage: Callable[[list[bytes]], list[bytes]],
    lost: int,
) -> None:
    result, rows = whole
    lines = file_of(kept).read_bytes().splitlines(keepends=True)
    file_of(kept).write_bytes(b"".join(damage(lines)))
    asked: list[tuple[str, int]] = []
    said: list[str] = []
    assert run(subject_of(), tasks_of(asked), journal=kept, say=said.append) == result
    assert len(asked) == lost
    assert len(said) == (damage is not torn)
    same(rows_of(kept), rows)
    assert len(file_of(kept).read_bytes().splitlines()) == len(lines)


@pytest.mark.parametrize("other", ["subject", "suite"])
def test_a_journal_of_another_is_beside(kept: Path, other: str) -> None:
    mine = file_of(kept)
    before = mine.read_bytes()
    who = subject_of(precision="bf16") if other == "subject" else subject_of()
    suite = {"max_per_task": 5} if other == "suite" else None
    asked: list[tuple[str, int]] = []
    said: list[str] = []
    run(who, tasks_of(asked), journal=kept, suite=suite, say=said.append)
    assert len(asked) == 93
    assert mine.read_bytes() == before
    assert len(list(kept.parent.glob("suite.*.jsonl"))) == 2
    run(subject_of(), tasks_of(asked), journal=kept, say=said.append)
    assert len(asked) == 93  # of what was answered before, nothing is asked again
    assert said == []


def test_a_journal_whose_first_line_is_another_is_not_believed(kept: Path) -> None:
    mine = file_of(kept)
    mine.write_bytes(b"{}\n" + mine.read_bytes().split(b"\n", 1)[1])
    asked: list[tuple[str, int]] = []
    said: list[str] = []
    run(subject_of(), tasks_of(asked), journal=kept, say=said.append)
    assert len(asked) == 93
    assert said == [f"{mine}: its first line is damaged; all its items are asked anew"]


@pytest.mark.parametrize("content", [b"", b'{"journal"'])
def test_a_journal_that_was_killed_at_its_first_line(kept: Path, content: bytes) -> None:
    path = kept
    file_of(kept).write_bytes(content)
    said: list[str] = []
    run(subject_of(), tasks_of(), journal=path, say=said.append)
    assert said == []
    assert len(rows_of(path)) == 93


def test_two_processes_do_not_write_one_journal(kept: Path) -> None:
    with file_of(kept).with_name(f".{file_of(kept).name}.lock").open("ab") as other:
        assert try_lock(other)
        with pytest.raises(UserError, match="another process is evaluating"):
            run(subject_of(), tasks_of(), journal=kept)
    run(subject_of(), tasks_of(), journal=kept)


def refused(path: str, out: str) -> int:
    """Both ranks hear why the lead cannot."""
    ranks = join("cpu")
    try:
        run(subject_of(), tasks_of(), journal=Path(path), ranks=ranks)
    except UserError as error:
        Path(f"{out}{ranks.rank}").write_text(str(error))
        return 2
    return 0


def test_what_stops_the_lead_stops_all(kept: Path, tmp_path: Path) -> None:
    with file_of(kept).with_name(f".{file_of(kept).name}.lock").open("ab") as other:
        assert try_lock(other)
        both = start(2, refused, str(kept), str(tmp_path / "why"), folder=tmp_path / "logs")
        assert both.codes() == [2, 2]
    assert (tmp_path / "why0").read_text() == (tmp_path / "why1").read_text()
