"""A run's metrics as columns: the rows that count are those of the folder's own reading."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tuppence.errors import Fault
from tuppence.folder import RunFolder
from tuppence.report import history


def row(step: int, attempt: int = 1, **others: float | int | str | None) -> dict:
    return {"step": step, "attempt": attempt, "tokens": 10 * step, "loss": 1 / step, **others}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path)
    yield made
    made.close()


def scribble(folder: RunFolder, seed: int) -> None:
    """Attempts that are killed, resumed from before what they had done, and that go back."""
    draw = random.Random(seed)
    step = 0
    for attempt in range(1, draw.randint(2, 5)):
        step = draw.randint(0, step)
        folder.event("start" if step == 0 else "resume", "", attempt=attempt, step=step)
        for _ in range(draw.randint(1, 30)):
            if step and draw.random() < 0.1:
                step -= draw.randint(1, step)  # a rewind
            step += draw.randint(1, 2)
            folder.append("metrics", row(step, attempt, loss=draw.random()))


@pytest.mark.parametrize("seed", range(30))
def test_the_rows_that_count_are_those_of_the_folder(folder: RunFolder, seed: int) -> None:
    scribble(folder, seed)
    told, expected = history.read(folder), folder.latest("metrics")
    assert told["step"].tolist() == [each["step"] for each in expected]
    assert told["loss"].tolist() == [each["loss"] for each in expected]
    assert told["attempt"].tolist() == [each["attempt"] for each in expected]
    every = list(folder.rows("metrics"))
    assert len(told) + len(told.dropped["step"]) == len(every)
    assert told.last == every[-1]


def test_what_a_row_does_not_say_is_nan(folder: RunFolder) -> None:
    folder.append("metrics", row(1, grad_norm=2, odd="word"))
    folder.append("metrics", {**row(2), "loss": None})
    told = history.read(folder)
    assert told["grad_norm"].tolist()[0] == 2.0
    assert np.isnan(told["grad_norm"][1])
    assert np.isnan(told["loss"][1])
    assert np.isnan(told["memory_gib"]).all()


def test_a_column_at_steps(folder: RunFolder) -> None:
    for step in (2, 4, 6):
        folder.append("metrics", row(step))
    found = history.read(folder).at([4, 5, 6, 99], "tokens")
    assert found[[0, 2]].tolist() == [40, 60]
    assert np.isnan(found[[1, 3]]).all()


def test_nothing_yet(folder: RunFolder) -> None:
    told = history.read(folder)
    assert len(told) == 0
    assert told.last == {}
    assert np.isnan(told.at([1], "loss")).all()


def test_only_what_is_new_is_read(folder: RunFolder) -> None:
    reader = history.Reader(folder)
    folder.append("metrics", row(1))
    assert len(reader.read()) == 1
    path = folder.file("metrics.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 7'))  # seen by nobody
    folder.append("metrics", row(9))
    with path.open("ab") as lines:
        lines.write(b'{"step": 10, "att')  # torn: no line yet
    assert reader.read()["step"].tolist() == [1, 9]
    with path.open("ab") as lines:
        lines.write(b'empt": 1, "tokens": 5}\n')
    assert reader.read()["step"].tolist() == [1, 9, 10]


def test_another_file_is_read_anew(folder: RunFolder) -> None:
    reader = history.Reader(folder)
    for step in (1, 2, 3):
        folder.append("metrics", row(step))
    assert len(reader.read()) == 3
    folder.close()
    aside = folder.file("aside")
    aside.write_text("".join(json.dumps(row(step)) + "\n" for step in (4, 5, 6, 7)))
    aside.replace(folder.file("metrics.jsonl"))
    assert reader.read()["step"].tolist() == [4, 5, 6, 7]


def test_chunks_end_at_whole_lines(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "CHUNK_BYTES", 150)
    for step in range(1, 40):
        folder.append("metrics", row(step))
    assert history.read(folder)["step"].tolist() == list(range(1, 40))


@pytest.mark.parametrize("line", [b"{nonsense\n", b'{"step": "one"}\n', b'{"step": 1}\n'])
def test_a_damaged_line_names_the_file(folder: RunFolder, line: bytes) -> None:
    folder.append("metrics", row(1))
    with folder.file("metrics.jsonl").open("ab") as lines:
        lines.write(line)
    with pytest.raises(Fault, match=r"metrics\.jsonl is damaged"):
        history.read(folder)


def test_what_was_gone_back_from_does_not_count(folder: RunFolder) -> None:
    folder.event("start", "", attempt=1, step=0)
    for step in (1, 2, 3, 4):
        folder.append("metrics", row(step, usd=0.1 * step))
        folder.append("evals", row(step, usd=0.1 * step))
    folder.event("early_stop", "", attempt=1, back_to=2, usd=0.45, saved_at=0.0)
    folder.append("metrics", row(3, usd=0.5))
    folder.append("metrics", row(4, usd=0.6))
    folder.append("evals", row(4, usd=0.7))
    assert history.read(folder)["usd"].tolist() == [0.1, 0.2, 0.5, 0.6]
    assert [each["usd"] for each in folder.latest("metrics")] == [0.1, 0.2, 0.5, 0.6]
    assert [each["usd"] for each in folder.latest("evals")] == [0.1, 0.2, 0.7]


def test_a_fault_hides_no_line_from_the_next_look(folder: RunFolder) -> None:
    folder.append("metrics", row(1))
    with folder.file("metrics.jsonl").open("ab") as lines:
        lines.write(b"{nonsense\n")
    reader = history.Reader(folder)
    for _ in range(2):
        with pytest.raises(Fault):
            reader.read()
