"""Thresholds watched while a run trains: each triggered on purpose, and none by a healthy run."""

import dataclasses
import math
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tuppence import config, host, spending
from tuppence.checkpoint import Point
from tuppence.config import DataPlan, Interval, Plan, Run
from tuppence.data.loader import Loader
from tuppence.data.prepare import prepare
from tuppence.folder import RunFolder
from tuppence.ledger import Meter
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.train import gauges, loop, trend
from tuppence.train.feed import Feed
from tuppence.train.gauges import Gauges, Lamp
from tuppence.train.loop import train
from tuppence.train.readings import Look, disk_words, readings
from tuppence.train.step import StepResult
from tuppence.train.trend import Rise, Trend

WORDS = [
    "budget.steps=30",
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
    "train.eval_every=30",
    "train.eval_tokens=64",
    "train.sample_tokens=0",
    "train.tensorboard=off",
]
Patch = pytest.MonkeyPatch
GIB = 2**30


class Folder(RunFolder):
    """One that keeps no file open."""

    def append(self, name: str, row: dict[str, Any]) -> None:
        super().append(name, row)
        self.close()


class Disk(NamedTuple):
    free: int


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return prepare(source="shakespeare", tokenizer="char", root=root).folder


@pytest.fixture
def plan(calibration: Calibration, data_plan: DataPlan) -> Plan:
    """Ten steps of it a second are promised, an MFU of half a peak that any machine reaches."""
    found = solve(config.override(Run(), WORDS), data_plan, calibration)
    predicted = dataclasses.replace(
        found.predicted, step_seconds=Interval(50.0, 100.0, 200.0), mfu=Interval(0.4, 0.5, 0.6)
    )
    machine = dataclasses.replace(found.machine, peak_tflops=1e-9)
    return dataclasses.replace(found, predicted=predicted, machine=machine)


class Healthy:
    """The machine's own readings, as a quiet one gives them; a test spoils one of them. Time is
    counted in steps, so that nothing depends on how busy the real machine is."""

    def __init__(self) -> None:
        self.now, self.cores, self.waited, self.held = 0.0, 1.98, 0.0, 1.0  # of two cores
        self.free = 10**12

    def monotonic(self) -> float:
        self.now += 1e-4  # of a step that is said to take as long
        return self.now


@pytest.fixture
def machine(monkeypatch: Patch) -> Healthy:
    """Every step is looked at, from the first on."""
    machine = Healthy()
    for name in ("WINDOW_SECONDS", "LEAST_SECONDS", "COLD_STEPS", "COLD_SECONDS"):
        monkeypatch.setattr(gauges, name, 0)
    clock = SimpleNamespace(
        monotonic=machine.monotonic, process_time=lambda: machine.now * machine.cores
    )
    monkeypatch.setattr(gauges, "time", clock)
    monkeypatch.setattr(host, "waited_for_cores", lambda: machine.waited * machine.now)
    monkeypatch.setattr(host, "rss_gib", lambda: machine.held)
    monkeypatch.setattr(host, "memory_gib", lambda: 10.0)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: Disk(machine.free))
    never = property(lambda feed: 0.0, lambda feed, seconds: None)
    monkeypatch.setattr(Feed, "waited", never, raising=False)
    return machine


def run(plan: Plan, path: Path, shards: Path) -> RunFolder:
    path.mkdir()
    folder = RunFolder(path)
    meter = Meter(folder, usd_per_hour=1.0, attempt=1, start=0.0)
    meter.start = meter._since = meter.now()  # the tests' own start-up is nobody's bill
    try:
        train(plan, folder, shards, meter=meter, attempt=1)
    finally:
        meter.close()
        folder.close()
    return folder


def warnings(folder: RunFolder) -> list[dict[str, Any]]:
    """What the gauges told."""
    return [event for event in folder.rows("events") if "limit" in event]


def codes(folder: RunFolder) -> list[str]:
    return [event["code"] for event in warnings(folder)]


# ---------------------------------------------------------------- in a run


def test_a_healthy_run_gives_no_warning(plan, machine, tmp_path, shards) -> None:
    folder = run(plan, tmp_path / "run", shards)
    assert codes(folder) == []
    assert "gauges_failed" not in [event["code"] for event in folder.rows("events")]
    rows = list(folder.rows("metrics"))
    assert len(rows) == 30
    assert all(0 < row["memory_gib"] < 100 for row in rows)


def spoil_cores(machine: Healthy, patch: Patch) -> None:
    machine.cores, machine.waited = 1.4, 0.6


def spoil_memory(machine: Healthy, patch: Patch) -> None:
    machine.held = 9.8


def spoil_disk(machine: Healthy, patch: Patch) -> None:
    machine.free = 1000


def spoil_data(machine: Healthy, patch: Patch) -> None:
    """Each batch takes longer than the step that it is made beside."""
    fill = Loader.fill
    patch.delattr(Feed, "waited")

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(0.02)
        return fill(*given, **named)

    patch.setattr(Loader, "fill", slow)


def spoil_loss(machine: Healthy, patch: Patch) -> None:
    """Losses that climb out of their noise: what a step learns is as before."""
    step, count = loop.train_step, iter(range(10**6))

    def climbing(*given: Any, **named: Any) -> StepResult:
        result = step(*given, **named)
        return dataclasses.replace(result, loss=result.loss + 0.5 * next(count))

    patch.setattr(loop, "train_step", climbing)
    patch.setattr(trend, "LEAST_STEPS", 1)


def spoil_rate(plan: Plan) -> Plan:
    """A promise that no machine keeps."""
    predicted = dataclasses.replace(plan.predicted, step_seconds=Interval(1e-9, 1e-9, 1e-9))
    return dataclasses.replace(plan, predicted=predicted)


def spoil_mfu(plan: Plan) -> Plan:
    """A peak that no machine has."""
    machine = dataclasses.replace(plan.machine, peak_tflops=1e9)
    return dataclasses.replace(plan, machine=machine)


@pytest.mark.parametrize(
    ("code", "spoil", "advice"),
    [
        ("low_utilisation", spoil_cores, "something else uses these cores"),
        ("high_memory", spoil_memory, "train.micro_batch=1"),
        ("low_disk", spoil_disk, "make room"),
        ("data_wait", spoil_data, "data.cache_gb"),
        ("loss_rising", spoil_loss, "train.learning_rate=0.01"),
        ("low_throughput", spoil_rate, "tuppence calibrate"),
        ("low_mfu", spoil_mfu, "tuppence calibrate"),
    ],
)
def test_each_threshold_is_told_once_with_what_to_do(
    plan, machine, tmp_path, shards, monkeypatch, capsys, code, spoil, advice
) -> None:
    if spoil in (spoil_rate, spoil_mfu):
        plan = spoil(plan)
    else:
        spoil(machine, monkeypatch)
    folder = run(plan, tmp_path / "run", shards)
    assert codes(folder) == [code]
    event = warnings(folder)[0]
    assert event["also"] == {}
    low = code.startswith("low")
    assert event["value"] < event["limit"] if low else event["value"] > event["limit"]
    assert advice in event["advice"]
    said = [line for line in capsys.readouterr().err.splitlines() if f"[{code}]" in line]
    assert len(said) == 1
    assert event["message"] in said[0]
    assert event["advice"] in said[0]


def test_what_is_over_is_said_too(plan, machine, tmp_path, shards, monkeypatch) -> None:
    """Memory fills, is given back, and fills again."""
    held = iter([1.0] * 5 + [9.8] * 5 + [9.6] * 5 + [5.0] * 5 + [9.8] * 20)
    monkeypatch.setattr(host, "rss_gib", lambda: next(held))
    folder = run(plan, tmp_path / "run", shards)
    assert codes(folder) == ["high_memory", "recovered", "high_memory"]
    assert warnings(folder)[1]["of"] == "high_memory"


def test_one_cause_is_one_warning(plan, machine, tmp_path, shards) -> None:
    """Cores that others use show on three gauges; the dearest is told, with the others."""
    machine.cores, machine.waited = 1.0, 1.2
    folder = run(spoil_mfu(spoil_rate(plan)), tmp_path / "run", shards)
    assert codes(folder) == ["low_throughput"]
    event = warnings(folder)[0]
    assert event["also"]["low_utilisation"] == pytest.approx(0.5)
    assert sorted(event["also"]) == ["low_mfu", "low_utilisation"]
    assert "something else uses these cores" in event["advice"]


def test_a_cause_is_over_when_no_gauge_shows_it(plan, tmp_path) -> None:
    watching = Gauges(plan, Folder(tmp_path), lambda text: None)
    looks = [
        *[dataclasses.replace(LOOK, utilisation=0.5)] * 2,  # told
        *[dataclasses.replace(LOOK, utilisation=0.5, tokens_per_second=0.0)] * 2,  # the same again
        *[dataclasses.replace(LOOK, tokens_per_second=0.0)] * 2,
        *[dataclasses.replace(LOOK, tokens_per_second=0.0, data=0.15)] * 2,  # another cause
        *[dataclasses.replace(LOOK, utilisation=None)] * 2,
    ]
    seen = []
    for step, look in enumerate(looks):
        before = len(warnings(Folder(tmp_path)))
        watching._judge(look, step)
        new = warnings(Folder(tmp_path))[before:]
        seen += [(step, event["code"], event.get("of")) for event in new]
    assert seen[:2] == [(1, "low_utilisation", None), (7, "data_wait", None)]
    assert sorted(seen[2:]) == [(9, "recovered", "data_wait"), (9, "recovered", "low_utilisation")]


@pytest.mark.parametrize("broken", ["disk", "gauge"])
def test_what_breaks_in_a_gauge_is_not_the_end(
    plan, machine, tmp_path, shards, monkeypatch, broken
) -> None:
    """A disk that does not say what is free; anything else, on a disk that takes no event."""

    def fails(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    event = RunFolder.event

    def full(folder: RunFolder, code: str, *given: Any, **details: Any) -> None:
        fails() if "limit" in details or code == "gauges_failed" else event(
            folder, code, *given, **details
        )

    machine.held = 9.8
    if broken == "disk":
        monkeypatch.setattr(host.shutil, "disk_usage", fails)
    else:
        monkeypatch.setattr(RunFolder, "event", full)
        monkeypatch.setattr(Trend, "add", fails)
    folder = run(plan, tmp_path / "run", shards)
    assert len(list(folder.rows("metrics"))) == 30
    assert codes(folder) == (["high_memory"] if broken == "disk" else [])


def test_the_first_steps_say_nothing(plan, machine, tmp_path, shards, monkeypatch) -> None:
    monkeypatch.setattr(gauges, "COLD_SECONDS", 1e9)
    machine.held = 9.8
    assert codes(run(plan, tmp_path / "run", shards)) == []


def test_a_short_run_is_looked_at_every_twentieth_of_it(
    plan, machine, tmp_path, monkeypatch
) -> None:
    """And a long one every ten seconds, of which a second is the least."""
    monkeypatch.setattr(gauges, "WINDOW_SECONDS", 10.0)
    monkeypatch.setattr(gauges, "LEAST_SECONDS", 1.0)
    seen: list[int] = []
    watching = Gauges(plan, Folder(tmp_path), lambda text: None)
    monkeypatch.setattr(watching, "_judge", lambda look, step: seen.append(step))
    for step, (seconds, progress) in enumerate(
        [(0.1, 0), (0.5, 0.9), (2, 0.94), (2, 0.96), (3, 0.9600), (9, 0.9601)], 1
    ):
        machine.now += seconds
        feed(watching, step, first=step, progress=progress)
    assert seen == [3, 6]


def test_only_the_rank_that_leads_watches(plan, machine, tmp_path) -> None:
    machine.held = 9.9
    watching = Gauges(plan, Folder(tmp_path), lambda text: None, silent=True)
    feed(watching, 10)
    assert codes(Folder(tmp_path)) == []


def feed(watching: Gauges, steps: int, *, first: int = 1, **figures: float) -> None:
    """Rows of steps, without the training."""
    row = {"loss": 1.0, "progress": 0.5, "step_seconds": 1e-4, "data_wait": 0.0, "mfu": 0.5}
    for step in range(first, steps + 1):
        watching.seen({**row, "tokens_per_second": 1e9, "step": step, **figures}, work=1.0)


def test_a_step_after_an_evaluation_does_not_count_as_idle(plan, machine, tmp_path) -> None:
    """Between its end and the one before lies what is no step's."""
    watching = Gauges(plan, Folder(tmp_path), lambda text: None)
    feed(watching, 10)
    machine.cores = 0.1
    feed(watching, 10, step_seconds=1e-9)
    assert codes(Folder(tmp_path)) == []


def overfitted(count: int) -> tuple[Point, ...]:
    """Evaluations whose val loss rises from the tenth on, while the training loss falls."""
    noise = random.Random(1)
    return tuple(
        Point(
            step=100 + 10 * i,
            tokens=int(1e6 * 1.05**i),
            val_loss=2.0 + 0.004 * (i - 10) ** 2 + noise.gauss(0, 0.003),
            train_loss=2.0 - 0.05 * i + noise.gauss(0, 0.003),
            trained=10,
        )
        for i in range(count)
    )


@pytest.mark.parametrize("acts", [False, True])
def test_overfitting_is_told_once_where_nothing_acts_on_it(plan, tmp_path, acts) -> None:
    plan = _with(plan, cadence=dataclasses.replace(plan.cadence, early_stop=acts))
    watching = Gauges(plan, Folder(tmp_path), lambda text: None)
    for count in range(1, 30):
        watching.judged(overfitted(count))
    events = warnings(Folder(tmp_path))
    assert [event["code"] for event in events] == ([] if acts else ["overfitting"])
    for event in events:
        assert "best weights, of step 200" in event["advice"]
        assert event["value"] > event["limit"]


# ---------------------------------------------------------------- readings


LOOK = Look(0.99, 1.0, 10.0, 0.5, 1e9, 0.0, 0.0, 1e12, None)


def told(plan: Plan, **changes: Any) -> dict[str, str]:
    """What is amiss in such a look, and what to do about it."""
    found = readings(plan, dataclasses.replace(LOOK, **changes))
    return {one.code: one.advice for one in found if one.limit.beyond(one.value)}


def test_limits_are_those_of_people_who_watch_runs(plan: Plan) -> None:
    promised = plan.step.batch_tokens / plan.predicted.step_seconds.mid
    assert told(plan) == {}
    assert [*told(plan, utilisation=0.79)] == ["low_utilisation"]
    assert told(plan, utilisation=0.81) == {}
    assert [*told(plan, held_gib=79.0, memory_gib=80.0)] == ["high_memory"]
    assert told(plan, held_gib=77.0, memory_gib=80.0) == {}
    assert [*told(plan, mfu=0.149)] == ["low_mfu"]
    assert told(_planned(plan, 0.13), mfu=0.05) == {}  # the plan has said it
    assert told(_planned(plan, 0.16), mfu=0.145) == {}
    assert [*told(_planned(plan, 0.16), mfu=0.143)] == ["low_mfu"]
    assert [*told(plan, tokens_per_second=promised * 29 / 50)] == ["low_throughput"]
    assert told(plan, tokens_per_second=promised * 31 / 50) == {}
    assert [*told(plan, data=0.11)] == ["data_wait"]
    assert [*told(plan, disk_free=1.9 * plan.predicted.checkpoint_bytes)] == ["low_disk"]
    assert [*told(plan, rise=Rise(2.0, 2.2, 0.1, 500))] == ["loss_rising"]
    assert told(plan, rise=Rise(2.0, 2.05, 0.1, 500)) == {}


def test_the_advice_follows_the_numbers(plan: Plan) -> None:
    def idle(**changes: Any) -> str:
        return told(plan, utilisation=0.5, **changes)["low_utilisation"]

    assert "21% of the time no batch is there" in idle(data=0.21)
    assert "wait for one 40% of the time" in idle(cores=0.4)
    assert "wait for one 100% of the time" in idle(cores=1.35)
    for little in ({}, {"cores": 0.19}, {"data": 0.09}):
        assert "small for this machine" in idle(**little)
    busy = told(plan, utilisation=0.95, cores=0.5, tokens_per_second=0.0)
    assert "tuppence calibrate" in busy["low_throughput"]  # nobody else had these cores
    step = dataclasses.replace(plan.step, micro_batch=1)
    assert "smaller model" in told(_with(plan, step=step), held_gib=9.9)["high_memory"]
    gpu = dataclasses.replace(plan.machine, device="cuda")
    on_gpu = _with(plan, machine=gpu, step=step)
    assert "larger train.micro_batch" in told(on_gpu, utilisation=0.5)["low_utilisation"]
    assert "nvidia-smi" in told(on_gpu, tokens_per_second=0.0)["low_throughput"]


def _with(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, **changes)


def _planned(plan: Plan, mfu: float) -> Plan:
    return _with(plan, predicted=dataclasses.replace(plan.predicted, mfu=Interval(0, mfu, 1)))


def test_bytes_are_told_in_a_unit_that_shows_them() -> None:
    message, _ = disk_words(999, 2_345_678, "checkpoints take")
    assert message == "999 bytes are free on the disk, checkpoints take 2.3 MB"


def test_a_value_at_its_limit_is_said_once(plan: Plan) -> None:
    """It must be amiss twice in a row, and then well back twice in a row."""
    lamp, seen = Lamp(), [False]
    for value in (0.79, 0.81, 0.79, 0.79, 0.81, 0.79, 0.81, 0.86, 0.84, 0.86, 0.86):
        look = dataclasses.replace(LOOK, utilisation=value)
        one = next(r for r in readings(plan, look) if r.code == "low_utilisation")
        lamp.change(one)
        seen.append(lamp.lit)
    assert [n for n, (a, b) in enumerate(pairwise(seen)) if a is not b] == [3, 10]


# ---------------------------------------------------------------- a loss that rises


def rises(losses: list[float]) -> bool:
    """Whether the test ever says so, asked at every step that ends a block."""
    trend, seen = Trend(), False
    for step, loss in enumerate(losses, 1):
        trend.add(step, loss)
        if trend._count == 0:
            found = trend.rise()
            seen = seen or (found is not None and found.after > found.before + found.noise)
    return seen


@pytest.mark.parametrize("kind", ["flat", "falling", "lasting noise"])
def test_a_noisy_loss_that_does_not_rise_is_not_said_to(kind: str) -> None:
    for seed in range(20):
        draw, drift = random.Random(seed), 0.0
        losses = []
        for step in range(4000):
            drift = 0.98 * drift + draw.gauss(0, 0.004) if kind == "lasting noise" else 0.0
            mean = 3.0 + (step + 1) ** -0.3 if kind == "falling" else 3.0
            losses.append(mean + drift + draw.gauss(0, 0.1))
        assert not rises(losses), seed


def test_a_loss_that_rises_slowly_is_seen() -> None:
    """5% in half of the run, less than the noise of one step."""
    for seed in range(20):
        draw = random.Random(seed)
        losses = [3 + max(0, i - 2000) * 0.15 / 2000 + draw.gauss(0, 0.2) for i in range(4000)]
        assert rises(losses), seed


def test_a_run_that_goes_back_begins_its_losses_anew() -> None:
    trend = Trend()
    for step in range(1, 3001):
        trend.add(step, 1.0)
    assert trend.rise() is not None
    trend.add(100, 5.0)
    assert trend.rise() is None


# ---------------------------------------------------------------- the machine


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: Patch) -> Callable[[str], None]:
    """Makes an nvidia-smi that says this."""

    def smi(says: str) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{says}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return smi


def test_the_least_used_gpu_of_the_run_counts(smi) -> None:
    smi("echo GPU-aa-1, 97; echo GPU-bb-2, 64; echo GPU-cc-3, 0")
    assert host.gpu_use(["aa-1", "bb-2"]) == 0.64
    assert host.gpu_use(["dd-4"]) is None
    smi("echo 'GPU-aa-1, [N/A]'")
    assert host.gpu_use(["aa-1"]) is None
    smi("exit 9")
    assert host.gpu_use(["aa-1"]) is None


def on_a_gpu(plan: Plan, machine: Healthy, patch: Patch, path: Path) -> tuple[Gauges, list[str]]:
    """Gauges of a run on a GPU, with the lines they say; each question is answered at once."""
    one = SimpleNamespace(uuid="aa-1", total_memory=10 * GIB)
    patch.setattr(torch.cuda, "get_device_properties", lambda index: one)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "memory_reserved", lambda: int(machine.held * GIB))
    patch.setattr(gauges, "CARD_SECONDS", 0.0)

    class AtOnce:
        def __init__(self, target: Callable[[], None], **named: Any) -> None:
            self.start = target

        def is_alive(self) -> bool:
            return False

    patch.setattr(gauges.threading, "Thread", AtOnce)
    said: list[str] = []
    gpu = dataclasses.replace(plan.machine, device="cuda")
    return Gauges(_with(plan, machine=gpu), Folder(path), said.append), said


def test_a_gpu_that_idles_is_told(plan, machine, monkeypatch, tmp_path, smi) -> None:
    watching, said = on_a_gpu(plan, machine, monkeypatch, tmp_path)
    smi("echo GPU-aa-1, 41")
    feed(watching, 10)
    assert codes(Folder(tmp_path)) == ["low_utilisation"]
    assert "the GPU used 41% of the time" in said[0]


def test_a_card_that_is_full_is_told(plan, machine, monkeypatch, tmp_path, smi) -> None:
    watching, said = on_a_gpu(plan, machine, monkeypatch, tmp_path)
    smi("echo GPU-aa-1, 99")
    machine.held = 9.9
    feed(watching, 10)
    assert codes(Folder(tmp_path)) == ["high_memory"]
    assert "9.9 of 10.0 GiB" in said[0]


def test_that_nvidia_smi_is_missing_is_said_once(plan, machine, monkeypatch, tmp_path, smi) -> None:
    watching, _ = on_a_gpu(plan, machine, monkeypatch, tmp_path)
    smi("exit 1")
    feed(watching, 20)
    events = [event["code"] for event in Folder(tmp_path).rows("events")]
    assert events == ["no_nvidia_smi"]


def test_what_this_process_holds_and_waits_for() -> None:
    held, peak = host.rss_gib(), host.peak_rss_gib()
    if held is None:
        pytest.skip("this system does not say")
    assert 0.01 < held <= peak
    waited = host.waited_for_cores()
    assert waited is not None
    assert math.isfinite(waited)
    assert waited >= 0


def test_a_disk_that_is_too_small_is_told_before_the_run(
    plan, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: Disk(1000))
    spending._warn_of_disk(Folder(tmp_path), plan)
    event = warnings(Folder(tmp_path))[0]
    assert event["code"] == "low_disk"
    assert event["value"] == 1000
    assert event["limit"] == plan.predicted.disk_bytes
    assert event["advice"] in capsys.readouterr().err


def test_a_run_that_was_planned_before_early_stop_says_so_once(plan, tmp_path) -> None:
    folder, document = Folder(tmp_path), dataclasses.asdict(plan)
    folder.write_json("plan.json", document)
    spending._warn_of_no_stop(folder, Run())
    assert list(folder.rows("events")) == []
    del document["cadence"]["early_stop"]
    folder.write_json("plan.json", document)
    spending._warn_of_no_stop(folder, config.override(Run(), ["train.early_stop=off"]))
    assert list(folder.rows("events")) == []
    for _ in range(2):
        spending._warn_of_no_stop(folder, Run())
    assert [event["code"] for event in folder.rows("events")] == ["no_early_stop"]
