"""The receipt of a run folder made by hand: equal to its golden files, true to the ledger.

`TUPPENCE_WRITE_GOLDEN=1 pytest tests/test_report.py` writes tests/golden/ anew; read the difference
before it is kept.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from canned_runs import SAMPLE, STOP, T0, canned_plan, fill
from forked import Forked, command
from known import know_this_machine

from tuppence import report
from tuppence.cli import main
from tuppence.config import Budget, DataPlan, Plan, Run
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.live import duration
from tuppence.plan.hardware import Calibration
from tuppence.plot import Series, chart, mark, smooth, stack, ticks
from tuppence.ranks import ALONE
from tuppence.report import history
from tuppence.report.figures import promise_mark
from tuppence.report.text import MOST_NOTES, MOST_OF_ONE, headline, notes


def built(folder: RunFolder) -> dict:
    """The receipt's document."""
    return report.build(folder, history.read(folder))


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def plan(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Plan:
    """Two cents at 40 cents an hour: 180 seconds."""
    return canned_plan(small_run, data_plan, calibration)


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
    assert "small (not finished): spent an unknown part of $0.0200 (0.0%)" in headline(told)
    assert "no_ledger" in report.as_text(told)
    assert told["unspent"] is None  # it is still to be spent
    nothing = {"val_loss": None, "val_bpb": None, "peak_memory_gib": None}
    assert {key: told["actual"][key] for key in nothing} == nothing
    assert told["best"] == {"step": None, "val_loss": None}
    assert "No sample was taken" in folder.file("receipt.html").read_text()


# ---------------------------------------------------------------- to the cent


TINY = [
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.sequence_len=32"),
    *("train.batch_tokens=256", "train.eval_tokens=2048", "train.sample_tokens=4"),
    *("train.save_every=10", "train.eval_every=25"),
]


def to_the_cent(folder: RunFolder, told: dict) -> None:
    """Phases, prices, budget and headline are the ledger's sum, with what a kill left open."""
    rows = list(folder.rows("ledger"))
    beat = folder.read_json("heartbeat.json")
    usd = sum(row["usd"] for row in rows) + (beat["usd"] if beat else 0.0)
    assert told["usd"] == told["actual"]["usd"] == told["budget"]["spent"] == pytest.approx(usd)
    for parts in (told["phases"], told["prices"]):
        assert sum(part["usd"] for part in parts) == pytest.approx(usd, abs=1e-9)
    hours = sum(part["seconds"] for part in told["phases"]) / 3600
    assert told["actual"]["hours"] == pytest.approx(hours)
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert f'data-key="phases.all">${usd:,.5f}<' in page
    assert f'data-key="budget.spent">${usd:,.4f}<' in page


def test_dollars_equal_the_ledger_over_a_kill_and_another_price(
    tmp_path: Path, cache_home: Path, calibration: Calibration, data_plan: DataPlan
) -> None:
    know_this_machine(calibration, data_plan, [["budget.steps=1", *TINY]])
    words = ["run", "budget.usd=0.008", "name=x", *TINY]
    first = Forked(command, [*words, "machine.usd_per_hour=3.6"], cwd=tmp_path)
    folder = RunFolder(tmp_path / "runs/x")
    while first.poll() is None and not 13 <= len(history.read(folder)) % 20 <= 16:  # after a save
        time.sleep(0.01)
    first.kill()
    first.wait()
    dead = report.write(folder)
    assert dead["finished"] is False
    assert dead["commands"]["resume"] == shlex.join(
        ["tuppence", *words, "machine.usd_per_hour=3.6"]
    )
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert "Not finished: last sign of life" in page
    assert "<dt>go on</dt>" in page
    to_the_cent(folder, dead)

    second = Forked(command, [*words, "machine.usd_per_hour=7.2"], cwd=tmp_path)
    _, said = second.communicate(timeout=120)
    assert second.wait() == 0, said
    told = json.loads(folder.file("receipt.json").read_text())
    to_the_cent(folder, told)
    assert told["usd"] <= 0.008
    assert told["attempts"] == 2
    assert [price["usd_per_hour"] for price in told["prices"]] == [3.6, 7.2]
    assert "lost" in {part["phase"] for part in told["phases"]}
    assert told["thrown_away"]["steps"] > 0
    assert told == report.build(folder, history.read(folder))  # rendered again, the same


def test_what_a_resume_says_is_lost_is_what_was_charged_since(
    folder: RunFolder, plan: Plan, tmp_path: Path
) -> None:
    """Also after an early stop: what that threw away was paid for before, and is told by it."""
    stop = {"back_to": 4, "saved_at": T0 + 591, "usd": 0.0055, "attempt": 2}
    folder.append("events", {"time": T0 + 605, "code": "early_stop", "message": "", **stop})
    from tuppence.train.setup import FIRST_STATE, Place, _say_resume

    place = Place(folder, tmp_path, 3, ranks=ALONE, fence=None, committed=print, alive=lambda: 0.0)
    said = _say_resume(place, dataclasses.replace(FIRST_STATE, step=4, saved_at=T0 + 625))
    cost = 4 / 3600 * 0.4  # four seconds of training after it was saved again
    lost = f"one step after it (${cost:.4f}) is lost and done again"
    assert said == f"resuming from step 4; {lost} (attempt 3)"
    assert [*folder.rows("events")][-1]["lost_usd"] == pytest.approx(cost)


def test_what_a_kill_left_open_is_paid_for_once(folder: RunFolder) -> None:
    before = built(folder)["usd"]
    beat = {"start": T0 + 700, "end": T0 + 709, "phase": "train", "node": "here", "attempt": 3}
    beat |= {"usd_per_hour": 0.4, "usd": 0.001}
    folder.write_beat(beat | {"pid": 1})
    assert built(folder)["usd"] == pytest.approx(before + 0.001)
    assert built(folder)["period"]["ended"] == T0 + 709
    folder.append("ledger", beat)  # the next attempt charged it, and died before it forgot
    assert built(folder)["usd"] == pytest.approx(before + 0.001)
    folder.file("heartbeat.json").write_text("")  # a power cut
    assert built(folder)["usd"] == pytest.approx(before + 0.001)


def test_steps_that_were_lost_are_not_the_last_ones(folder: RunFolder) -> None:
    row = {"step": 7, "attempt": 2, "tokens": 7 * 512, "loss": 1.0, "step_seconds": 0.5}
    folder.append("metrics", {**row, "tokens_sha": "7" * 64})
    assert built(folder)["hashes"]["tokens"] == "7" * 64
    folder.event("resume", "from step 4", attempt=3, step=4, saved_at=T0 + 610)
    told = built(folder)  # and killed before it had taken a step
    assert (told["steps"], told["attempts"]) == (4, 3)
    assert told["actual"]["tokens"] == 4 * 512
    assert told["hashes"]["tokens"] == "4" * 64
    assert [row["step"] for row in told["thrown_away"]["evaluations"]] == [6]


def test_evaluations_that_were_gone_back_from_do_not_count(folder: RunFolder) -> None:
    """Back to step 4, and on to 6: step 5 was taken again, and not evaluated again."""
    folder.event("rewind", "back", back_to=4, saved_at=T0 + 601, usd=0.0048, attempt=2)
    row = {"step": 5, "attempt": 2, "split": "val", "loss": 9.0, "bpb": 12.0, "usd": 0.0045}
    evals = [*folder.rows("evals")]
    evals.insert(1, {**row, "tokens": 1000, "of_tokens": 2000})
    folder.file("evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    told = built(folder)
    assert [row["step"] for row in told["evaluations"]] == [4, 6]
    assert [row["step"] for row in told["thrown_away"]["evaluations"]] == [5]


def test_torn_and_missing_files_are_no_end(folder: RunFolder) -> None:
    whole = built(folder)
    for name in ("metrics", "evals", "events", "ledger", "samples"):
        with folder.file(f"{name}.jsonl").open("ab") as lines:
            lines.write(b'{"step": 7, "att')
    assert built(folder) == whole
    for name in ("env.json", "argv.txt", "evals.jsonl", "samples.jsonl", "checkpoints/best.json"):
        folder.file(name).unlink()
    told = report.write(folder)
    assert (told["usd"], told["phases"]) == (whole["usd"], whole["phases"])
    assert told["env"] is told["reproduce"] is told["commands"]["reproduce"] is None
    assert told["hashes"]["code"] is told["best"]["step"] is told["actual"]["val_loss"] is None
    folder.file("argv.txt").write_text("tuppence run 'name=x")
    assert built(folder)["reproduce"] is None
    folder.file("env.json").write_text("{")
    with pytest.raises(Fault, match=r"env\.json is damaged"):
        built(folder)


@pytest.mark.parametrize("beat", ['{"node": 5}', "[]", '{"start": "now"}'])
def test_a_damaged_heartbeat_charges_nothing(folder: RunFolder, beat: str) -> None:
    before = built(folder)
    folder.file("heartbeat.json").write_text(beat)
    assert built(folder) == before


@pytest.mark.parametrize(
    ("name", "line", "why"),
    [("evals", "[]", "not an object"), ("ledger", "{}", "no start"), ("events", "{}", "no code")],
)
def test_a_line_that_is_none_is_named(folder: RunFolder, name: str, line: str, why: str) -> None:
    with folder.file(f"{name}.jsonl").open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(Fault, match=rf"{name}\.jsonl line \d+ is damaged: {why}"):
        built(folder)


def test_an_event_without_words_is_told_by_its_code(folder: RunFolder) -> None:
    folder.append("events", {"time": T0, "code": "odd"})
    assert "- odd [odd]" in report.as_markdown(built(folder))


def test_many_steps_and_no_evaluation(folder: RunFolder) -> None:
    folder.file("evals.jsonl").unlink()
    for number in range(7, 80):
        row = {"step": number, "attempt": 2, "tokens": 512 * number, "loss": 2.0, "usd": 0.01}
        folder.append("metrics", row | {"step_seconds": 0.5})
    told = report.write(folder)
    assert told["best"] == {"step": 4, "val_loss": None}
    assert "training loss" in folder.file("receipt.html").read_text(encoding="utf-8")


def test_it_is_shown_where_nothing_can_be_written(
    folder: RunFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    name = folder.path.name
    folder.file("run.json").write_text("{}")
    assert main(["receipt", name, "--runs", str(folder.path.parent)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("receipt   small: spent $0.0196 of $0.0200")
    assert "receipt.html and the files beside it are not renewed: No space left" in said.err
    assert not folder.file("receipt.json").exists()


# ---------------------------------------------------------------- stopped early


def test_an_early_stop_is_told_with_what_it_saved(folder: RunFolder, plan: Plan) -> None:
    back = {"saved_at": T0 + 591, "usd": 0.0, "attempt": 2}
    folder.append("events", {"time": T0 + 605, "code": "early_stop", "message": "", **STOP, **back})
    folder.write_json(
        "plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=Budget(usd=0.05)))
    )
    told = report.write(folder)
    left = 0.05 - told["usd"]
    assert told["unspent"] == {"kind": "usd", "amount": left, "usd": left}
    assert told["early_stop"].items() >= {**STOP, "unspent": told["unspent"]}.items()
    said = f"Not spent: ${left:.4f}."
    gone = f"2 steps, ${14 / 3600 * 0.4:.4f}, thrown away"  # nine seconds of training, five of not
    short = f"stopped   early: validation turned at 2,048 tokens, step 6, back to step 4 ({gone})."
    assert f"\n{short} {said}\n" in report.as_text(told)
    assert said in report.as_text(told)
    for name in ("receipt.md", "receipt.html"):
        page = folder.file(name).read_text(encoding="utf-8")
        for part in ("Three of three lie &lt;above&gt; the best.", f"to step 4: {gone}.", said):
            assert part in page
        assert "annealed over 2 steps, 5.0% of what was left" in page


@pytest.mark.parametrize("unit", [1, 512])
def test_steps_that_an_early_stop_threw_away_are_spent(
    folder: RunFolder, plan: Plan, unit: int
) -> None:
    """At step 1,478 of 3,000 back to 1,035, and 76 more."""
    stop = {**STOP, "step": 1478, "back_to": 1035}
    folder.event("early_stop", "validation has turned", **stop)
    row = {"step": 1111, "attempt": 2, "tokens": 1111 * 512, "loss": 1.0, "step_seconds": 0.5}
    folder.append("metrics", row)
    kind = "steps" if unit == 1 else "tokens"
    budget = Budget(**{kind: 3000 * unit})
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    told = built(folder)
    assert told["budget"]["spent"] == 1554 * unit
    assert told["unspent"]["amount"] == 1446 * unit
    words = f"{1554 * unit:,} of {3000 * unit:,} {kind} (51.8%)"
    assert headline(told).startswith(f"small: spent {words}")


def test_evaluations_are_told_with_their_errors(folder: RunFolder) -> None:
    folder.append("evals", {**folder.latest("evals")[-1], "error": 0.0321})
    told = report.write(folder)
    assert [row["error"] for row in told["evaluations"]] == [None, 0.0321]
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert "2.5000 <small>± 0.0321</small>" in page
    assert page.count('class="error c1"') == 3  # on each axis


def test_what_is_still_to_come_is_no_miss(folder: RunFolder) -> None:
    assert promise_mark(built(folder), "val_loss")
    folder.file("events.jsonl").write_text("")
    assert promise_mark(built(folder), "val_loss") == ""
    assert promise_mark(built(folder), "step_seconds")


def test_hours_are_told_as_people_say_them(folder: RunFolder, plan: Plan) -> None:
    budget = Budget(hours=0.05)
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    assert "small: spent 2m56s of 3m00s (97.8%)" in headline(built(folder))


@pytest.mark.parametrize(
    ("budget", "kind", "amount", "usd"),
    [
        (Budget(hours=0.1), "hours", 0.1 - 176 / 3600, (0.1 - 176 / 3600) * 0.4),
        (Budget(steps=12), "steps", 6, 6 * 0.25 / 3600 * 0.4),  # as promised, not as it went
        (Budget(tokens=6144), "tokens", 3072, 6 * 0.25 / 3600 * 0.4),
        (Budget(usd=0.01), "usd", 0.0, 0.0),
    ],
)
def test_what_was_not_spent_is_told_in_dollars(
    folder: RunFolder, plan: Plan, budget: Budget, kind: str, amount: float, usd: float
) -> None:
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    rest = built(folder)["unspent"]
    assert rest["kind"] == kind
    assert rest["amount"] == pytest.approx(amount)
    assert rest["usd"] == pytest.approx(usd)


# ---------------------------------------------------------------- events


def test_events_are_capped_and_counted_the_serious_first(folder: RunFolder) -> None:
    for number in range(5000):
        folder.event("save", f"step {number}", step=number)
    for number in range(40):
        folder.event("step_skipped", f"step {number} skipped", step=number)
        folder.event(f"odd_{number}", "odd")
    folder.event("preflight", "2 ranks")
    told = report.write(folder)
    assert told["event_counts"]["save"] == 5001
    shown, rest = notes(told)
    assert len(shown) == MOST_NOTES
    assert [e["message"] for e in shown if e["code"] == "step_skipped"] == [
        f"step {number} skipped" for number in range(39, 39 - MOST_OF_ONE, -1)
    ]
    assert not {"resume", "preflight"} & {e["code"] for e in shown}  # the ordinary gives way
    assert {"5,001 save", "35 more step_skipped", "1 resume", "1 odd_0"} <= set(rest)
    assert len(folder.file("receipt.html").read_bytes()) < 100_000


def test_a_warning_says_what_to_do(folder: RunFolder) -> None:
    folder.event("low_mfu", "MFU is 9%", value=0.09, limit=0.15, advice="look at <data_wait>")
    report.write(folder)
    page = folder.file("receipt.md").read_text(encoding="utf-8")
    assert "- MFU is 9%; look at &lt;data_wait&gt; [low_mfu]" in page
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert "MFU is 9% <em>look at &lt;data_wait&gt;</em> <code>low_mfu</code>" in page


def test_commands_are_where_the_run_is(folder: RunFolder, plan: Plan) -> None:
    several = dataclasses.replace(plan, step=dataclasses.replace(plan.step, ranks=4))
    folder.write_json("plan.json", dataclasses.asdict(several))
    typed = "tuppence run small name=small --runs 's3://a/my runs' --fresh --json"
    folder.file("argv.txt").write_text(typed + "\n")
    told = built(folder)["commands"]
    again = "torchrun --nproc_per_node=4 -m tuppence run small name=small --runs 's3://a/my runs'"
    assert told["reproduce"] == f"{again} --fresh"  # the words alone would only show the receipt
    assert told["sample"] == "tuppence sample small \"a prompt\" --runs 's3://a/my runs'"
    assert told["resume"] is None
    folder.file("events.jsonl").write_text("")
    assert built(folder)["commands"]["resume"] == again


# ---------------------------------------------------------------- for reading


def test_the_terminal_text_has_every_number(folder: RunFolder) -> None:
    text = report.as_text(built(folder))
    bought = "val loss 2.2500 at its best (step 4)"
    assert text.startswith(f"receipt   small: spent $0.0196 of $0.0200 (97.8%); {bought}\n")
    assert re.search(r"\n  at best +2\.2500 at step 4\n", text)
    assert "\nwarnings  2: epochs_4, nonfinite_step\n" in text
    assert "thrown away $0.0022 (20.0 s)" in text
    for part in ("0.0200", "0.0196", "2m56s", "3,072", "1,024", "25%", "12%", "0.75 GiB"):
        assert part in text


def test_the_page_shows_what_others_wrote_and_loads_nothing(folder: RunFolder) -> None:
    report.write(folder)
    page = folder.file("receipt.html").read_text(encoding="utf-8")
    assert set(re.findall(r"[a-z]*://[^\"' )<]*", page)) == {"http://www.w3.org/2000/svg"}
    tags = set(re.findall(r"<([a-z]+)", page))
    assert {"table", "pre", "svg"} <= tags
    assert not {"img", "iframe", "object", "embed", "form", "a"} & tags
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert page.count("<script") == 1  # the page's own
    for picture in re.findall(r"<figure>(<svg.*?</svg>)(?=<p|</figure>)", page):
        assert len(list(ElementTree.fromstring(picture).iter())) > 10  # well-formed
    assert not any(part in page for part in ("@import", "url(", '"//'))
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; ```so``` {{ROWS}}" in page
    assert page.count("{{") == 1  # the sample's own, as it is
    assert "/home/me" not in page  # where data lay is nobody's business
    assert "&lt;beyond&gt;" in page
    assert "loss &lt;nan&gt;" in page
    assert page.count('class="dots c1" data-name="validation loss"') == 6  # two, on three axes
    assert page.count('class="faint c0"') == 6  # what the first attempt lost: 3 and 4; 9


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
    assert "HellaSwag acc_norm against tokens" in folder.file("receipt.html").read_text()


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


def test_a_chart_stays_in_its_frame() -> None:
    train = [(float(i), 5.0 - i / 300) for i in range(1, 1001)]
    lines = [Series("train", train), Series("val", [(500.0, 3.5), (1000.0, 2.0)], kind="dots")]
    svg = chart(lines, x_label="tokens", y_label="loss", band=[(800, 1.5, 2.5), (1000, 1.5, 2.5)])
    (points,) = re.findall(r'<polyline[^>]* points="([^"]+)"', svg)
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert len(places) == 400
    assert all(0 <= x <= 640 and 0 <= y <= 320 for x, y in places)
    assert places == sorted(places)  # left to right; the loss falls, so y grows as well
    assert svg.count("<circle") == 2
    assert svg.count('class="band"') == 1
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(0.0, 0.0)]])
@pytest.mark.parametrize("log_x", [False, True])
def test_little_is_drawn_as_well(points: list[tuple[float, float]], log_x: bool) -> None:
    unknown = [(3.0, float("nan")), (float("nan"), 1.0), (-1.0, float("inf"))]
    svg = chart([Series("x", [*points, *unknown])], x_label="x", y_label="y", log_x=log_x)
    assert "nan" not in svg
    assert svg.startswith("<p>" if log_x and points == [(0.0, 0.0)] else "<svg")
    assert chart([], x_label="x", y_label="y").startswith("<p>")


def test_errors_are_bars_and_stay_in_the_frame() -> None:
    points = [(100.0, 0.02), (200.0, 0.05), (400.0, 0.04)]
    dots = Series("CORE", points, kind="dots", errors=[0.01, 0.02, 0.01])
    svg = chart([dots], x_label="tokens", y_label="CORE")
    assert svg.count("<circle") == 3
    tops = [float(y) for y in re.findall(r'class="error[^>]* y1="([\d.]+)"', svg)]
    assert len(tops) == 3
    assert min(tops) == tops[1]  # the best score stands highest
    assert all(0 <= y <= 320 for y in tops)
    assert "CORE 0.05 ± 0.02 at 200" in svg


def test_what_is_above_the_roof_is_cut_off() -> None:
    points = [(1.0, 100.0), (2.0, 2.0), (3.0, 1.0)]
    dots = Series("val", points, kind="dots")
    assert chart([dots], x_label="x", y_label="y").count("<circle") == 3
    assert chart([dots], x_label="x", y_label="y", y_high=2.0).count("<circle") == 2


def test_names_in_a_chart_are_text() -> None:
    svg = chart([Series("<a&b>", [(1.0, 1.0)], kind="dots")], x_label="<x>", y_label='"y"')
    ElementTree.fromstring(svg)
    assert "&lt;a&amp;b&gt; 1 at 1" in svg


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1.26, 2.6, [1.5, 2.0, 2.5]),
        (0, 4.5e6, [0, 1e6, 2e6, 3e6, 4e6]),
    ],
)
def test_ticks_are_round(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)


def test_a_stack_is_as_wide_as_its_parts() -> None:
    svg = stack([("train", 3.0, "training $3"), ("data_wait", 1.0, ""), ("idle", 0.0, "")], total=5)
    widths = re.findall(r'class="part-([a-z-]+)" x="([\d.]+)" y="0" width="([\d.]+)"', svg)
    assert widths == [("train", "0.00", "600.00"), ("data-wait", "600.00", "200.00")]


@pytest.mark.parametrize(("paid", "how"), [(0.5, "hollow"), (1.2, "dot"), (3.0, "hollow")])
def test_a_mark_tells_within_from_outside(paid: float, how: str) -> None:
    svg = mark(1.0, 1.5, 2.0, paid)
    assert f'<circle class="{how}"' in svg
    (x,) = re.findall(r'<circle[^>]* cx="([\d.]+)"', svg)
    assert 0 <= float(x) <= 120


def test_smoothing_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1003)]
    few = smooth(points, most=100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(3.0, abs=0.05)
    assert smooth(points[:100], most=100) == points[:100]


def test_durations() -> None:
    words = {0.4: "0s", 42: "42s", 59.6: "1m00s", 185: "3m05s", 7800: "2h10m", 356400: "4d03h"}
    assert {seconds: duration(seconds) for seconds in words} == words


@pytest.mark.parametrize(("paid", "inside"), [(0.0193, False), (0.0198, True), (0.02, True)])
def test_a_budget_that_is_nearly_spent_is_what_was_promised(paid: float, inside: bool) -> None:
    """The plan's own interval of a budget's dollars is no wider than its rounding."""
    told = {
        "finished": True,
        "budget": {"kind": "usd", "limit": 0.02},
        "predicted": {"usd": 0.019995},
        "actual": {"usd": paid},
        "intervals": {"usd": [0.019995, 0.019996]},
    }
    assert ("within the interval" in promise_mark(told, "usd")) == inside
