"""`tuppence plan` as a person and a script meet it: guides, refusals, two runs, prices, a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuppence import cli, host, pipeline, planning
from tuppence.data.survey import survey
from tuppence.plan import hardware
from tuppence.plan.guides import RECIPES
from tuppence.plan.hardware import Calibration


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Answer]


@pytest.fixture
def plan(
    calibration: Calibration,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Command:
    """`tuppence plan` in an empty folder, on a machine that was measured before."""
    hardware.save_calibration(
        dataclasses.replace(calibration, name=hardware.cpu_name(), threads=host.usable_cores())
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    monkeypatch.setattr(  # a roofline will do: nothing is timed here
        planning, "solved", lambda run, data, *, quick: pipeline.solved(run, data, quick=0.0)
    )
    for module in (pipeline, planning):
        monkeypatch.setattr(module, "device_of", lambda run: "cpu")

    def run(*words: str) -> Answer:
        code = cli.main(["plan", *words])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return run


# ---------------------------------------------------------------- the guides


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_guide_plans_both_ways(plan: Command, recipe: str) -> None:
    answer = plan(recipe, "--json")
    assert answer.code == 0, answer.err
    document = answer.document
    chosen = document["options"][document["chosen"]]
    assert chosen["fits"]
    assert chosen["usd"]["total"] > 0
    published = plan(recipe, "--as-published")
    assert published.code == 0
    assert "its premises" in published.out
    assert plan(recipe, "--as-published", "--json").document["recipe"] == recipe


def test_a_recipe_without_a_guide_has_nothing_published(plan: Command) -> None:
    answer = plan("shakespeare", "--as-published")
    assert answer.code == 2
    assert "nanogpt_4b_tokens" in answer.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["depth_1000usd", "model.depth=64", "train.parallel=zero1", "train.micro_batch=4"],
            ["too little memory", "H100-80GB-PCIe"],
        ),
        (
            ["looped_546m", "machine.gpu=A10G", "machine.gpu_count=1", "train.micro_batch=8"],
            ["too little memory", "micro-batch 8", "A10G"],
        ),
        (["llmc_gpt2_124m", "machine.gpu=V100", "train.precision=bf16"], ["no bf16"]),
        (["llmc_gpt2_124m", "budget.usd=0.001"], ["the budget"]),
    ],
)
def test_what_fits_nowhere_exits_with_3(plan: Command, words: list[str], says: list[str]) -> None:
    answer = plan(*words)
    assert answer.code == 3
    assert answer.out == ""
    assert len(answer.err.strip().splitlines()) == 1
    assert all(word in answer.err for word in says), answer.err


def test_the_fixed_mfu_of_the_second_guide(plan: Command) -> None:
    """723, 51 and 20 hours at 40% of the data sheet."""
    for machine, count, precision, hours in (
        ("A10G", 1, "bf16", 723.6),
        ("V100", 8, "fp16", 50.65),
        ("A100-40GB", 8, "bf16", 20.29),
    ):
        words = [f"machine.gpu={machine}", f"machine.gpu_count={count}", "machine.mfu=0.4"]
        answer = plan("looped_546m", *words, f"train.precision={precision}", "--json")
        option = answer.document["options"][0]
        assert option["tokens"] / option["tokens_per_second"] / 3600 == pytest.approx(
            hours, rel=0.001
        )


# ---------------------------------------------------------------- choosing


def test_dollars_and_a_corpus_are_enough(plan: Command) -> None:
    answer = plan("budget.usd=100", "data.source=fineweb_edu", "--json")
    assert answer.code == 0, answer.err
    document = answer.document
    assert document["run"]["recipe"] == "auto"
    chosen = document["options"][document["chosen"]]
    assert chosen["depth"] > 8
    assert chosen["loss_metric"] == "bits/byte"
    assert chosen["batch_tokens"] % (chosen["gpu_count"] * 2048) == 0
    assert {"learning_rate", "precision", "parallel", "micro_batch"} <= chosen.keys()
    fits = [option["fits"] for option in document["options"]]
    assert fits == sorted(fits, reverse=True)
    dollars = [option["usd"]["total"] for option in document["options"] if option["fits"]]
    assert dollars == sorted(dollars)
    losses = [option["loss"]["mid"] for option in document["options"] if option["fits"]]
    assert round(chosen["loss"]["mid"], 4) == round(min(losses), 4)


def test_the_default_stays_on_this_machine(plan: Command) -> None:
    document = plan("--json", "machine.gpu=cpu").document
    (only,) = document["options"]
    assert only["cloud"] == "local"
    assert document["plan"]["name"] == "shakespeare"


def test_this_machine_stands_among_the_others(plan: Command, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("to be or not to be, that is the question. " * 30_000)
    words = ["gpt2_124m", "data.source=own.txt", "train.batch_tokens=65536", "budget.steps=500"]
    document = plan(*words, "--json").document
    (here,) = [option for option in document["options"] if option["here"]]
    assert here["fits"]
    dollars = [option["usd"]["total"] for option in document["options"] if option["fits"]]
    assert dollars == sorted(dollars)
    read = plan(*words)
    assert "this machine" in read.out
    assert "chosen    " in read.out


def test_the_plan_says_what_can_be_rented_and_what_only_planned(plan: Command) -> None:
    rented = plan("llmc_gpt2_124m", "machine.gpu=A100", "machine.gpu_count=8")
    assert "rent      tuppence launch" in rented.out
    only = plan("depth_1000usd")
    assert "tuppence launch" not in only.out
    assert "[plan_only]" in only.out


def test_a_corpus_known_by_its_name_tells_of_itself(plan: Command) -> None:
    answer = plan("llmc_gpt2_124m", "--json")
    assert answer.document["not_here"] is None
    assert "plan_only" not in [warning["code"] for warning in answer.document["warnings"]]
    corpus = answer.document["corpus"]
    assert (corpus["name"], corpus["licence"]) == ("fineweb_10bt", "ODC-By 1.0")
    assert corpus["file_bytes"] == pytest.approx(30e9, rel=0.05)  # of 10.4B tokens, 10B
    took = corpus["prepare_seconds"]
    assert took["low"] < took["mid"] < took["high"]
    text = plan("llmc_gpt2_124m", "data.source=fineweb_edu_10bt").out
    assert "fineweb_edu_10bt: ODC-By 1.0; 9.97B gpt2 tokens in 9.67M documents" in text
    assert "28.5 GB from hf://HuggingFaceFW/fineweb-edu/sample/10BT" in text
    assert plan("shakespeare", "machine.gpu=cpu", "--json").document["corpus"] is None


def test_a_corpus_that_is_generated_is_not_trained_here(plan: Command) -> None:
    document = plan("depth_1000usd", "--json").document
    assert "nothing to download" in document["not_here"]


def test_many_gpus_are_planned_as_asked(plan: Command) -> None:
    words = ("data.source=fineweb_edu", "machine.gpu_count=8", "train.parallel=fsdp")
    document = plan("budget.usd=100", *words, "--json").document
    assert {option["parallel"] for option in document["options"] if option["fits"]} == {"fsdp"}


def test_doubts_about_ones_own_prices_are_said(plan: Command, tmp_path: Path) -> None:
    prices = tmp_path / "mine.csv"
    header = "cloud,instance_type,accelerator,accelerator_count,price_usd_h"
    prices.write_text(f"{header}\nlab,box,Foo9000,1,cheap\n", encoding="utf-8")
    answer = plan("llmc_gpt2_124m", "--prices", str(prices))
    assert answer.code == 0
    assert "mine.csv:2" in answer.err
    assert "cheap" in answer.err


def test_more_words_for_less(plan: Command) -> None:
    few, every = plan("llmc_gpt2_124m").out, plan("llmc_gpt2_124m", "--all").out
    assert "--all shows them" in few
    assert "--all shows them" not in every
    assert every.count("\n") > few.count("\n") + 40


def test_strict_refuses_what_is_only_warned_of(plan: Command) -> None:
    answer = plan("nanogpt_openwebtext", "--strict")
    assert answer.code == 3
    assert "epochs_16" in answer.err


def test_two_runs_side_by_side(plan: Command) -> None:
    answer = plan("nanogpt_4b_tokens", "llmc_gpt2_124m")
    assert answer.code == 0
    assert answer.out.splitlines()[0].split() == ["nanogpt_4b_tokens", "llmc_gpt2_124m"]
    assert "not comparable" in answer.out
    assert "[losses_not_comparable]" in answer.out
    same = plan("llmc_gpt2_124m", "llmc_gpt2_124m")
    assert "not comparable" not in same.out
    document = plan("nanogpt_4b_tokens", "llmc_gpt2_124m", "--json").document
    both = [each["run"]["recipe"] for each in document["compared"]]
    assert both == ["nanogpt_4b_tokens", "llmc_gpt2_124m"]
    assert [w["code"] for w in document["warnings"]] == ["losses_not_comparable"]
    here = plan("shakespeare", "quickstart", "machine.gpu=cpu")  # each on this machine
    assert here.code == 0
    assert "local Test CPU" not in here.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nanogpt_4b_tokens", "budget.usd=5", "--as-published"], "nothing more"),
        (["shakespeare", "quickstart", "--plot", "x.svg"], "one run"),
        (["llmc_gpt2_124m", "--plot", "nowhere/x.svg"], "nowhere/x.svg"),
        (["llmc_gpt2_124m", "--plot", "."], "--plot ."),
        (["auto", "data.source=finewebedu"], "fineweb_edu"),
        (["auto", "model.family=looped", "data.source=fineweb_edu"], "model.n_embd is not set"),
        (["llmc_gpt2_124m", "train.schedule=foo", "machine.gpu=H100"], "train.schedule=foo"),
    ],
)
def test_words_that_cannot_be_followed_are_not_ignored(
    plan: Command, words: list[str], says: str
) -> None:
    answer = plan(*words)
    assert answer.code == 2, answer.err
    assert says in answer.err


def test_a_price_alone_is_that_of_this_machine(plan: Command) -> None:
    document = plan("machine.usd_per_hour=0.5", "--json").document
    (here,) = [option for option in document["options"] if option["here"]]
    assert here["usd_per_hour"] == 0.5
    assert len(document["options"]) > 80  # the book keeps its own


def test_every_option_has_the_same_keys(plan: Command) -> None:
    options = plan("llmc_gpt2_124m", "--json").document["options"]
    keys = {frozenset(option) for option in options}
    assert len(keys) == 1
    spans = {frozenset(option["intervals"]) for option in options if option["fits"]}
    assert len(spans) == 1
    phases = {frozenset(option["usd"]) for option in options if option["fits"]}
    assert all({"prepare", "store", "train", "evaluate", "total"} <= each for each in phases)


def test_a_plot_of_dollars_against_loss(plan: Command, tmp_path: Path) -> None:
    target = tmp_path / "plan.svg"
    words = ["budget.usd=100", "data.source=fineweb_edu", "machine.cloud=lambda"]
    answer = plan(*words, "--plot", str(target))
    assert answer.code == 0, answer.err
    svg = target.read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert 1 <= svg.count("<polyline") <= 5
    assert "predicted val loss" in svg


def test_own_prices_win(plan: Command, tmp_path: Path) -> None:
    prices = tmp_path / "mine.csv"
    prices.write_text(
        "cloud,instance_type,price_usd_h\nlambda,gpu_8x_a100,1.00\n", encoding="utf-8"
    )
    words = ["llmc_gpt2_124m", "machine.instance_type=gpu_8x_a100", "--json"]
    listed = plan(*words).document["options"][0]
    mine = plan(*words, "--prices", str(prices)).document["options"][0]
    assert listed["usd_per_hour"] > 10
    assert mine["usd_per_hour"] == 1.00
    missing = plan(*words, "--prices", str(tmp_path / "absent.csv"))
    assert missing.code == 2
    assert "absent.csv" in missing.document["error"]["message"]


def test_the_price_book_can_be_read(plan: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prices", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["offers"]) > 80
    codes = {row for _, row, _ in (p.values() for p in document["problems"])}
    assert {"placeholder", "miscounted", "blank_price", "drift"} <= codes
    assert cli.main(["prices"]) == 0
    assert "placeholder" in capsys.readouterr().out
    assert cli.main(["prices", "--refresh"]) == 2  # no SkyPilot here
    assert "sky check" in capsys.readouterr().err


# ---------------------------------------------------------------- named corpora


def test_named_corpora_are_known_before_they_are_downloaded() -> None:
    gpt2 = survey(source="openwebtext", tokenizer="gpt2")
    assert (gpt2.tokens, gpt2.vocab_size, gpt2.exact) == (9_040_000_000, 50257, False)
    smaller = survey(source="openwebtext", tokenizer="bpe:8192")
    assert smaller.vocab_size == 8192
    assert smaller.tokens > gpt2.tokens
    assert smaller.bytes == pytest.approx(gpt2.bytes, rel=1e-6)
    assert survey(source="arithmetic", tokenizer="char").tokens == 350_000_000


def test_a_folder_of_a_corpus_name_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fineweb").mkdir()
    (tmp_path / "fineweb" / "a.txt").write_text("a few words", encoding="utf-8")
    assert survey(source="fineweb", tokenizer="byte").bytes == 11
