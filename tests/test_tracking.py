"""The run's figures to TensorBoard and W&B: the same as its files hold, and never in its way."""

import dataclasses
import json
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tuppence import config, pipeline, spending
from tuppence.cli import main
from tuppence.config import DataPlan, Plan, Run, TrackPlan
from tuppence.data.prepare import prepare
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.ledger import Meter
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.train import loop, tracking
from tuppence.train.loop import train
from tuppence.train.notes import Notes
from tuppence.train.sinks import TensorBoard
from tuppence.train.tracking import MEANS, STEP, Pile, Tracker, apart

WORDS = [
    "budget.steps=8",
    "machine.usd_per_hour=1",
    "machine.threads=1",
    "model.family=gpt2",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.sequence_len=16",
    "data.source=shakespeare",
    "data.tokenizer=char",
    "train.batch_tokens=64",
    "train.learning_rate=1e-2",
    "train.precision=fp32",
    "train.attention=matmul",
    "train.eval_every=4",
    "train.eval_tokens=64",
    "train.save_every=4",
    "train.sample_tokens=4",
    "train.tensorboard=on",
]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return prepare(source="shakespeare", tokenizer="char", root=root).folder


@pytest.fixture
def plan_of(calibration: Calibration, data_plan: DataPlan) -> Callable[..., Plan]:
    def plan_of(*words: str) -> Plan:
        return solve(config.override(Run(), [*WORDS, *words]), data_plan, calibration)

    return plan_of


@pytest.fixture
def every_step(monkeypatch: Patch) -> None:
    """However fast the steps are; what takes long to import is there."""
    pytest.importorskip("tensorboard.summary.writer.record_writer")
    monkeypatch.setattr(TensorBoard, "seconds", 0.0)


def attempt(plan: Plan, path: Path, shards: Path, number: int = 1) -> RunFolder:
    path.mkdir(exist_ok=True)
    folder = RunFolder(path)
    folder.write_json("run.json", dataclasses.asdict(config.override(Run(), WORDS)))
    meter = Meter(folder, usd_per_hour=1.0, attempt=number, start=0.0)
    meter.start = meter._since = meter.now()  # the tests' own start-up is nobody's bill
    try:
        train(plan, folder, shards, meter=meter, attempt=number)
    finally:
        meter.close()
        folder.close()
    return folder


def shown(folder: Path) -> Any:
    """What TensorBoard finds in a folder."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def curve(found: Any, tag: str) -> dict[int, float]:
    return {one.step: one.value for one in found.Scalars(tag)}


def codes(folder: RunFolder) -> list[str]:
    rows = [event["code"] for event in folder.rows("events")]
    folder.close()
    return rows


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_what_the_files_hold(plan_of, tmp_path, shards, every_step) -> None:
    folder = attempt(plan_of(), tmp_path / "run", shards)
    found = shown(folder.file("tensorboard"))
    rows = list(folder.rows("metrics"))
    for key, tag in STEP.items():
        wanted = {row["step"]: pytest.approx(row[key], rel=1e-6) for row in rows}
        assert curve(found, tag) == wanted, tag
    evals = {row["step"]: pytest.approx(row["loss"], rel=1e-6) for row in folder.rows("evals")}
    assert curve(found, "val/loss") == evals
    said = list(folder.rows("samples"))[-1]["text"]
    shown_text = found.Tensors("sample")[-1].tensor_proto.string_val[0].decode()
    assert shown_text == "".join(f"    {line}\n" for line in said.split("\n"))  # as code
    assert b"train.learning_rate | 0.01" in found.Tensors("run")[0].tensor_proto.string_val[0]
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    told = hparams.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["train.learning_rate"].number_value == 0.01
    assert told["train.tensorboard"].bool_value is True
    assert told["plan.family"].string_value == "gpt2"


def test_steps_done_again_are_there_once(
    plan_of, tmp_path, shards, every_step, monkeypatch
) -> None:
    log = loop._log

    def dying(trainer: Any, *given: Any) -> None:
        log(trainer, *given)
        if trainer.state.step == 7:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_log", dying)
        with pytest.raises(RuntimeError, match="killed"):
            attempt(plan_of(), tmp_path / "run", shards)
    before = curve(shown(tmp_path / "run" / "tensorboard"), "train/loss")
    assert sorted(before) == [1, 2, 3, 4, 5, 6, 7]
    folder = attempt(plan_of(), tmp_path / "run", shards, 2)
    points = shown(folder.file("tensorboard")).Scalars("train/loss")
    assert [one.step for one in points] == [1, 2, 3, 4, 5, 6, 7, 8]
    again = shown(folder.file("tensorboard")).Scalars("budget/usd")
    kept = {row["step"]: pytest.approx(row["usd"]) for row in folder.latest("metrics")}
    assert {one.step: one.value for one in again} == kept


def test_what_a_run_goes_back_from_is_dropped(plan_of, tmp_path) -> None:
    board = TensorBoard(RunFolder(tmp_path), plan_of(), step=0)
    for step in (1, 2, 3, 4):
        board.scalars(step, {"loss": 1.0})
    board.back(3)
    board.scalars(3, {"loss": 2.0})
    board.close({})
    assert curve(shown(tmp_path / "tensorboard"), "loss") == {1: 1.0, 2: 1.0, 3: 2.0}


def test_a_file_torn_by_a_kill_can_be_read(plan_of, tmp_path) -> None:
    board = TensorBoard(RunFolder(tmp_path), plan_of(), step=0)
    for step in (1, 2, 3):
        board.scalars(step, {"loss": float(step)})
    board.close({})
    path = next((tmp_path / "tensorboard").iterdir())
    path.write_bytes(path.read_bytes()[:-7])
    assert curve(shown(path.parent), "loss") == {1: 1.0, 2: 2.0}


def test_a_month_of_quick_steps_fits_the_disk(plan_of, tmp_path) -> None:
    board, values = TensorBoard(RunFolder(tmp_path), plan_of(), step=0), dict.fromkeys(STEP, 0.123)
    board.flush()
    path = next((tmp_path / "tensorboard").iterdir())
    before = path.stat().st_size
    board.scalars(10**7, {STEP[key]: value for key, value in values.items()})
    board.close({})
    each = path.stat().st_size - before
    rows = sum(3600 / max(TensorBoard.seconds, apart(hour)) for hour in range(30 * 24))
    assert each * rows < 200e6
    assert apart(0.99) == 0.0  # and the first hour has what the sink can take


def test_off_writes_nothing(plan_of, tmp_path, shards) -> None:
    folder = attempt(plan_of("train.tensorboard=off"), tmp_path / "run", shards)
    assert not folder.file("tensorboard").exists()


def test_it_is_on_where_tensorboard_is_installed(plan_of, monkeypatch) -> None:
    track = plan_of("train.tensorboard=none").track
    for there in (True, False):
        monkeypatch.setattr(tracking, "_installed", lambda package, there=there: there)
        assert tracking.kinds(track) == (["tensorboard"] if there else [])
        assert (tracking.closing_seconds(track) > 0) is there


# ---------------------------------------------------------------- rows on their way


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.told, self.summary = seconds, [], {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def sample(self, step: int, text: str) -> None:
        self.told.append((step, text))

    def back(self, step: int) -> None:
        self.told.append((step, "back"))

    def flush(self) -> None:
        pass

    def close(self, summary: dict[str, float]) -> None:
        self.summary = summary


def row(step: int, **figures: Any) -> dict[str, Any]:
    known = {"attempt": 1, "step": step, "mfu": 0.25, "hours": 0.1}
    return {**dict.fromkeys(STEP, 0.0), **known, **figures}


def test_rows_that_follow_closely_become_one_of_means() -> None:
    sink = Kept(seconds=1.0)
    pile = Pile(sink, step=0)
    for step in range(1, 6):
        pile.take(step / 10, "metrics", row(step, loss=float(step), usd=step / 100, lr=step / 10))
    pile.take(1.2, "metrics", row(6, loss=None, usd=0.06, lr=0.6))
    pile.close()
    assert [step for step, _ in sink.told] == [1, 6]
    last = sink.told[1][1]
    assert last["train/loss"] == (2 + 3 + 4 + 5) / 4  # a loss that is not finite is left out
    assert last["budget/usd"] == 0.06
    assert last["train/lr"] == 0.6
    assert "usd" not in MEANS
    assert sink.summary["mfu"] == 25.0


def test_rows_of_a_long_run_lie_further_apart() -> None:
    sink = Kept()
    pile = Pile(sink, step=0)
    for step in range(1, 25):
        pile.take(step / 2, "metrics", row(step, loss=float(step), hours=5.0))
    assert [step for step, _ in sink.told] == [1, 11, 21]
    assert sink.told[1][1]["train/loss"] == sum(range(2, 12)) / 10


def test_an_evaluation_is_told_with_the_steps_before_it() -> None:
    sink = Kept(seconds=9.0)
    pile = Pile(sink, step=0)
    for step in (1, 2, 3):
        pile.take(step / 10, "metrics", row(step))
    judged = {"step": 3, "attempt": 1, "loss": 2.5, "bpb": None}
    pile.take(0.4, "evals", judged)
    pile.take(0.5, "evals", {**judged, "core": {"score": 0.1}, "hellaswag": {"acc_norm": 0.3}})
    pile.take(0.6, "samples", {"step": 3, "attempt": 1, "prompt": "a", "text": "abc"})
    assert [step for step, _ in sink.told] == [1, 3, 3, 3, 3]
    assert sink.told[2][1] == {"val/loss": 2.5}
    assert sink.told[3][1] == {"tasks/core": 0.1, "tasks/hellaswag": 0.3}
    assert sink.told[4][1] == "abc"


def test_going_back_is_seen_from_the_rows() -> None:
    sink = Kept()
    pile = Pile(sink, step=10)
    pile.take(0.0, "metrics", row(11))
    pile.take(0.1, "metrics", row(12))
    pile.take(0.2, "metrics", row(11))  # a rewind to 10
    pile.take(0.3, "metrics", row(12))
    pile.take(0.4, "evals", {"step": 11, "attempt": 1, "loss": 2.0})  # back at 11: an early stop
    pile.take(0.5, "metrics", row(12))
    backs = [(index, step) for index, (step, what) in enumerate(sink.told) if what == "back"]
    assert backs == [(2, 11), (5, 12)]


def test_the_summary_is_that_of_the_guide() -> None:
    """Of 001: iter, lr, mfu in percent, train/loss, val/loss."""
    sink = Kept()
    pile = Pile(sink, step=0)
    pile.take(0.0, "metrics", row(6000, lr=6e-5, loss=3.2568, mfu=0.1370159))
    pile.take(0.1, "evals", {"step": 6000, "attempt": 1, "loss": 3.26934})
    pile.close()
    assert sink.summary == {
        "iter": 6000,
        "lr": 6e-5,
        "mfu": pytest.approx(13.70159),
        "train/loss": 3.2568,
        "val/loss": 3.26934,
    }


# ---------------------------------------------------------------- never in the run's way


def test_a_tracker_that_hangs_drops_rows_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(tracking, "MOST_WAITING", 5)
    monkeypatch.setitem(tracking.CLOSE_SECONDS, "tensorboard", 0.01)
    free, told = threading.Event(), []

    def hangs() -> Kept:
        free.wait()
        return Kept()

    tracker = Tracker("tensorboard", hangs, lambda *said: told.append(said), step=0)
    for step in range(1, 100):
        tracker.tell("metrics", row(step))
    tracker.close()
    tracker.tell("metrics", row(100))
    assert [code for code, *_ in told] == ["tracking_behind", "tracking_behind"]
    assert "does not keep up" in told[0][1]
    assert "the last steps may be missing" in told[1][1]
    free.set()
    tracker._thread.join()


def test_a_tracker_that_fails_is_left_out(plan_of, tmp_path, shards) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "tensorboard").write_text("in the way")
    folder = attempt(plan_of(), path, shards)
    assert len(list(folder.rows("metrics"))) == 8
    failed = [event for event in folder.rows("events") if event["code"] == "tracking_failed"]
    assert len(failed) == 1
    assert "tensorboard is left out from here on (FileExistsError" in failed[0]["message"]
    assert "own files have every figure" in failed[0]["advice"]


class Full(Kept):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_fails_the_tracker_alone(monkeypatch) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(tracking, "DRAIN_SECONDS", 0.01)

    tracker = Tracker("tensorboard", Full, lambda *said: told.append(said), step=0)
    tracker._thread.join()
    tracker.tell("metrics", row(1))
    tracker.close()
    assert [code for code, *_ in told] == ["tracking_failed"]
    assert "No space left" in told[0][1]


def test_a_disk_that_takes_no_event_either_ends_nothing(tmp_path, monkeypatch) -> None:
    """Nor is there a terminal. (A thread that ended by an error would fail this test.)"""
    monkeypatch.setattr(tracking, "DRAIN_SECONDS", 0.01)
    monkeypatch.setattr(tracking, "MOST_WAITING", 0)
    monkeypatch.setattr(RunFolder, "append", full)
    trackers = [
        Tracker("tensorboard", kind, Notes(RunFolder(tmp_path), full).warn, step=0)
        for kind in (Full, Kept)
    ]
    trackers[0]._thread.join()
    assert trackers[0]._silent
    for tracker in trackers:
        tracker.tell("metrics", row(1))
        tracker.tell("metrics", row(2))
        tracker.close()


def full(*given: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


def test_closing_on_a_full_disk_hides_no_other_error(
    plan_of, tmp_path, shards, monkeypatch
) -> None:
    def first(*given: Any, **named: Any) -> None:
        monkeypatch.setattr(RunFolder, "append", full)
        raise RuntimeError("the first error")

    folder = RunFolder(tmp_path)
    folder.write_json("run.json", dataclasses.asdict(config.override(Run(), WORDS)))
    meter = Meter(folder, usd_per_hour=1.0, attempt=1, start=0.0)
    meter.start = meter._since = meter.now()
    monkeypatch.setattr(loop, "_log", first)
    with pytest.raises(RuntimeError, match="the first error"):
        train(plan_of(), folder, shards, meter=meter, attempt=1)
    folder.close()


def test_the_end_of_a_run_keeps_time_for_its_trackers(plan_of, tmp_path) -> None:
    def reserve(*words: str) -> float:
        from tuppence.train.pace import Pace

        folder = RunFolder(tmp_path)
        meter = Meter(folder, usd_per_hour=1.0, attempt=1, start=0.0)
        plan = plan_of(*words)
        found = Pace(plan, meter).reserve(0)
        folder.close()
        return found

    offline = reserve("train.tensorboard=off", "train.wandb=offline")
    off = reserve("train.tensorboard=off", "train.wandb=off")
    assert offline - off == pytest.approx(tracking.CLOSE_SECONDS["offline"])


# ---------------------------------------------------------------- W&B


def records(folder: RunFolder) -> list[Any]:
    """All that W&B's files of a run hold, in the order of attempts: LevelDB's log, of which a file
    of one block has whole records alone (crc, length, kind, a protobuf message)."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.file("wandb").glob("offline-run-*/*.wandb")):
        content = path.read_bytes()
        assert len(content) < 32768
        place = 7
        while place < len(content):
            _, length, kind = struct.unpack_from("<IHB", content, place)
            assert kind == 1
            place += 7
            message = content[place : place + length]
            found.append(wandb_internal_pb2.Record.FromString(message))
            place += length
    return found


def test_wandb_keeps_two_attempts_as_one_run_offline(
    plan_of, tmp_path, shards, monkeypatch
) -> None:
    """The second was asked for online, where nobody answers."""
    pytest.importorskip("wandb")
    from tuppence.train.sinks import Wandb

    monkeypatch.setattr(Wandb, "seconds", 0.0)
    monkeypatch.setitem(tracking.CLOSE_SECONDS, "offline", 60.0)
    monkeypatch.setitem(tracking.CLOSE_SECONDS, "online", 60.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = ["train.tensorboard=off", "train.wandb=offline", "train.wandb_project=mine"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_finish", killed)
        with pytest.raises(RuntimeError, match="killed"):
            attempt(plan_of(*words, "budget.steps=4"), tmp_path / "run", shards)
    folder = attempt(plan_of(*words, "train.wandb=online"), tmp_path / "run", shards, 2)
    offline = [event for event in folder.rows("events") if event["code"] == "tracking_offline"]
    assert len(offline) == 1
    assert "no account" in offline[0]["message"]
    there = records(folder)
    runs = [one.run for one in there if one.HasField("run")]
    assert {run.run_id for run in runs} == {folder.read_json("wandb.json")["id"]}
    assert {run.project for run in runs} == {"mine"}
    asked = {item.key: item.value_json for item in runs[0].config.update}
    assert asked["train.learning_rate"] == "0.01"
    history = [one.history.item for one in there if one.HasField("history")]
    found = [{(i.key or i.nested_key[0]): i.value_json for i in items} for items in history]
    steps = [int(items["step"]) for items in found if "train/loss" in items]
    rows = list(folder.rows("metrics"))
    assert steps == [row["step"] for row in rows]
    losses = [float(items["train/loss"]) for items in found if "train/loss" in items]
    assert losses == [row["loss"] for row in rows]
    summary = {
        (item.key or item.nested_key[0]): json.loads(item.value_json)
        for one in there
        if one.HasField("summary")
        for item in one.summary.update
    }
    assert summary["iter"] == 8
    assert summary["val/loss"] == list(folder.rows("evals"))[-1]["loss"]


def killed(trainer: Any) -> None:
    raise RuntimeError("killed")


# ---------------------------------------------------------------- what is asked


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *words, "--json"]) == 2
    found: str = json.loads(capsys.readouterr().out)["error"]["message"]
    return found


def test_what_cannot_be_had_is_refused_before_money_is_spent(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean offline" in refused(capsys, "train.wandb=ofline")
    monkeypatch.setattr(tracking, "_installed", lambda package: False)
    assert "pip install 'tuppence[wandb]'" in refused(capsys, "train.wandb=offline")
    assert "pip install 'tuppence[tensorboard]'" in refused(capsys, "train.tensorboard=on")
    assert not (tmp_path / "runs").exists()


def test_another_attempt_may_be_told_otherwise(plan_of, tmp_path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("run.json", dataclasses.asdict(config.override(Run(), WORDS)))
    other = config.override(
        Run(), [*WORDS, "train.tensorboard=off", "train.wandb=offline", "train.wandb_project=p"]
    )
    spending._check_same_run(folder, other)
    with pytest.raises(UserError, match="holds a run with"):
        spending._check_same_run(folder, config.override(other, ["train.seed=2"]))
    assert plan_of().track == TrackPlan(tensorboard=True)
    moved = pipeline.on_this_machine(plan_of(), other)
    assert moved.track == TrackPlan(tensorboard=False, wandb="offline", wandb_project="p")
