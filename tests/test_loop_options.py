"""`eval` and `sample` of a looped run: how long it thinks, and what is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from small_runs import DEPTH, LOOPED, finished

from tuppence import cli, host
from tuppence.config import DataPlan
from tuppence.data.prepare import prepare
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration

Command = Callable[..., tuple[int, dict[str, Any], str]]
WORDS = {"looped": LOOPED, "depth": DEPTH}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration, data_plan: DataPlan
) -> dict[str, RunFolder]:
    """A finished run of a looped model, and one of another family."""
    shards = prepare(
        source="shakespeare", tokenizer="char", root=tmp_path_factory.mktemp("data")
    ).folder
    return {
        family: finished(
            tmp_path_factory.mktemp(family) / "run",
            words,
            data_plan,
            shards,
            calibration,
        )
        for family, words in WORDS.items()
    }


@pytest.fixture
def tuppence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process: its exit code, its document, what it told the person."""
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})

    def tuppence(*words: str) -> tuple[int, dict[str, Any], str]:
        code = cli.main([*words, "--json"])
        told = capsys.readouterr()
        return code, json.loads(told.out), told.err

    return tuppence


def said(tuppence: Command, run: RunFolder, *words: str) -> str:
    code, document, err = tuppence("sample", str(run.path), "A", "--tokens", "20", *words)
    assert code == 0, err
    return str(document["text"])


def test_iterations_change_what_is_said_and_agreement_stops_them(
    runs: dict[str, RunFolder], tuppence: Command
) -> None:
    run = runs["looped"]
    greedy = ("--temperature", "0")
    usual = said(tuppence, run, *greedy)
    mean = run.plan().model.loop.mean_recurrence  # type: ignore[union-attr]
    assert said(tuppence, run, *greedy, "--recurrence", str(round(mean))) == usual
    twice = said(tuppence, run, *greedy, "--recurrence", "2")
    for more in ((), ("--exit-whole",)):
        agreed = said(tuppence, run, *greedy, "--recurrence", "5", "--exit-kl", "1e9", *more)
        assert agreed[:2] == twice[:2]  # any two outputs agree: two iterations for a new token


def test_the_usual_iterations_are_no_other_result(
    runs: dict[str, RunFolder], tuppence: Command
) -> None:
    for count, loop in (([], None), (["3"], None), (["2"], {"recurrence": 2})):
        asked = ["--recurrence", *count] if count else []
        words = [str(runs["looped"].path), "--tasks", "sample", *asked]
        _, document, _ = tuppence("eval", *words)
        assert document["results"]["sample"].get("loop") == loop


@pytest.mark.parametrize(
    "words",
    [["--tasks", "core"], ["--tasks", "bpb,hellaswag"], ["--tasks", "lm_eval:x"], ["--val", "x"]],
)
def test_suites_do_not_stop_all_tokens_at_once(
    words: list[str], runs: dict[str, RunFolder], tuppence: Command
) -> None:
    """What stops would depend on what else is in the pass."""
    how = ["--exit-kl", "1", "--exit-whole"]
    code, _, err = tuppence("eval", str(runs["looped"].path), *how, *words)
    assert code == 2
    assert "what shares a pass" in err


@pytest.mark.parametrize(
    ("family", "words", "says"),
    [
        ("looped", ["--recurrence", "0"], "--recurrence 0: at least 1"),
        ("looped", ["--exit-kl", "-1"], "not below zero"),
        ("looped", ["--exit-kl", "nan"], "--exit-kl nan"),
        ("looped", ["--exit-kl", "inf"], "--exit-kl inf"),
        ("looped", ["--exit-whole"], "say --exit-kl too"),
        ("depth", ["--recurrence", "2"], "only a looped model"),
        ("depth", ["--exit-kl", "1"], "only a looped model"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "sample"])
def test_what_is_refused(
    verb: str,
    family: str,
    words: list[str],
    says: str,
    runs: dict[str, RunFolder],
    tuppence: Command,
) -> None:
    code, _, err = tuppence(verb, str(runs[family].path), *words)
    assert code == 2
    assert says in err
