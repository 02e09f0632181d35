"""The receipt of a run folder made by hand: equal to its golden files, true to the ledger.

`TUPPENCE_WRITE_GOLDEN=1 pytest tests/test_report.py` writes tests/golden/ anew; read the difference
before it is kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tuppence import report
from tuppence.config import Budget, DataPlan, Interval, Plan, Predicted, Run, Warning
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.live import duration
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.plot import loss_plot, score_plot, smooth
from tuppence.report.text import headline


def built(folder: RunFolder) -> dict:
    """The receipt's document."""
    return report.build(folder, folder.latest("metrics"), folder.latest("evals"))


GOLDEN = Path(__file__).parent / "golden"
T0 = 1_767_225_600.0  # 2026-01-01, midnight


def promised() -> Predicted:
    """Fixed numbers: the receipt is tested here, not the planner."""

    def around(mid: float) -> Interval:
        return Interval(0.8 * mid, mid, 1.25 * mid)

    return Predicted(
        step_seconds=around(0.25),
        tokens_per_second=around(2048.0),
        mfu=around(0.25),
        steps=around(640.0),
        tokens=around(327_680.0),
        hours=around(0.05),
        usd=around(0.02),
        phase_seconds={"provision": 3.0, "train": 160.0, "evaluate": 10.0, "save": 7.0},
        eval_seconds=10.0,
        save_seconds=1.0,
        peak_memory_gib=around(0.5),
        checkpoint_bytes=1_000_000,
        disk_bytes=4 * 1_000_000,
        epochs=0.33,
        val_loss=Interval(1.9, 2.0, 2.1),
        val_loss_source="fit of 5 runs of this recipe",
        basis="measured by calibrate",
    )


@pytest.fixture
def plan(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Plan:
    """Two cents at 40 cents an hour: 180 seconds."""
    solved = solve(small_run, data_plan, calibration)
    ceiling = 512 / 0.25 * solved.model.flops_per_token / 0.25 / 1e12  # so that MFU is 25%
    machine = dataclasses.replace(
        solved.machine, precision="bf16", peak_tflops=ceiling, peak_source="the bf16 ceiling here"
    )
    return dataclasses.replace(
        solved,
        machine=machine,
        predicted=promised(),
        warnings=(Warning("epochs_4", "5.0 epochs: <beyond> 4"),),
    )


SAMPLE = "\nROMEO:\n<script>alert('x')</script> & ```so``` {{ROWS}}\n"


def fill(folder: RunFolder, plan: Plan) -> None:
    """Two attempts: 9 steps, killed; resumed from step 2, then 4 more to the end."""
    folder.write_json("plan.json", dataclasses.asdict(plan))
    folder.write_json("env.json", {"code_sha256": "c" * 64})
    folder.file("argv.txt").write_text("tuppence run small budget.usd=0.02\n")
    folder.checkpoints.mkdir()
    best = {"step": 4, "path": "step_00000004", "sha256": "d" * 64}
    folder.file("checkpoints/best.json").write_text(json.dumps(best))

    def charge(attempt: int, phases: list[tuple[str, float, float]]) -> None:
        for phase, start, end in phases:
            row: dict[str, Any] = {"start": T0 + start, "end": T0 + end, "phase": phase}
            row |= {"node": "here", "usd_per_hour": 0.4, "usd": (end - start) / 3600 * 0.4}
            folder.append("ledger", {**row, "attempt": attempt})

    def step(attempt: int, number: int, loss: float) -> None:
        row = {"step": number, "attempt": attempt, "tokens": 512 * number, "loss": loss}
        row |= {"lr": 1e-3, "grad_norm": 1.0, "step_seconds": 0.5, "tokens_per_second": 1024.0}
        row |= {"mfu": 0.125, "usd": 0.001, "progress": number / 6, "tokens_sha": f"{number}" * 64}
        folder.append("metrics", row)

    def evaluated(attempt: int, number: int, loss: float, text: str) -> None:
        row = {"step": number, "attempt": attempt, "split": "val", "loss": loss, "bpb": loss / 0.7}
        row |= {"tokens": 1000, "of_tokens": 2000, "progress": number / 6, "usd": 0.001}
        folder.append("evals", {**row, "seconds": 2.0})
        folder.append("samples", {"step": number, "attempt": attempt, "prompt": "\n", "text": text})

    def event(at: float, code: str, message: str, **details: Any) -> None:
        row = {"time": T0 + at, "code": code, "message": message, **details}
        folder.append("events", row)

    event(3, "start", "from the beginning", attempt=1, step=0)
    charge(1, [("provision", 0, 3), ("prepare", 3, 4), ("train", 4, 44)])
    for number, loss in ((1, 4.25), (2, 3.5), (3, 9.0), (4, 9.0), (9, 9.0)):
        step(1, number, loss)
    event(24, "save", "step 2", step=2)
    event(500, "resume", "from step 2", attempt=2, step=2, saved_at=T0 + 24)
    charge(2, [("provision", 497, 501), ("train", 501, 600), ("evaluate", 600, 620)])
    for number, loss in ((3, 3.0), (4, 2.5)):
        step(2, number, loss)
    evaluated(2, 4, 2.25, "early")
    event(610, "nonfinite_step", "step 5 skipped: loss <nan>", step=5)
    for number, loss in ((5, 2.25), (6, 2.0)):
        step(2, number, loss)
    charge(2, [("save", 620, 623.6), ("train", 623.6, 629)])
    evaluated(2, 6, 2.5, SAMPLE)
    event(629, "end", "finished", attempt=2, peak_memory_gib=0.75)


@pytest.fixture
def folder(tmp_path: Path, plan: Plan) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path)
    fill(made, plan)
    yield made
    made.close()


# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("name", ["receipt.json", "receipt.md"])
def test_the_receipt_equals_its_golden_file(folder: RunFolder, name: str) -> None:
    report.write(folder)
    told = folder.file(name).read_text(encoding="utf-8")
    golden = GOLDEN / name
    if os.environ.get("TUPPENCE_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(told, encoding="utf-8")
    assert told == golden.read_text(encoding="utf-8")


# ---------------------------------------------------------------- the contract


def test_what_others_rely_on_is_there(folder: RunFolder) -> None:
    told = report.write(folder)
    assert json.loads(folder.file("receipt.json").read_text()) == told
    assert told["budget"].keys() >= {"kind", "limit", "spent", "fraction"}
    assert told["best"] == {"step": 4, "val_loss": 2.25}
    assert told["hashes"].keys() >= {"code", "data", "weights"}
    shared = {"usd", "hours", "tokens", "tokens_per_second", "mfu", "peak_memory_gib"}
    shared |= {"val_loss", "val_bpb", "step_seconds"}
    assert told["predicted"].keys() == told["actual"].keys() == shared
    assert told["predicted"]["val_loss"] == {"low": 1.9, "mid": 2.0, "high": 2.1}
    assert all(part.keys() == {"phase", "seconds", "usd"} for part in told["phases"])


def test_what_was_paid(folder: RunFolder) -> None:
    told = built(folder)
    assert told["usd"] == told["actual"]["usd"] == pytest.approx(176 / 3600 * 0.4)
    assert sum(part["usd"] for part in told["phases"]) == pytest.approx(told["usd"])
    assert told["actual"]["tokens"] == 6 * 512  # what was beyond the save never happened
    assert told["actual"]["tokens_per_second"] == pytest.approx(1024.0)
    assert (told["hashes"]["weights"], told["hashes"]["tokens"]) == ("d" * 64, "6" * 64)


@pytest.mark.parametrize(
    ("budget", "kind"),
    [
        (Budget(usd=0.02, hours=1.0), "usd"),
        (Budget(usd=1.0, hours=0.05), "hours"),
        (Budget(usd=1.0, tokens=3072), "tokens"),
        (Budget(hours=10.0, steps=6), "steps"),
    ],
)
def test_the_budget_told_is_the_one_that_ended_the_run(
    folder: RunFolder, plan: Plan, budget: Budget, kind: str
) -> None:
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    told = built(folder)["budget"]
    assert told["kind"] == kind
    assert told["fraction"] == pytest.approx(told["spent"] / told["limit"])
    assert 0.97 <= told["fraction"] <= 1


def test_a_run_that_is_not_finished_says_so(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("plan.json", dataclasses.asdict(plan))
    with pytest.raises(UserError, match="no step was taken yet"):
        report.write(folder)
    assert not folder.file("receipt.json").exists()
    row = {"step": 1, "attempt": 1, "tokens": 512, "loss": 4.0, "step_seconds": 0.5}
    folder.append("metrics", {**row, "tokens_sha": "a" * 64})
    told = report.write(folder)  # no evaluation, no sample, no ledger, no environment yet
    folder.close()
    assert told["finished"] is False
    assert "small (not finished): spent $0.0000 of $0.0200 (0.0%)" in headline(told)
    nothing = {"val_loss": None, "val_bpb": None, "peak_memory_gib": None}
    assert {key: told["actual"][key] for key in nothing} == nothing
    assert told["best"] == {"step": None, "val_loss": None}
    assert "No sample was taken" in folder.file("receipt.html").read_text()


# ---------------------------------------------------------------- for reading


def test_the_terminal_text_has_every_number(folder: RunFolder) -> None:
    text = report.as_text(built(folder))
    assert text.startswith("receipt   small: spent $0.0196 of $0.0200 (97.8%); val loss 2.5000\n")
    for part in ("0.0200", "0.0196", "2m56s", "3,072", "1,024", "25%", "12%", "0.75 GiB", "lost"):
        assert part in text


def test_the_page_shows_what_others_wrote_and_loads_nothing(folder: RunFolder) -> None:
    report.write(folder)
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert re.findall(r"[a-z]*://[^\"' )<]*", page) == ["http://www.w3.org/2000/svg"]
    tags = set(re.findall(r"<([a-z]+)", page))
    assert {"table", "pre"} <= tags
    assert not {"script", "link", "img", "iframe", "object", "embed"} & tags
    picture = page[page.index("<svg") : page.index("</svg>") + 6]
    assert len(list(ElementTree.fromstring(picture).iter())) > 10  # well-formed
    assert not any(part in page for part in ("@import", "url(", '"//'))
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; ```so``` {{ROWS}}" in page
    assert page.count("{{") == 1  # the sample's own, as it is
    assert "&lt;beyond&gt;" in page
    assert "loss &lt;nan&gt;" in page
    assert page.count('class="val"') == 2


HELLASWAG = {"metric": "hellaswag", "version": 1, "n": 40, "sha256": "e" * 64, "of_items": 50}
HELLASWAG |= {"acc": 0.25, "error": 0.0675, "acc_norm": 0.275, "error_norm": 0.07, "seconds": 2.0}
HELLASWAG |= {"precision": "bf16"}


def test_scores_stand_beside_the_loss(folder: RunFolder) -> None:
    for row in folder.latest("evals"):
        folder.append("evals", {**row, "hellaswag": HELLASWAG | {"acc_norm": row["step"] / 20}})
    told = report.write(folder)
    assert told["actual"]["val_loss"] == 2.5  # the row again: it replaces the first
    assert [p["acc_norm"] for p in told["scores"]["hellaswag"]] == [0.2, 0.3]
    assert told["tasks"]["hellaswag"]["step"] == 6
    assert "bf16, step 6" in report.as_text(told)
    for name in ("receipt.md", "receipt.html"):
        page = folder.file(name).read_text(encoding="utf-8")
        assert "acc 25.00% ± 6.75%" in page
        assert "acc_norm 30.00% ± 7.00%" in page
        assert "40 of 50 items" in page
        assert "28.59%" in page  # GPT-2's
        assert "bf16, step 6" in page
        asked = "Asked during the run, in bf16, of step 6; tuppence eval asks the best checkpoint"
        assert f"{asked} (step 4) in fp32." in page
    assert folder.file("receipt.html").read_text().count("<svg") == 2


def test_what_was_evaluated_later_is_told_with_its_checkpoint(folder: RunFolder) -> None:
    place = folder.file("evaluations") / "step_00000004"
    place.mkdir(parents=True)
    loss = {"metric": "bpb", "loss": 2.25, "bpb": 3.1, "tokens": 2000}
    harness = {"metric": "lm_eval", "tasks": [{"task": "piqa", "metrics": {}}]}
    harness["tasks"][0]["metrics"]["acc"] = {"value": 0.5, "error": 0.1}  # type: ignore[index]
    for name, result in {"hellaswag": HELLASWAG, "bpb": loss, "lm_eval": harness}.items():
        (place / f"{name}.json").write_text(json.dumps(result))
    (place / "samples.json").write_text(json.dumps({"metric": "samples", "rows": []}))
    told = report.write(folder)
    assert [each["metric"] for each in told["later"]] == ["bpb", "hellaswag", "lm_eval"]
    assert told["tasks"] == {}  # of the run itself there are none
    for form in (report.as_text(told), folder.file("receipt.html").read_text(encoding="utf-8")):
        assert "step_00000004: val loss 2.2500, 3.1000 bits/byte (2,000 tokens)" in form
        assert "step_00000004: HellaSwag acc 25.00% ± 6.75%, acc_norm 27.50%" in form
        assert "step_00000004: piqa acc 0.5000 ± 0.1000" in form


@pytest.mark.parametrize(
    "damaged",
    ["[]", "{}", "7", "\xff", '{"metric": "core"}', '{"metric": "lm_eval", "tasks": 3}', "{"],
)
def test_a_file_that_is_no_result_is_left_out_and_told(folder: RunFolder, damaged: str) -> None:
    place = folder.file("evaluations") / "best"
    place.mkdir(parents=True)
    (place / "core.json").write_bytes(damaged.encode("latin-1"))
    (place / "hellaswag.json").write_text(json.dumps(HELLASWAG))
    told = report.write(folder)
    assert [each["metric"] for each in told["later"]] == ["hellaswag"]
    for name in ("receipt.md", "receipt.html"):
        page = folder.file(name).read_text(encoding="utf-8")
        assert "evaluations/best/core.json is no result of tuppence eval" in page


def test_tables_keep_their_lines(folder: RunFolder) -> None:
    for row in folder.latest("evals"):
        folder.append("evals", {**row, "hellaswag": HELLASWAG})
    report.write(folder)
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert '<pre class="table">HellaSwag' in page
    (rule,) = re.findall(r"^pre\.table \{(.*)\}$", page, re.MULTILINE)
    assert "white-space: pre;" in rule
    assert "overflow-x: auto;" in rule


def test_why_there_is_no_sample(folder: RunFolder, plan: Plan) -> None:
    cadence = dataclasses.replace(plan.cadence, sample_tokens=0, fixed_tokens=0)
    for folder_plan, own, fixed in (
        (plan, None, "not continued: the run has not come to it, or its time was up."),
        (
            dataclasses.replace(plan, cadence=cadence),
            "No sample was taken: train.sample_tokens=0, or one token each would take more than "
            "2% of the run.",
            "one token each would take more than 1% of the run.",
        ),
    ):
        folder.write_json("plan.json", dataclasses.asdict(folder_plan))
        if own:
            folder.file("samples.jsonl").unlink()
        told = report.write(folder)
        assert told["silent"][-1].endswith(fixed)
        assert len(told["silent"]) == (2 if own else 1)
        for name in ("receipt.md", "receipt.html"):
            page = folder.file(name).read_text(encoding="utf-8")
            assert fixed in page
            assert (own or "not continued") in page


def test_fixed_prompts_are_told_beside_the_runs_own(folder: RunFolder) -> None:
    row = {"step": 6, "attempt": 2, "fixed": True, "prompt": "<b>", "seed": 1, "new_tokens": 2}
    for temperature in (0.0, 0.8):
        folder.append(
            "samples", {**row, "text": f"<b> at {temperature}", "temperature": temperature}
        )
    folder.append("samples", {**row, "text": "<b> anew", "temperature": 0.8})  # went back once
    earlier = {**row, "step": 4, "text": "early", "temperature": 0.0}
    assert built(folder)["sample"] == SAMPLE
    assert [s["text"] for s in built(folder)["samples"]] == [SAMPLE, "<b> at 0.0", "<b> anew"]
    assert 'prompt    "<b> at 0.0"' in report.as_text(built(folder))
    report.write(folder)
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert "<pre><strong>&lt;b&gt;</strong> anew</pre>" in page  # the prompt apart
    assert "<b>" not in page
    folder.append("samples", earlier)  # of a rewind: what came after it never happened
    assert [s["text"] for s in built(folder)["samples"]][-1] == "early"


def test_scores_stay_in_their_frame() -> None:
    points = [(100.0, 0.02, 0.01), (200.0, 0.05, 0.02), (400.0, 0.04, 0.01)]
    svg = score_plot(points, label="CORE", x_label="tokens")
    assert svg.count("<circle") == 3
    tops = [float(y) for y in re.findall(r'class="error"[^>]* y1="([\d.]+)"', svg)]
    assert len(tops) == 3
    assert min(tops) == tops[1]  # the best score stands highest
    assert all(0 <= y <= 300 for y in tops)
    assert "nan" not in score_plot([(0.0, 0.5, 0.0)] * 2, label="CORE", x_label="tokens")


def test_the_picture_stays_in_its_frame() -> None:
    train = [(float(i), 5.0 - i / 300) for i in range(1, 1001)]
    val = [(500.0, 3.5), (1000.0, 2.0)]
    svg = loss_plot(train, val, x_label="tokens", band=((1000.0, 1.5), (1000.0, 2.5)))
    (points,) = re.findall(r'points="([^"]+)"', svg)
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert len(places) == 400
    assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in places)
    assert places == sorted(places)  # left to right; the loss falls, so y grows as well
    assert svg.count("<circle") == 2
    for little in ([], [(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(0.0, 1.0)]):
        picture = loss_plot(little, [], x_label="tokens")
        assert picture.startswith("<svg" if little else "<p>")
        assert "nan" not in picture


def test_smoothing_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1003)]
    few = smooth(points, most=100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(3.0, abs=0.05)
    assert smooth(points[:100], most=100) == points[:100]


def test_durations() -> None:
    words = {0.4: "0s", 42: "42s", 59.6: "1m00s", 185: "3m05s", 7800: "2h10m", 356400: "4d03h"}
    assert {seconds: duration(seconds) for seconds in words} == words
