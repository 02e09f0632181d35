"""The command line as a person and a script meet it: words in, one line or one document out.

Verbs run in this process wherever they can: `host.settle_threads`, which must come before torch is
first imported, is replaced, and the machine's calibration is made up, so that nothing is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from known import know_this_machine

from tuppence import cli, config, host, pipeline, recipes
from tuppence.config import DataPlan, Plan, from_json
from tuppence.folder import RunFolder, RunLock
from tuppence.plan import hardware
from tuppence.plan.hardware import Calibration

TINY = shlex.split(
    "model.n_layer=1 model.n_embd=32 model.n_head=2 model.sequence_len=32 train.batch_tokens=256 "
    "train.eval_tokens=512 train.sample_tokens=4 budget.steps=5 machine.usd_per_hour=1 "
    "machine.threads=1 machine.gpu=cpu"
)
VERBS = [*cli.RECIPE_VERBS, *cli.RUN_VERBS, *cli.PLAIN_VERBS]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one document on stdout (anything more is no JSON)."""
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line for the person."""
        lines = [line for line in self.err.splitlines() if line.startswith("tuppence: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0].removeprefix("tuppence: ")


Command = Callable[..., Answer]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def tuppence(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    calibration: Calibration,
    data_plan: DataPlan,
) -> Iterator[Command]:
    """Runs one command line in this process, on a CPU that is known already."""
    know_this_machine(calibration, data_plan, [TINY])
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    monkeypatch.setattr(host, "process_start", time.time)
    monkeypatch.setattr(pipeline, "device_of", lambda run: "cpu")

    def tuppence(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["tuppence", *words])
        code = cli.main(list(words))
        return Answer(code, *capsys.readouterr())

    yield tuppence
    gc.unfreeze()  # what a training loop of this process froze
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(host.usable_cores())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "example: tuppence" in out
    if words == ["--help"]:
        assert all(re.search(rf"^    {verb}\b", out, re.MULTILINE) for verb in VERBS)
    else:
        assert "--json" in out


# ---------------------------------------------------------------- wrong input

BAD = [
    (2, ["nope"], "no recipe 'nope'"),
    (2, ["absent.py:small"], "there is no file absent.py"),
    (2, ["broken.py:small"], "broken.py fails with KeyError"),
    (2, ["budgte.usd=1"], "did you mean budget.usd?"),
    (2, ["model.n_layer=four"], "model.n_layer=four: not a whole number"),
    (2, ["train.batch_tokens=1000"], "multiple of model.sequence_len=256; the nearest is 1024"),
    (2, ["data.tokenizer=klingon"], "klingon"),
    (2, ["data.source=empty.txt"], "empty"),
    (2, ["data.source=medium.txt"], "less than one batch of 2,048 + 1"),
    (2, ["data.source=absent.txt"], "'absent.txt': no such file"),
    (2, ["gpt2_124m"], "data.source is not set"),
    (2, ["shakespeare", "nonsense"], "'nonsense' is not key=value"),
    (2, ["machine.threads=0"], "machine.threads=0: at least 1"),
    (2, ["name=../up"], "name=../up"),
    (2, ["--nonsense", "budget.usd=1"], "--nonsense: no such option"),
    (2, [*TINY, "data.val_tokens=2000000"], "more than half of the 1,115,394 tokens"),
    (2, [*TINY, "--runs", "empty.txt"], "--runs and --data name folders"),
    (3, ["budget.usd=1e-6"], "give at least budget.usd="),
    (3, ["machine.gpu=H100"], "machine.gpu=H100"),
    (3, ["model.n_layer=100", "model.n_embd=2048"], "GiB, this machine has 8.0"),
    (3, [*TINY, "--strict"], "--strict: no_wall_clock_stop"),
]


@pytest.fixture
def texts(here: Path) -> None:
    (here / "broken.py").write_text("raise KeyError('oh')")
    (here / "empty.txt").write_text("")
    (here / "medium.txt").write_text("to be, or not " * 140)


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize(
    ("code", "words", "says"), BAD, ids=[" ".join(words[:2]) for _, words, _ in BAD]
)
def test_wrong_input(tuppence: Command, here: Path, code: int, words: list[str], says: str) -> None:
    plain = tuppence("run", *words)
    assert plain.code == code
    assert says in plain.line
    assert plain.out == ""
    scripted = tuppence("run", *words, "--json")
    assert scripted.code == code
    assert scripted.document == {"error": {"exit_code": code, "message": scripted.line}}
    assert scripted.line == plain.line
    assert not (here / "runs").exists()
    assert not (here / "data").exists()


@pytest.mark.parametrize("verb", ["eval", "sample", "receipt"])
def test_an_unknown_run(tuppence: Command, here: Path, verb: str) -> None:
    answer = tuppence(verb, "nope", "--json")
    assert answer.code == 2
    assert "no run 'nope'; runs/ holds no runs yet" in answer.line
    (here / "runs" / "shakespeare").mkdir(parents=True)
    (here / "runs" / "shakespeare" / "run.json").write_text("{}")
    assert "did you mean shakespeare?" in tuppence(verb, "shakespear").line


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["eval"], ["sample", "--tokens", "x"]])
def test_words_that_are_no_command(tuppence: Command, words: list[str]) -> None:
    answer = tuppence(*words, "--json")
    assert answer.code == 2
    assert "--help" in answer.line
    assert answer.document["error"] == {"exit_code": 2, "message": answer.line}


@pytest.mark.parametrize("word", ["train.sample_prompt=é", "data.val_tokens=1"])
def test_what_is_refused_after_the_preparation_leaves_no_run(
    tuppence: Command, here: Path, word: str
) -> None:
    assert tuppence("run", *TINY, word).code == 2
    assert not (here / "runs" / "shakespeare").exists()
    assert tuppence("run", *TINY).code == 0  # the corrected command is not another run


@pytest.fixture
def measures_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is measured all the same: a few steps, of which nobody asks how long they took."""
    for name in ("ENOUGH_SECONDS", "MATMUL_SECONDS"):
        monkeypatch.setattr(f"tuppence.train.calibrate.{name}", 0.01)


@pytest.mark.usefixtures("measures_quickly")
def test_a_machine_and_a_shape_are_measured_once(tuppence: Command, cache_home: Path) -> None:
    kept = hardware.calibration_file("cpu", 1)
    kept.unlink()
    words = ["train", *TINY, "budget.steps=1"]
    first = tuppence(*words, "name=first")
    assert first.code == 0, first.err
    assert "measuring this machine" in first.err
    assert "measuring this plan's step" in first.err
    known = hardware.load_calibration("cpu", 1)
    assert known is not None
    assert min(known.matmul_tflops.values()) > 0
    (timings,) = known.timings.values()
    assert {(t.attention, t.source) for t in timings} >= {("sdpa", "measured by calibrate")}
    assert all(t.round_seconds > 0 for t in timings)
    second = tuppence(*words, "name=second")
    assert second.code == 0, second.err
    assert "measuring" not in second.err


@pytest.mark.usefixtures("measures_quickly")
def test_a_corpus_without_newlines_can_be_trained_on(tuppence: Command, here: Path) -> None:
    (here / "line.txt").write_text("to be, or not to be, " * 900)
    assert tuppence("run", *TINY, "data.source=line.txt").code == 0


def test_a_file_where_the_shards_should_be(tuppence: Command, here: Path) -> None:
    (here / "file").write_text("")
    answer = tuppence("run", *TINY, "--data", "file")
    assert answer.code == 2
    assert "--runs and --data name folders" in answer.line


def test_a_reader_that_has_seen_enough() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    words = [sys.executable, "-m", "tuppence", "recipes", "--json"]
    done = subprocess.run(words, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- plan, recipes, runs, prepare


def test_plan_writes_nothing_and_prints_one_document(tuppence: Command, here: Path) -> None:
    answer = tuppence("plan", *TINY, "--json")
    assert answer.code == 0
    assert answer.document["run"]["budget.steps"] == 5
    plan = from_json(Plan, json.dumps(answer.document["plan"]))
    assert plan.name == "shakespeare"
    assert plan.step.max_steps == 5
    assert answer.document["options"][0]["micro_batch"] == plan.step.micro_batch
    read = tuppence("plan", *TINY)
    assert f"{plan.model.params:,} parameters" in read.out
    assert list(here.iterdir()) == []
    between = tuppence("plan", "shakespeare", "--json", *TINY)  # options among the words
    assert between.document["plan"] == answer.document["plan"]


def test_recipes_and_runs(tuppence: Command) -> None:
    document = tuppence("recipes", "--json").document
    assert list(document) == list(recipes.all_recipes())
    assert document["shakespeare"]["budget.usd"] == 0.02
    assert all(name in tuppence("recipes").out for name in document)
    assert tuppence("runs", "--json").document == {"runs": []}
    assert "tuppence run makes one" in tuppence("runs").out


# ---------------------------------------------------------------- a run, from end to end


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration, data_plan: DataPlan
) -> tuple[Path, Answer]:
    """`tuppence run` as a person runs it; made once, and only copies of it are touched."""
    place = tmp_path_factory.mktemp("finished")
    cache = tmp_path_factory.mktemp("cache-of-the-run")
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(cache))
        know_this_machine(calibration, data_plan, [TINY])
    words = [sys.executable, "-m", "tuppence", "run", *TINY, "--json"]
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, check=False)
    return place, Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def kept(finished: tuple[Path, Answer], here: Path) -> Path:
    """A copy of the finished run in the working folder of this test."""
    place, answer = finished
    assert answer.code == 0, answer.err
    shutil.copytree(place, here, dirs_exist_ok=True)
    return here / "runs" / "shakespeare"


def test_a_run_leaves_all_that_is_promised(finished: tuple[Path, Answer]) -> None:
    place, answer = finished
    assert answer.code == 0, answer.err
    folder = RunFolder(place / "runs" / "shakespeare")
    assert answer.document == json.loads(folder.file("receipt.json").read_text())
    assert answer.document["budget"] == {"kind": "steps", "limit": 5, "spent": 5, "fraction": 1.0}
    assert [row["step"] for row in folder.rows("metrics")] == [1, 2, 3, 4, 5]
    keys = "step tokens loss lr grad_norm step_seconds tokens_per_second mfu usd progress attempt"
    assert all({*keys.split(), "tokens_sha"} <= row.keys() for row in folder.rows("metrics"))
    assert [e["code"] for e in folder.rows("events")] == ["start", "save", "end"]
    (last,) = folder.rows("evals")
    assert last["step"] == 5
    names = "run.json plan.json argv.txt env.json receipt.json receipt.md receipt.html"
    assert all(folder.file(name).exists() for name in [*names.split(), "samples.jsonl"])
    there = sorted(path.name for path in folder.checkpoints.iterdir())
    assert there == ["best.json", "last.json", "step_00000005"]
    assert not folder.file("heartbeat.json").exists()
    asked = config.override(recipes.get("shakespeare"), TINY)
    assert folder.run() == dataclasses.replace(asked, name="shakespeare")
    argv = shlex.join(["tuppence", "run", *TINY, "--json"])
    assert folder.file("argv.txt").read_text() == argv + "\n"


def test_every_second_of_a_run_is_charged(finished: tuple[Path, Answer]) -> None:
    place, answer = finished
    folder = RunFolder(place / "runs" / "shakespeare")
    rows = list(folder.rows("ledger"))
    assert [row["phase"] for row in rows][:2] == ["provision", "prepare"]
    assert {"train", "evaluate", "save"} <= {row["phase"] for row in rows}
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(rows))
    started = json.loads(folder.file("env.json").read_text())["process_start"]
    assert rows[0]["start"] == pytest.approx(started, abs=0.1)
    charged = rows[-1]["end"] - rows[0]["start"]
    assert answer.document["usd"] == pytest.approx(charged / 3600)


def test_the_same_command_on_a_finished_run_does_nothing(tuppence: Command, kept: Path) -> None:
    before = contents(kept)
    for verb in ("run", "train"):
        answer = tuppence(verb, *TINY, "--json")
        assert answer.code == 0
        assert "runs/shakespeare is finished" in answer.err
        assert json.loads(answer.out)
    assert tuppence("run", *TINY, "--json").document == json.loads(before["receipt.json"])
    assert contents(kept) == before


def test_other_overrides_are_another_run(tuppence: Command, kept: Path) -> None:
    before = contents(kept.parent)
    for word, there in (("budget.steps=6", "5"), ("train.seed=1", "None")):
        key, _, asked = word.partition("=")
        answer = tuppence("run", *TINY, word)
        assert answer.code == 2
        assert f"holds a run with {key}={there}, not {asked}; give this" in answer.line
        assert "(name=...), or --fresh" in answer.line
    assert contents(kept.parent) == before


def test_fresh_keeps_the_old_folder_aside(tuppence: Command, kept: Path) -> None:
    before = contents(kept)
    answer = tuppence("run", *TINY, "train.seed=1", "--fresh", "--json")
    assert answer.code == 0
    assert "is kept as runs/shakespeare.1" in answer.err
    assert contents(kept.parent / "shakespeare.1") == before
    assert answer.document["finished"] is True
    assert RunFolder(kept).run().train.seed == 1


@pytest.mark.parametrize("word", ["model.n_head=3", "budget.tokens=1"])
def test_fresh_with_wrong_input_touches_nothing(tuppence: Command, kept: Path, word: str) -> None:
    before = contents(kept.parent)
    assert tuppence("run", *TINY, word, "--fresh").code in (2, 3)
    assert contents(kept.parent) == before


@pytest.mark.parametrize("option", [[], ["--fresh"]])
def test_two_processes_do_not_write_one_run(
    tuppence: Command, kept: Path, option: list[str]
) -> None:
    os.unlink(kept / "events.jsonl")  # not finished
    before = contents(kept.parent)
    with RunLock(RunFolder(kept)):
        answer = tuppence("run", *TINY, *option)
    assert answer.code == 2
    assert "another process is writing runs/shakespeare" in answer.line
    assert contents(kept.parent) == before


def test_the_same_run_under_another_name_is_the_same_bit_for_bit(
    tuppence: Command, kept: Path, finished: tuple[Path, Answer]
) -> None:
    told = tuppence("run", *TINY, "name=twin", "--json").document
    assert (told["name"], told["finished"]) == ("twin", True)
    assert told["hashes"] == finished[1].document["hashes"]
    listed = tuppence("runs", "--json").document["runs"]
    assert [row["name"] for row in listed] == ["shakespeare", "twin"]
    assert listed[0]["val_loss"] == listed[1]["val_loss"]


def test_the_receipt_is_rendered_from_the_folder_alone(tuppence: Command, kept: Path) -> None:
    before = contents(kept)
    shutil.rmtree(kept.parent.parent / "data")
    for name in ("receipt.json", "receipt.md", "receipt.html"):
        (kept / name).unlink()
    told = tuppence("receipt", "shakespeare", "--json").document
    assert told == json.loads(before["receipt.json"])
    assert contents(kept) == before
    shown = tuppence("receipt", str(kept)).out
    assert shown.startswith("receipt   shakespeare: spent 5 of 5 steps")


def test_eval_and_sample(tuppence: Command, kept: Path) -> None:
    before = contents(kept)
    told = tuppence("eval", "shakespeare", "--json").document
    assert told["checkpoint"] == "step_00000005"
    assert told["tokens"] == told["of_tokens"] == 111_539
    assert 0 < told["bpb"] < told["loss"] * 2
    last = tuppence("eval", "shakespeare", "--checkpoint", "last", "--json").document
    assert last["loss"] == told["loss"]
    words = ["sample", "shakespeare", "ROMEO:", "--tokens", "20", "--json"]
    first = tuppence(*words).document
    assert first["text"].startswith("ROMEO:")
    assert (first["tokens"], len(first["text"])) == (20, 26)
    assert tuppence(*words).document == first
    assert tuppence(*words, "--seed", "2").document["text"] != first["text"]
    after = contents(kept)
    assert json.loads(after.pop("evaluations/step_00000005/bpb.json"))["bpb"] == told["bpb"]
    assert after == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "--checkpoint", "7"], "write best, last or one of the steps 5"),
        (["eval", "--tasks", "cores"], "did you mean core?"),
        (["eval", "--tasks", "core"], "core cannot be read with this model's tokenizer"),
        (["sample", "--tokens", "0"], "at least 1"),
        (["sample", "--temperature", "-1"], "at least 0"),
        (["sample", ""], "no tokens"),
    ],
)
def test_wrong_options_of_a_run(tuppence: Command, kept: Path, words: list[str], says: str) -> None:
    verb, *options = words
    answer = tuppence(verb, "shakespeare", *options, "--json")
    assert answer.code == 2
    assert says in answer.line
    assert answer.document["error"]["message"] == answer.line


@pytest.mark.usefixtures("measures_quickly")
def test_a_corpus_that_changed_is_another_run(tuppence: Command, here: Path) -> None:
    text = here / "mine.txt"
    text.write_text("to be, or not to be\n" * 2000)
    words = ["train", *TINY, "data.source=mine.txt"]
    assert tuppence(*words).code == 0
    folder = RunFolder(here / "runs" / "shakespeare")
    lines = folder.file("events.jsonl").read_text().splitlines(keepends=True)
    folder.file("events.jsonl").write_text("".join(x for x in lines if '"end"' not in x))
    text.write_text("to be, or not to be?\n" * 2000)
    answer = tuppence(*words)
    assert answer.code == 2
    assert "data.source=mine.txt has changed" in answer.line
