"""Runs side by side: what is read at equal places, and what is refused.

Most run folders are made by hand, a row for every tenth step: losses, tokens and dollars are
straight lines, so that what is between two evaluations can be told by heart.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tuppence import cli, comparing
from tuppence.compare import alike, beside
from tuppence.compare.beside import Curve
from tuppence.compare.text import as_text
from tuppence.config import DataPlan, Plan, Run, override
from tuppence.data.prepare import prepare
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve

STEPS = range(10, 401, 10)
TOKENS = 512  # of a step
FULL = {"metric_version": 1, "tokenizer_sha256": "a" * 64, "val_sha256": "b" * 64}
FULL |= {"tokens": 900, "of_tokens": 900, "val_tokens": 900, "sequence_len": 32}
HELLASWAG = {"metric": "hellaswag", "version": 1, "sha256": "e" * 64, "n": 100, "acc": 0.5}
HELLASWAG |= {"error": 0.05, "error_norm": 0.05, "of_items": 100, "precision": "fp32"}

Made = Callable[..., str]
Compare = Callable[..., dict[str, Any]]


@pytest.fixture
def made(
    tmp_path: Path, small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> Iterator[Made]:
    """A run folder: an hour of 400 steps at $4 an hour, or as it is said; its name."""
    folders = []

    def made(
        name: str,
        losses: dict[int, float],
        *,
        words: Sequence[str] = (),
        price: float = 4.0,
        source: str = "asked",
        seconds: float = 9.0,
        of: dict[str, Any] | None = None,
        tasks: dict[str, Any] | None = None,
        old: bool = False,
        finished: bool = True,
        change: Callable[[Plan], Plan] = lambda plan: plan,
    ) -> str:
        asked = override(dataclasses.replace(small_run, name=name), list(words))
        plan = solve(asked, data_plan, calibration)
        machine = dataclasses.replace(plan.machine, usd_per_hour=price, price_source=source)
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        folder = RunFolder(path)
        folders.append(folder)
        folder.write_json("run.json", dataclasses.asdict(asked))
        plan = change(dataclasses.replace(plan, machine=machine))
        folder.write_json("plan.json", dataclasses.asdict(plan))
        for step in (step for step in STEPS if step <= max(losses)):
            hours = step * seconds / 3600
            row = {"step": step, "attempt": 1, "tokens": TOKENS * step, "loss": 10 - step / 100}
            row |= {"lr": 1e-3 * (1 - step / max(losses)), "grad_norm": 1.0, "mfu": 0.1}
            row |= {"step_seconds": seconds, "tokens_per_second": TOKENS / seconds}
            row |= {"usd": hours * price, "progress": step / max(losses), "tokens_sha": "f" * 64}
            folder.append("metrics", row if old else row | {"hours": hours})
        for step, loss in losses.items():
            row = {"step": step, "attempt": 1, "split": "val", "loss": loss, "bpb": loss / 2}
            row |= {"tokens": 900, "usd": step * seconds / 3600 * price, "seconds": 0.0}
            last = {"hellaswag": tasks} if tasks and step == max(losses) else {}
            folder.append("evals", row | (FULL if of is None else of) | last)
        end = max(losses) * seconds
        row = {"start": 0.0, "end": end, "phase": "train", "node": "here", "attempt": 1}
        folder.append("ledger", row | {"usd_per_hour": price, "usd": end / 3600 * price})
        folder.event("start", "from the beginning", attempt=1, step=0)
        if finished:
            folder.event("end", "finished", attempt=1, peak_memory_gib=0.5)
        return name

    yield made
    for folder in folders:
        folder.close()


@pytest.fixture
def compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """The verb's document; or what it says where it ends with an error."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def compare(*words: str) -> dict[str, Any]:
        code = cli.main(["compare", *words, "--json"])
        out, err = capsys.readouterr()
        found: dict[str, Any] = json.loads(out)
        assert code == found.get("error", {}).get("exit_code", 0)
        if code:
            assert err.count("\n") == 1
        return found

    return compare


def codes(found: dict[str, Any]) -> list[str]:
    return [each["code"] for each in found["warnings"]]


def message(found: dict[str, Any], code: str) -> str:
    (told,) = [each["message"] for each in found["warnings"] if each["code"] == code]
    return str(told)


def at(found: dict[str, Any], axis: str) -> dict[str, Any]:
    (there,) = [each for each in found["at_equal"] if each["axis"] == axis]
    return dict(there)


# ---------------------------------------------------------------- read by heart

SHORT = {100: 4.0, 200: 3.0, 300: 2.0}
LONG = {100: 3.5, 400: 1.5}


def test_at_equal_tokens_hours_and_dollars(made: Made, compare: Compare) -> None:
    made("short", SHORT)
    made("long", LONG, price=2.0)  # as fast, at half the price
    found = compare("short", "long")
    equal = at(found, "tokens")
    assert (equal["at"], equal["end_of"]) == (300 * TOKENS, "short")
    assert equal["val"] == pytest.approx([2.0, 3.5 - 2 * 2 / 3])  # two thirds of the way down
    assert (equal["best"], equal["near"]) == (0, [])
    assert at(found, "hours")["val"] == pytest.approx(equal["val"])
    assert at(found, "hours")["at"] == pytest.approx(0.75)
    assert at(found, "usd")["at"] == pytest.approx(2.0)  # an hour of the long one, its end
    assert at(found, "usd")["val"] == pytest.approx([3.0, 1.5])
    assert at(found, "usd")["best"] == 1
    last = [10 - step / 100 for step in STEPS if 285 < step <= 300]
    assert equal["train"] == pytest.approx([np.mean(last)] * 2)


def test_what_it_takes_to_the_worst_final_loss(made: Made, compare: Compare) -> None:
    made("short", SHORT)
    made("long", LONG, price=2.0)
    reach = compare("short", "long")["to_reach"]
    assert (reach["loss"], reach["of"]) == (2.0, "short")
    assert reach["takes"]["tokens"] == pytest.approx([300 * TOKENS, 325 * TOKENS])  # 3/4 down
    assert reach["takes"]["hours"] == pytest.approx([0.75, 0.8125])
    assert reach["takes"]["usd"] == pytest.approx([3.0, 1.625])
    assert reach["best"] == {"tokens": 0, "hours": 0, "usd": 1}
    (said,) = compare("long", "short")["said"]
    assert said == (
        "long was down at short's best loss (2.0000) with 108% of the tokens, 108% of the hours "
        "and 54% of the dollars that short took"
    )


def test_one_that_was_lower_when_it_was_first_evaluated(made: Made, compare: Compare) -> None:
    made("a", {100: 4.0, 200: 3.9})
    made("b", {200: 3.0, 300: 2.0})
    found = compare("a", "b")
    assert found["to_reach"]["takes"]["tokens"] == [200 * TOKENS, None]  # b may have taken less
    assert found["to_reach"]["best"]["tokens"] is None
    assert found["said"] == []
    made("d", {100: 4.0, 300: 3.0})
    assert compare("a", "b", "d")["to_reach"]["best"]["tokens"] is None  # though d's is known
    made("c", {300: 3.0})
    assert at(compare("a", "c"), "tokens")["val"] == [3.9, None]
    assert "no loss is known of c" in compare("a", "c")["warnings"][1]["message"]


def test_ends_that_are_about_equal_are_ends() -> None:
    places = {"tokens": np.array([50.0, 101.0])}
    curve = Curve(places, np.array([4.0, 2.0]))
    assert curve.read("tokens", 100.0) == 2.0  # and not a little above, when the rate was high
    assert curve.read("tokens", 75.5) == pytest.approx(3.0)
    assert curve.read("tokens", 49.5) == 4.0
    assert curve.read("tokens", 40.0) is None
    assert curve.read("tokens", 110.0) is None
    assert curve.reaches("tokens", 1.0) is None
    assert curve.reaches("tokens", 3.0) == pytest.approx(75.5)


def test_of_a_loss_that_turned_the_best_is_to_reach(made: Made, compare: Compare) -> None:
    made("turned", {100: 4.0, 200: 2.0, 300: 3.0})
    made("other", {100: 4.0, 300: 1.0})
    found = compare("turned", "other")
    reach = found["to_reach"]
    assert (reach["loss"], reach["of"]) == (2.0, "turned")
    assert reach["takes"]["tokens"] == pytest.approx([200 * TOKENS, (100 + 400 / 3) * TOKENS])
    assert "with 117% of the tokens" in found["said"][0]
    assert "To come down to val loss 2.0000, the best of turned" in as_text(found)
    run = compare("turned", "other")["runs"][0]
    assert run["val_loss"] == {"last": 3.0, "best": 2.0}
    assert run["best_step"] == 200


def test_hours_of_an_older_run_come_from_its_ledger(made: Made, compare: Compare) -> None:
    made("old", SHORT, old=True)
    made("new", SHORT)
    found = compare("old", "new")
    assert at(found, "hours")["val"] == [2.0, 2.0]
    assert found["to_reach"]["takes"]["hours"] == pytest.approx([0.75, 0.75])


def test_only_what_differs_of_what_was_asked(made: Made, compare: Compare) -> None:
    made("a", SHORT, words=["train.optimizer=muon", "train.seed=3"])
    made("b", SHORT, words=["train.seed=3"])
    assert compare("a", "b")["differs"] == {"train.optimizer": ["muon", None]}


def test_a_train_loss_is_of_one_place_whatever_the_axis(made: Made, compare: Compare) -> None:
    made("a", SHORT)
    made("b", LONG)
    path = Path("runs/a/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[-4:]:
        row["hours"] -= 0.05 * row["hours"]  # a slow start, an evaluation: hours are not steps
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare("a", "b")
    assert at(found, "hours")["train"][0] == at(found, "tokens")["train"][0]


def test_a_tie_has_no_best(made: Made, compare: Compare) -> None:
    made("a", SHORT, tasks=HELLASWAG | {"acc_norm": 0.5})
    made("b", SHORT, tasks=HELLASWAG | {"acc_norm": 0.5})
    found = compare("a", "b")
    assert at(found, "tokens")["best"] is None
    assert found["to_reach"]["best"] == {"tokens": None, "hours": None, "usd": None}
    assert found["tasks"]["hellaswag"]["acc_norm"]["best"] is None
    tables = as_text(found).partition("reading")[0]
    assert not {"*", "~"} & set(tables)
    assert 'class="best"' not in Path(found["page"]).read_text()
    made("c", SHORT | {300: 2.00001})
    assert "*" not in re.findall("  val loss, last .*", as_text(compare("a", "c")))[0]


def test_errors_of_val_losses_are_shown(made: Made, compare: Compare) -> None:
    made("a", SHORT, of=FULL | {"error": 0.0123})
    made("b", SHORT)
    found = compare("a", "b")
    assert found["runs"][0]["val_error"] == {"last": 0.0123, "best": 0.0123}
    assert re.findall("± of val loss +0.0123 +-", as_text(found))


def test_twins_tell_the_noise(made: Made, compare: Compare) -> None:
    made("one", {100: 4.0, 300: 2.00})
    made("two", {100: 4.0, 300: 2.03}, words=["train.seed=2"])
    made("muon", {100: 4.0, 300: 2.02}, words=["train.optimizer=muon"])
    made("far", {100: 4.0, 300: 2.09}, words=["train.weight_decay=0.3"])
    made("late", {100: 4.0, 360: 1.0}, words=["train.seed=4"])  # a twin that had more tokens
    found = compare("one", "two", "muon", "far")
    assert found["losses"]["noise"] == pytest.approx(0.03)
    assert (at(found, "tokens")["best"], at(found, "tokens")["near"]) == (0, [1, 2])
    assert compare("one", "muon", "far")["losses"]["noise"] is None
    assert compare("one", "late")["losses"]["noise"] is None
    assert at(compare("one", "late"), "tokens")["noise"] == pytest.approx(3 * 200 / 260 - 2)
    assert at(compare("one", "muon"), "tokens")["near"] == []


# ---------------------------------------------------------------- what may not be compared

NO_LOSSES = [
    ({"tokenizer_sha256": "c" * 64, "val_sha256": "c" * 64}, "tokenizers differ (aaaaaaaaaaaa and"),
    ({"val_sha256": "c" * 64}, "val splits hold other tokens (bbbbbbbbbbbb and cccccccccccc)"),
    ({"tokens": 800, "of_tokens": 800}, "different parts of the val split: 900 of 900 tokens"),
    ({"metric_version": 2}, "versions 1 and 2 of the metric"),
    ({"metric_version": None}, "the second does not say its metric_version; evaluate it again"),
]


@pytest.mark.parametrize(("other", "why"), NO_LOSSES)
def test_losses_that_say_nothing_together_are_refused(
    made: Made, compare: Compare, other: dict[str, Any], why: str
) -> None:
    made("a", SHORT)
    made("b", SHORT, of=FULL | other)
    found = compare("a", "b")
    assert found["losses"]["unit"] is None
    assert "a and b: " in message(found, "losses_not_comparable")
    assert why in message(found, "losses_not_comparable")
    assert (found["at_equal"], found["to_reach"], found["said"]) == ([], None, [])
    assert [run["usd"] for run in found["runs"]] == pytest.approx([3.0, 3.0])  # cost still is
    page = Path(found["page"]).read_text()
    assert "They are not compared: a and b:" in page
    assert page.count("<svg class") == 1  # the learning rate


def test_the_one_that_is_in_the_way_is_named(made: Made, compare: Compare) -> None:
    for name in ("a", "b", "c"):
        made(name, SHORT, of=FULL | ({"val_sha256": "c" * 64} if name == "b" else {}))
    told = message(compare("a", "b", "c"), "losses_not_comparable")
    assert "without b the others can be compared" in told
    assert "; tuppence eval a --against b compares" in told


def test_bits_where_the_text_is_the_same(made: Made, compare: Compare) -> None:
    made("a", SHORT)
    made("b", LONG, of=FULL | {"tokenizer_sha256": "c" * 64})
    found = compare("a", "b")
    assert found["losses"]["unit"] == "bpb"
    assert at(found, "tokens")["val"][0] == 1.0  # half of the loss, as the folder has it
    assert at(found, "tokens")["train"] == [None, None]
    assert "losses_in_bits" in codes(found)


def test_an_evaluation_that_was_cut_short_is_left_out(
    made: Made, compare: Compare, tmp_path: Path
) -> None:
    made("a", SHORT)
    made("b", SHORT)
    path = tmp_path / "runs" / "b" / "evals.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["tokens"] = 300
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare("a", "b")
    assert at(found, "tokens")["at"] == 200 * TOKENS
    assert at(found, "tokens")["val"] == [3.0, 3.0]
    assert message(found, "evaluations_left_out").startswith("b: 1 of its evaluations")


def test_a_run_that_was_not_evaluated(made: Made, compare: Compare, tmp_path: Path) -> None:
    made("a", SHORT)
    made("b", SHORT)
    (tmp_path / "runs" / "b" / "evals.jsonl").unlink()
    found = compare("a", "b")
    assert "b was not evaluated yet" in message(found, "losses_not_comparable")
    assert found["runs"][1]["val_loss"] == {"last": None, "best": None}


# ---------------------------------------------------------------- what is said beside it


def test_alike_runs_are_warned_of_nothing(made: Made, compare: Compare) -> None:
    made("a", SHORT)
    made("b", SHORT)
    found = compare("a", "b")
    assert found["warnings"] == []
    assert "keep in mind" not in Path(found["page"]).read_text()


def test_prices_machines_and_peaks_are_named(made: Made, compare: Compare) -> None:
    def gpu(plan: Plan) -> Plan:
        card = {"name": "H100", "device": "cuda", "peak_tflops": 800.0, "peak_source": "its sheet"}
        return dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, **card))

    made("here", SHORT, price=0.4, source="assumed")
    made("there", SHORT, price=2.0, change=gpu)
    found = compare("here", "there")
    assert message(found, "assumed_price").endswith("here at an assumed $0.40/h, there at $2.00/h")
    assert "here on Test CPU, 2 threads, there on H100, 1 GPU" in message(found, "other_machine")
    assert "there of 800 TFLOPS (its sheet)" in message(found, "other_peak")
    text = as_text(found)
    (mfu,) = re.findall("  MFU  .*", text)
    assert "*" not in mfu
    assert "of 800 TFLOPS" in mfu
    made("same", SHORT, price=0.4, source="assumed", seconds=0.05)
    alone = compare("here", "same")
    assert message(alone, "assumed_price").endswith("an assumed price, $0.40/h, in all runs")
    assert "*" in re.findall("  MFU  .*", as_text(alone))[0]


def test_all_ranks_of_a_run_are_counted(made: Made, compare: Compare) -> None:
    def ranks(plan: Plan) -> Plan:
        return dataclasses.replace(plan, step=dataclasses.replace(plan.step, ranks=2))

    made("one", SHORT)
    made("two", SHORT, change=ranks)
    told = message(compare("one", "two"), "other_machine")
    assert told.endswith("one on Test CPU, 2 threads, two on Test CPU, 4 threads")


def test_a_ceiling_measured_twice_is_one_peak() -> None:
    peaks = [{"peak_tflops": tflops, "peak_source": "measured"} for tflops in (1.0, 1.005, 1.2)]
    assert alike.peaks(["a", "b"], peaks[:2]) is None
    told = alike.peaks(["a", "b", "c"], peaks)
    assert told is not None
    assert "c of 1.2 TFLOPS (measured)" in told["message"]


def test_one_that_is_not_finished_is_compared_as_far_as_it_is(made: Made, compare: Compare) -> None:
    made("done", LONG)
    made("half", {100: 4.0, 200: 3.0}, finished=False)
    found = compare("done", "half")
    told = "half is not finished (stopped, 10000.0% of its budget): compared as far as it is"
    assert message(found, "unfinished") == told
    assert at(found, "tokens")["at"] == 200 * TOKENS
    assert "tokens (done 51%, half 0%)" in message(found, "mid_schedule")


def test_one_that_stopped_early_says_so(made: Made, compare: Compare, tmp_path: Path) -> None:
    made("a", SHORT)
    folder = RunFolder(tmp_path / "runs" / made("b", SHORT))
    folder.event("early_stop", "validation has turned", reason="turned", step=200)
    folder.close()
    assert [run["state"] for run in compare("a", "b")["runs"]] == ["finished", "stopped early"]


def test_other_code_and_other_text_are_told(made: Made, compare: Compare, tmp_path: Path) -> None:
    def other(plan: Plan) -> Plan:
        return dataclasses.replace(
            plan, data=dataclasses.replace(plan.data, inputs_sha256="1" * 64)
        )

    made("a", SHORT)
    made("b", SHORT, change=other)
    (tmp_path / "runs" / "b" / "env.json").write_text(json.dumps({"code_sha256": "d" * 64}))
    found = compare("a", "b")
    assert "a does not say, b dddddddddddd" in message(found, "other_code")
    assert "other_text" in codes(found)
    assert at(found, "tokens")["train"] == [None, None]


def test_scores_within_their_error_are_told_so(made: Made, compare: Compare) -> None:
    made("a", SHORT, tasks=HELLASWAG | {"acc_norm": 0.60})
    made("near", SHORT, tasks=HELLASWAG | {"acc_norm": 0.50})
    made("far", SHORT, tasks=HELLASWAG | {"acc_norm": 0.40})
    made("none", SHORT)
    scores = compare("a", "near", "far", "none")["tasks"]["hellaswag"]["acc_norm"]
    assert scores["values"] == [0.6, 0.5, 0.4, None]
    assert (scores["best"], scores["near"]) == (0, [1])  # 0.1 within 1.96 x 0.0707, 0.2 not
    made("other", SHORT, tasks=HELLASWAG | {"acc_norm": 0.7, "n": 50})
    found = compare("a", "other")
    assert found["tasks"]["hellaswag"]["acc_norm"]["best"] is None
    assert "of items asked one has 100, the other 50" in message(found, "tasks_not_comparable")


# ---------------------------------------------------------------- wrong input


def test_wrong_input_is_one_line(made: Made, compare: Compare, tmp_path: Path) -> None:
    made("a", SHORT)
    made("b", SHORT)
    made("begun", SHORT)
    (tmp_path / "runs" / "begun" / "metrics.jsonl").unlink()
    for words, why in (
        (["a"], "name two to 8 runs"),
        (["a"] * 9, "name two to 8 runs"),
        (["a", "runs/a"], "runs/a: the same run as a"),
        (["a", "c"], "no run 'c'"),
        (["a", "begun"], "begun: no step was taken yet, so there is nothing to compare"),
        (["a", "b", "--out", "nowhere/x.html"], "--out nowhere/x.html: name a file"),
        (["a", "b", "--out", "runs"], "--out runs: name a file"),
    ):
        error = compare(*words)["error"]
        assert error["exit_code"] == 2, words
        assert why in error["message"]
    assert not list(tmp_path.rglob("*.html"))


def test_where_the_page_goes(made: Made, compare: Compare, tmp_path: Path) -> None:
    made("a", SHORT)
    made("b", SHORT)
    assert compare("a", "runs/b")["page"] == "runs/compare.html"
    assert (tmp_path / "runs" / "compare.html").is_file()
    compare("a", "b", "--out", "mine.html")
    assert (tmp_path / "mine.html").is_file()


def test_where_the_page_cannot_be_written_the_tables_stand(
    made: Made,
    compare: Compare,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(comparing, "write_text", refused)
    made("a", SHORT)
    made("b", LONG)
    assert cli.main(["compare", "a", "b"]) == 0
    out, err = capsys.readouterr()
    assert "At equal tokens: 153,600, where a ends" in out
    assert "runs/compare.html: Read-only file system; --out FILE puts it elsewhere" in err
    assert compare("a", "b")["page"] is None
    assert compare("a", "b", "--out", "mine.html")["error"]["exit_code"] == 1


def test_a_damaged_run_is_one_line(made: Made, compare: Compare, tmp_path: Path) -> None:
    made("a", SHORT)
    RunFolder(tmp_path / "runs" / made("b", SHORT)).file("evals.jsonl").write_text("[]\n")
    assert "b/evals.jsonl line 1 is damaged" in compare("a", "b")["error"]["message"]


def test_names_that_are_the_same_are_told_apart() -> None:
    assert comparing.labels(["a", "runs/b/", "s3://x/runs/c"]) == ["a", "b", "c"]
    assert comparing.labels(["a", "other/a"]) == ["a", "other/a"]


def test_a_run_on_a_bucket(made: Made, compare: Compare, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    from tuppence import bucket

    for name in ("a", "b"):
        folder = RunFolder(tmp_path / "runs" / made(name, SHORT))
        folder.write_json("attempt.json", {"attempt": 1, "token": "aaaa1111"})
        mirror = bucket.Mirror(folder, f"memory://there/runs/{name}")
        assert mirror.close(60)
        mirror.check()
    try:
        found = compare("memory://there/runs/a", "b")
        assert at(found, "tokens")["val"] == [2.0, 2.0]
        assert found["page"] == "compare.html"
        both = compare("a", "b", "--runs", "memory://there/runs")
        assert [run["label"] for run in both["runs"]] == ["a", "b"]
    finally:
        fsspec.filesystem("memory").store.clear()


# ---------------------------------------------------------------- to read


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order."""

    void = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_asks_nobody(
    made: Made, compare: Compare, tmp_path: Path
) -> None:
    def hostile(plan: Plan) -> Plan:
        data = dataclasses.replace(plan.data, source="<script>alert(1)</script> {{RUNS}} \x1b[2J")
        return dataclasses.replace(plan, data=data)

    made("a<b>&amp;", SHORT, change=hostile)
    made("plain", LONG)
    found = compare("a<b>&amp;", "plain")
    page = Path(found["page"]).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not {"b", "img", "iframe", "object"} & parser.seen
    assert set(re.findall(r"[a-z]+://[^\"' )<]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "a&lt;b&gt;&amp;amp;" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {{RUNS}}" in page
    assert page.count("<script>") == 1  # the house's own
    assert "\x1b" not in page + as_text(found)
    pictures = re.findall(r'<svg class="chart".*?</svg></svg>|<svg class="chart".*?</svg>', page)
    assert len(pictures) == 4  # three axes, the learning rate
    for table in re.findall(r"<table>.*?</table>", page):
        ElementTree.fromstring(table)  # well-formed
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_text_fits_the_screen(made: Made, compare: Compare, width: int) -> None:
    names = [made(f"run-{i}", {100: 4.0, 300: 2.0 + i / 10}) for i in range(8)]
    text = as_text(compare(*names), width=width)
    tables = text[: text.index("\ncomes to")]
    assert max(map(len, tables.splitlines())) <= width
    losses = re.findall(r"  val loss, last.*", text)
    assert sum(line.count(".") for line in losses) == 8  # all are there, in however many blocks
    assert sum(line.count("*") for line in losses) == 1


def test_the_verb_prints_what_it_found(
    made: Made,
    compare: Compare,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made("a", SHORT)
    made("b", LONG)
    monkeypatch.setenv("COLUMNS", "70")
    assert cli.main(["compare", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 70
    assert out.startswith("compare   a, b\n")
    assert "At equal tokens: 153,600, where a ends" in out
    assert out.rstrip().endswith("more      runs/compare.html")


# ---------------------------------------------------------------- real runs


def test_real_runs(
    tmp_path: Path, data_plan: DataPlan, calibration: Calibration, compare: Compare
) -> None:
    from small_runs import DEPTH, GPT2, finished  # which needs torch

    shards = prepare(source="shakespeare", tokenizer="char", root=tmp_path / "data").folder
    for name, words in (("gpt2", GPT2), ("depth", DEPTH)):
        path = tmp_path / "runs" / name
        finished(path, [*words, "train.eval_every=1"], data_plan, shards, calibration)
    found = compare("gpt2", "depth")
    assert found["losses"]["unit"] == "loss"
    assert found["differs"]["model.family"] == ["gpt2", "depth"]
    last = [run["val_loss"]["last"] for run in found["runs"]]
    assert at(found, "tokens")["val"] == last  # as many steps of as many tokens
    assert found["to_reach"]["loss"] == max(last)
    told = [
        json.loads((tmp_path / "runs" / n / "evals.jsonl").read_text().splitlines()[-1])
        for n in ("gpt2", "depth")
    ]
    assert last == [row["loss"] for row in told]
    assert tuple(each["axis"] for each in found["at_equal"]) == beside.AXES
