"""`tuppence watch` and `tuppence runs`: screens of any size, lines in a pipe, runs on a bucket."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import pty
import random
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket_runs import begun, mirrored, patched

from tuppence import bucket, cli, store, watching
from tuppence.bucket import looking
from tuppence.config import DataPlan, Interval, Plan, Run
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.report import history
from tuppence.watch import screen, standing
from tuppence.watch.braille import Curve, chart, curve_of

pytest.importorskip("fsspec")
pytest_plugins = ["bucket_places"]
pytestmark = pytest.mark.usefixtures("closed")
SIZES = [(60, 16), (80, 24), (120, 40), (200, 60), (40, 10), (20, 5), (1, 1)]


@pytest.fixture(scope="session")
def plan(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Plan:
    made = solve(small_run, data_plan, calibration)
    promised = dataclasses.replace(made.predicted, val_loss=Interval(1.4, 1.5, 1.6))
    return dataclasses.replace(made, predicted=promised)


def planned(path: Path, plan: Plan, *, began: float = 0.0) -> RunFolder:
    """A run of which twelve cents of an hour were charged, from `began` seconds ago."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    name = {"name": path.name, "budget": {"usd": 0.02}}
    folder.write_json("run.json", name)
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, name=path.name)))
    folder.file("argv.txt").write_text(f"tuppence run name={path.name}\n")
    start = time.time() - 100 - began
    row = {"start": start, "end": start + 50, "phase": "train", "node": "there", "usd": 0.01}
    folder.append("ledger", {**row, "usd_per_hour": 0.72, "attempt": 1})
    folder.event("start", "", attempt=1, step=0)
    return folder


def train(folder: RunFolder, steps: range) -> None:
    for number in steps:
        row = {"step": number, "attempt": 1, "tokens": 512 * number, "loss": 1.5 + 3 / number}
        row |= {"lr": 0.001, "grad_norm": 1.0, "step_seconds": 0.1, "data_wait": 0.0}
        row |= {"tokens_per_second": 5120.0, "mfu": 0.25, "progress": 0.5, "memory_gib": 0.5}
        folder.append("metrics", row)


@pytest.fixture
def folder(tmp_path: Path, plan: Plan) -> RunFolder:
    """A run of 300 steps on another machine, which is at it."""
    made = planned(tmp_path / "runs" / "small", plan)
    train(made, range(1, 301))
    for at, loss in ((100, 1.9), (200, 1.62), (300, 1.7)):
        row = {"step": at, "attempt": 1, "loss": loss, "bpb": loss / 0.69, "tokens": 5}
        row |= {"error": 0.0123}
        made.append("evals", row)
    made.append(
        "samples", {"step": 300, "attempt": 1, "prompt": "", "text": "To be,\n\x1b[2Jor 木 not"}
    )
    for number in range(40):
        made.event("step_skipped", f"step {number} skipped", step=number)
    made.event("recovered", "it is over")
    made.event("save", "step 300", step=300)
    beats(made)
    return made


def beats(folder: RunFolder, *, silent: float = 0.0) -> None:
    now = time.time() - silent
    row = {"start": now - 5, "end": now, "phase": "train", "node": "there", "usd": 0.001}
    folder.write_beat({**row, "usd_per_hour": 0.72, "attempt": 1, "pid": 7})


def shown(folder: RunFolder, width: int, height: int) -> str:
    seen = watching.Watched(folder)
    seen.look()
    return screen.as_text(seen.frame(width, height))


# ---------------------------------------------------------------- the screen


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_screen_of_any_size(folder: RunFolder, width: int, height: int) -> None:
    lines = shown(folder, width, height).split("\n")
    assert len(lines) <= height
    assert max(map(screen.cells_of, lines)) <= width
    assert lines[0].startswith("small  ● training"[:width][: width - 1])


def test_what_is_on_it(folder: RunFolder) -> None:
    text = shown(folder, 100, 30)
    for words in (
        "small  ● training   there",
        " 55.0%  $0.0110 of $0.0200",
        "45s left, ends ",
        "55s charged of ",
        "$0.72/h",
        "saved 0s ago",
        "step 300, 153,600 tokens, 0.15 epochs   loss 1.5103",
        "● val 1.7000 ± 0.0123 (2.4638 bits/byte)",
        "◆ best 1.6200 at step 200   ▒ promised 1.500 (1.400 to 1.600)",
        "5,120 tok/s   MFU 25% of 0.60 TFLOPS   memory 0.50 GiB   data wait 0.0%   lr 0.001",
        "    0s recovered  it is over",
        "    0s step_skipped ×29  step 39 skipped",
        "step 300 says  To be, \N{REPLACEMENT CHARACTER}[2Jor 木 not",
    ):
        assert words in text
    assert [text.count(mark) for mark in "◆●"] == [2, 4]  # each in the legend too; training


def test_a_run_that_has_no_steps_yet(tmp_path: Path, plan: Plan) -> None:
    folder = planned(tmp_path / "new", plan)
    now = time.time()
    row = {"start": now - 5, "end": now, "phase": "prepare", "node": "there", "usd": 0.001}
    folder.write_beat({**row, "usd_per_hour": 0.72, "attempt": 1, "pid": 7})
    assert "new  ● preparing its data" in shown(folder, 80, 24)
    folder.file("plan.json").unlink()
    assert "$0.0110 of $0.0200" in shown(folder, 80, 24)


def test_a_run_that_is_dead_says_how_it_goes_on(folder: RunFolder) -> None:
    beats(folder, silent=1000)
    text = shown(folder, 100, 24)
    assert "small  ✕ dead" in text
    assert "nothing was heard from there for 16m40s" in text
    assert "goes on with: tuppence run name=small" in text
    assert "Ctrl-C" not in text  # one look
    assert " left, " not in text


def test_the_command_that_goes_on_is_whole_or_left_out(folder: RunFolder) -> None:
    words = ["tuppence", "run", "a b", *(f"model.key{i}={i}" for i in range(40))]
    folder.file("argv.txt").write_text(shlex.join(words))
    beats(folder, silent=1000)
    lines = shown(folder, 80, 40).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("goes on with: "))
    last = next(i for i in range(first, 40) if not lines[i].endswith(" \\"))
    assert last > first
    typed = " ".join(line.removesuffix(" \\") for line in lines[first : last + 1])
    assert shlex.split(typed.removeprefix("goes on with: ")) == words
    assert "goes on with" not in shown(folder, 80, 16)
    folder.file("argv.txt").write_text("tuppence run " + "x" * 80)
    assert "goes on with" not in shown(folder, 80, 40)


def test_a_sentence_that_is_cut_says_so(folder: RunFolder) -> None:
    folder.event("failed", "word " * 300, attempt=1)
    lines = shown(folder, 80, 24).splitlines()
    assert [line[-1] for line in lines if line.startswith("word")] == ["d"] * 8 + ["…"]


def test_a_run_that_failed_says_so_once(folder: RunFolder) -> None:
    folder.event("failed", "the disk is full", attempt=1)
    folder.forget_beat()
    text = shown(folder, 100, 24)
    assert "small  ✕ failed" in text
    assert text.count("the disk is full") == 1


def test_the_anneal_of_an_early_stop_is_told(folder: RunFolder) -> None:
    details = {"step": 290, "back_to": 280, "anneal_steps": 30, "test": "val turned at step 280"}
    folder.event("early_stop", "going back", reason="turned", **details)
    text = shown(folder, 100, 24)
    assert "● annealing, to stop early" in text
    assert "val turned at step 280; ends at step 310" in text
    assert "1s left" in text


@pytest.mark.parametrize(("wide", "cells"), [("abc", 3), ("木a", 3), ("e\u0301", 1)])
def test_wide_letters_take_two_columns(wide: str, cells: int) -> None:
    assert screen.cells_of(wide) == cells


# ---------------------------------------------------------------- the curve


def test_a_chart_of_a_straight_line() -> None:
    steps = np.arange(1.0, 401.0)
    curve = Curve(steps, 5 - steps / 100, ((200, 3.0), (400, 1.0)), best_step=400)
    lines = screen.as_text(chart(curve, None, width=60, height=11)).split("\n")
    assert len(lines) == 11
    drawn = [line[8:] for line in lines[:-1]]
    left = [len(line) - len(line.lstrip()) for line in drawn]
    assert left == sorted(left)  # it falls from left to right
    assert left[0] < left[-1]
    place = [
        (row, line.index(mark)) for row, line in enumerate(drawn) for mark in "●◆" if mark in line
    ]
    assert place == [(4, 25), (9, 49)]
    assert lines[-1].split() == ["0", "step", "400"]


def test_a_chart_keeps_what_was_promised_in_sight() -> None:
    steps = np.arange(1.0, 101.0)
    lines = screen.as_text(
        chart(Curve(steps, 3 - steps / 1000), Interval(1.0, 1.1, 1.2), width=40, height=12)
    ).split("\n")
    marked = [row for row, line in enumerate(lines) if "▒" in line]
    assert marked == [9, 10]
    assert "⠒" in lines[0]


def test_losses_of_the_start_do_not_flatten_the_rest() -> None:
    steps = np.arange(1.0, 1001.0)
    losses = np.where(steps < 50, 11.0, 3.0 - steps / 1000)
    lines = screen.as_text(chart(Curve(steps, losses), None, width=80, height=20)).split("\n")
    assert float(lines[0].split()[0]) < 3.5


@pytest.mark.parametrize(
    "curve",
    [
        Curve(np.empty(0), np.empty(0)),
        Curve(np.array([1.0]), np.array([4.0])),
        Curve(np.array([5.0, 5000.0]), np.array([4.0, 4.0])),
    ],
)
def test_a_chart_of_next_to_nothing(curve: Curve) -> None:
    lines = screen.as_text(chart(curve, None, width=60, height=8)).split("\n")
    assert len(lines) == (8 if len(curve.steps) else 1)


def test_a_curve_of_many_steps_is_cut_down(tmp_path: Path) -> None:
    count = 100_000
    columns = {"step": np.arange(1, count + 1), "loss": np.linspace(4, 2, count)}
    columns["loss"][7] = np.nan
    curve = curve_of(history.History(columns, {}))
    assert len(curve.steps) == 2048
    assert np.allclose(curve.losses, np.interp(curve.steps, *columns.values()), atol=1e-3)


def test_a_long_curve_is_read_so_seldom_that_it_costs_little(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, clock, reads = watching.Watched(folder), [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    once = history.read(folder)

    def read(reader: history.Reader) -> history.History:
        reads.append(clock[0])
        clock[0] += 0.25
        return once

    monkeypatch.setattr(history.Reader, "read", read)
    seen.look()
    while clock[0] < 200:
        seen.curve()
        clock[0] += 2
    assert len(reads) <= 2 + 200 * watching.CURVE_SHARE / 0.25
    assert len(reads) > 5


# ---------------------------------------------------------------- the verb


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def test_json_is_one_document(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capsys, "watch", str(folder.path), "--json"))
    assert found == {**json.loads(json.dumps(standing.read(folder).document())), **changing(found)}
    assert (found["state"], found["step"], found["usd"]) == ("running", 300, pytest.approx(0.011))


def changing(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("seconds_left", "ends_at")}


def test_once_is_one_screen(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("LINES", "20")
    lines = told(capsys, "watch", "small", "--runs", str(folder.path.parent), "--once")
    assert len(lines.splitlines()) <= 20
    assert max(map(screen.cells_of, lines.splitlines())) <= 70
    assert "\x1b" not in lines


def test_a_screen_where_no_such_letters_are(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["watch", str(folder.path), "--once"]) == 0
    out.flush()
    assert out.buffer.getvalue().startswith(b"small  training  $0.0110")  # type: ignore[attr-defined]


def test_lines_in_a_pipe_until_it_has_finished(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, naps = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def nap(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds
        if len(naps) in (3, 4):  # within ten seconds
            train(folder, range(303, 304) if len(naps) == 4 else range(301, 303))
        if len(naps) == 20:
            folder.event("end", "finished", attempt=1, peak_memory_gib=0.7)

    monkeypatch.setattr(time, "sleep", nap)
    lines = told(capsys, "watch", str(folder.path)).splitlines()
    assert len(naps) == 20
    assert [line.partition("  loss")[0] for line in lines[:3]] == [
        "small  training  $0.0110 of $0.0200  55.0%  step 300, 153,600 tokens, 0.15 epochs",
        "small  training  $0.0110 of $0.0200  55.0%  step 303, 155,136 tokens, 0.15 epochs",
        "small  finished  $0.0110 of $0.0200  55.0%  step 303, 155,136 tokens, 0.15 epochs",
    ]
    assert [line.split()[0] for line in lines[3:]] == ["receipt"]
    assert set(naps) == {2.0}


@pytest.mark.parametrize(("state", "code"), [("dead", 1), ("failed", 1), ("stopped", 0)])
def test_in_a_pipe_a_run_that_is_gone_is_said_and_left(
    folder: RunFolder, state: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    beats(folder, silent=1000)
    said = "nothing was heard from there for 16m40s"
    if state != "dead":
        said = f"it {state}"
        folder.event(state, said, attempt=1)
    assert cli.main(["watch", str(folder.path)]) == code
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1:] == [f"  {said}", "  goes on with: tuppence run name=small"]
    assert lines[0].startswith(f"small  {state}  $0.0110 of $0.0200  55.0%")
    assert err == (f"tuppence: small: {state}: {said}\n" if code else "")


def test_on_a_terminal_a_dead_run_is_watched_on_but_said_once(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats(folder, silent=1000)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)

    def nap(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", nap)
    lines = told(capsys, "watch", str(folder.path), "--every", "5").splitlines()
    assert (lines[0].split()[1], len(lines)) == ("dead", 3)


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "1e9"])
def test_a_wrong_pace(folder: RunFolder, every: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(folder.path), f"--every={every}"]) == 2
    assert "name 0.1 to 86400 seconds" in capsys.readouterr().err


class Terminal:
    """`tuppence watch` in a terminal of its own."""

    def __init__(self, *words: str, **env: str) -> None:
        self.mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tuppence", "watch", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **env},
        )
        os.close(theirs)
        self.said = b""

    def until(self, words: bytes) -> None:
        while words not in self.said:
            self.said += self._read()

    def rest(self) -> int:
        while more := self._read():
            self.said += more
        os.close(self.mine)
        return self.process.wait(30)

    def _read(self) -> bytes:
        try:
            return os.read(self.mine, 65536)
        except OSError:  # Linux: nobody writes any more
            return b""


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_a_terminal_is_left_as_it_was(folder: RunFolder) -> None:
    terminal = Terminal(str(folder.path), "--every", "0.1", NO_COLOR="1")
    terminal.until(b"Ctrl-C leaves")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.rest() == 0
    assert b"Traceback" not in terminal.said
    assert terminal.said.count(b"\x1b[?1049h") == terminal.said.count(b"\x1b[?1049l") == 1
    assert b"\x1b[32m" not in terminal.said
    assert "⠉".encode() in terminal.said or "⠒".encode() in terminal.said


@pytest.mark.parametrize("how", ["missing", "ascii"])
def test_without_rich_or_its_letters_there_are_lines(
    folder: RunFolder,
    how: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder.event("end", "finished", attempt=1, peak_memory_gib=0.7)

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if how == "ascii" else "utf-8")
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", out)
    if how == "missing":
        monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["watch", str(folder.path)]) == 0
    assert "lines in place of a screen" in capsys.readouterr().err
    assert out.buffer.getvalue().startswith(b"small  finished")  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the list


@pytest.fixture
def several(tmp_path: Path, plan: Plan) -> Path:
    """A run that is dead, one that has finished, one that is damaged, one that was only asked."""
    root = tmp_path / "all"
    beats(planned(root / "dead", plan, began=3000), silent=1000)
    done = planned(root / "done", plan, began=2000)
    train(done, range(1, 5))
    done.append("evals", {"step": 4, "attempt": 1, "loss": 1.25, "bpb": 1.8, "tokens": 5})
    done.event("end", "finished", attempt=1, peak_memory_gib=0.7)
    harmed = planned(root / "harmed", plan)
    with harmed.file("ledger.jsonl").open("ab") as lines:
        lines.write(b"{oh\n")
    return root


def test_a_line_for_each_run(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "runs", "--runs", str(several)).splitlines()
    words = [line.split() for line in lines]
    assert [each[:2] for each in words] == [
        ["dead", "dead"],
        ["done", "finished"],
        ["harmed", "damaged"],
    ]
    assert "finished  50.0%  $0.0100 of $0.0200  50s  val 1.2500 (1.800 bpb)  " in lines[1]
    assert lines[1].endswith("34m10s ago  Test CPU, 2 threads")
    assert lines[2].endswith("ledger.jsonl is damaged: a line is not JSON")


def test_the_same_as_a_document(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(told(capsys, "runs", "--runs", str(several), "--json"))["runs"]
    assert [row["name"] for row in rows] == ["dead", "done", "harmed"]
    assert [row["state"] for row in rows] == ["dead", "finished", "damaged"]
    assert [row["finished"] for row in rows] == [False, True, False]
    assert rows[1]["val_loss"] == 1.25
    assert rows[0]["usd"] == pytest.approx(0.011)
    assert rows[0]["progress"] == pytest.approx(0.55)
    assert rows[0]["resume"] == "tuppence run name=dead"
    assert rows[2]["usd"] is None


def test_letters_that_a_terminal_has_not_are_replaced(
    several: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(several / "évil", plan)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["runs", "--runs", str(several)]) == 0
    out.flush()
    assert b"\n?vil " in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_columns_are_cut_to_the_screen(several: Path) -> None:
    rows = watching._here(several)
    cells = [watching._cells(row) for row in rows]
    assert all(len(line) <= 50 for line in watching._table(cells, 50))
    assert max(len(line) for line in watching._table(cells, None)) > 90
    assert watching._table([], 80) == []
    harmed = [each for each in cells if len(each) == 3]
    assert len(watching._table(harmed, 200)) == 1


# ---------------------------------------------------------------- on a bucket


class Traffic:
    """Bytes that came from a bucket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.names = 0, []
        for verb in ("read", "read_range"):
            patched(monkeypatch, verb, self._given)
        patched(monkeypatch, "fetch", self._fetched)

    def _given(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(there: store.Store, name: str, *rest: Any) -> Any:
            found = ask(there, name, *rest)
            self._note(name, len(found or b""))
            return found

        return asked

    def _fetched(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        def asked(there: store.Store, name: str, local: Path) -> None:
            fetch(there, name, local)
            self._note(name, local.stat().st_size)

        return asked

    def _note(self, name: str, size: int) -> None:
        self.bytes += size
        self.names.append(name.rpartition("/")[2])

    def since(self) -> tuple[int, list[str]]:
        found = self.bytes, sorted(set(self.names))
        self.bytes, self.names = 0, []
        return found


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(monkeypatch)


def lines(folder: RunFolder, count: int, *, seed: int = 0, name: str = "metrics") -> None:
    draw = random.Random(seed)
    for number in range(count):
        folder.append(name, {"step": number, "attempt": 1, "tokens": 5, "loss": draw.random()})


def same(here: RunFolder, there: RunFolder, name: str = "metrics.jsonl") -> bool:
    return here.file(name).read_bytes() == there.file(name).read_bytes()


def test_only_what_is_new_comes(url: str, tmp_path: Path, traffic: Traffic) -> None:
    folder = begun(tmp_path / "x")
    lines(folder, 1000)
    mirrored(folder, url)
    onlooker = bucket.onlooker(url)
    traffic.since()
    onlooker.look()
    first, _ = traffic.since()
    assert first > 50_000
    assert same(onlooker.folder, folder)
    onlooker.look()
    again, _ = traffic.since()
    assert again < (300 if url.startswith("s3") else 4000)  # others tell no content by a tag
    lines(folder, 10, seed=1)
    mirrored(folder, url)
    traffic.since()
    onlooker.look()
    grown, names = traffic.since()
    assert "metrics.jsonl" in names
    assert grown < 6000
    assert same(onlooker.folder, folder)
    folder = begun(tmp_path / "x", attempt=2, token="bbbb2222")  # whose lines go on
    mirrored(folder, url)
    traffic.since()
    onlooker.look()
    assert traffic.since()[0] < 6000
    assert same(onlooker.folder, folder)


def test_fetched_too_brings_only_what_is_new(s3: str, tmp_path: Path, traffic: Traffic) -> None:
    folder = begun(tmp_path / "x")
    lines(folder, 1000)
    mirrored(folder, s3)
    assert same(bucket.fetched(s3, None), folder)
    lines(folder, 10, seed=1)
    mirrored(folder, s3)
    traffic.since()
    found = bucket.fetched(s3, None)
    grown, names = traffic.since()
    assert (grown < 6000, "metrics.jsonl" in names, "plan.json" in names) == (True, True, False)
    assert same(found, folder)
    found.file("metrics.jsonl").write_bytes(b"")  # whatever happened to the copy
    assert same(bucket.fetched(s3, None), folder)


def test_another_file_comes_whole(url: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    lines(folder, 100)
    mirrored(folder, url)
    onlooker = bucket.onlooker(url)
    onlooker.look()
    for count, seed in ((200, 1), (200, 2)):  # longer, as long
        folder.file("metrics.jsonl").write_bytes(b"")
        lines(folder, count, seed=seed)
        mirrored(folder, url)
        onlooker.look()
        assert same(onlooker.folder, folder)


def test_a_month_of_lines_comes_thinned(
    s3: str, tmp_path: Path, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "END_BYTES", 8 << 10)
    monkeypatch.setattr(looking, "PIECE_BYTES", 1 << 10)
    folder = begun(tmp_path / "x")
    folder.file("metrics.jsonl").write_bytes(b"")
    lines(folder, 20_000)
    mirrored(folder, s3)
    onlooker = bucket.onlooker(s3)
    onlooker.look()
    assert traffic.since()[0] < 80_000  # of more than a million
    found = history.read(onlooker.folder)
    assert len(found) > 600
    assert found.last == list(folder.rows("metrics"))[-1]
    assert np.diff(found["step"]).max() < 500  # from one end to the other
    every = {row["step"]: row["loss"] for row in folder.rows("metrics")}
    assert all(every[s] == loss for s, loss in zip(found["step"], found["loss"], strict=True))
    for number in range(20_000, 20_010):
        folder.append("metrics", {"step": number, "attempt": 1, "tokens": 5, "loss": 1.0})
    mirrored(folder, s3)
    traffic.since()
    onlooker.look()
    assert traffic.since()[0] < 6000
    assert history.read(onlooker.folder)["step"][-11:].tolist() == list(range(19_999, 20_010))


def test_a_run_on_a_bucket_is_watched(
    s3: str,
    folder: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder.write_json("attempt.json", {"attempt": 1, "token": "aaaa1111"})
    mirrored(folder, s3)
    assert "x  ● training" in told(capsys, "watch", s3, "--once")
    runs, _, name = s3.rpartition("/")
    found = json.loads(told(capsys, "watch", name, "--runs", runs, "--json"))
    assert (found["state"], found["step"]) == ("running", 300)
    rows = json.loads(told(capsys, "runs", "--runs", runs, "--json"))["runs"]
    assert [(row["name"], row["state"], row["step"]) for row in rows] == [("x", "running", 300)]
    assert rows[0]["usd"] == pytest.approx(0.011)
    assert cli.main(["watch", f"{runs}/nope"]) == 2
    assert "no run 'nope'" in capsys.readouterr().err


def test_a_bucket_that_goes_away_is_said_and_tried_again(
    memory: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_json("attempt.json", {"attempt": 1, "token": "aaaa1111"})
    mirrored(folder, memory)
    seen = watching._watched(Namespace(run=memory, runs="runs"))
    seen.look()

    def away(*_: object) -> None:
        raise store.Away("cannot list memory://bucket: no route")

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "entries", lambda *_, **__: away())
        seen.look()
        text = screen.as_text(seen.frame(100, 24))
        assert "cannot list memory://bucket: no route: this is what was seen last" in text
        assert "step 300" in text
    train(folder, range(301, 305))
    mirrored(folder, memory)
    seen.look()
    assert "no route" not in screen.as_text(seen.frame(100, 24))
    assert seen.now.step == 304


def test_a_run_that_this_machine_trains_to_a_bucket_is_watched_here(
    memory: str, folder: RunFolder, plan: Plan
) -> None:
    runs, _, name = memory.rpartition("/")
    here = planned(bucket.local_root(runs) / name, plan)
    now = time.time()
    row = {"start": now - 5, "end": now, "phase": "train", "node": platform.node(), "usd": 0.001}
    here.write_beat({**row, "usd_per_hour": 0.72, "attempt": 1, "pid": os.getpid()})
    assert watching._watched(Namespace(run=memory, runs="runs")).folder.path == here.path
    here.forget_beat()
    folder.write_json("attempt.json", {"attempt": 1, "token": "aaaa1111"})
    mirrored(folder, memory)
    assert watching._watched(Namespace(run=memory, runs="runs")).folder.path != here.path


def test_no_bucket_at_all_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", "ftp://there/runs/x"]) == 2
    assert "write s3://BUCKET/FOLDER" in capsys.readouterr().err
