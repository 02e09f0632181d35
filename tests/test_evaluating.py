"""The verb eval: of a run's checkpoint and of a model of transformers, alone and on two ranks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import command
from gloo import start
from small_runs import finished
from small_suites import small_bundle, small_hellaswag

from tuppence import asking, cli, host
from tuppence.config import DataPlan
from tuppence.data.prepare import Options, prepare
from tuppence.data.shards import load_manifest
from tuppence.evals import bundle, harness, journal, samples, score
from tuppence.evals.told import line as told_in_a_line
from tuppence.folder import RunFolder
from tuppence.hub.export import export
from tuppence.plan.hardware import Calibration

given_core = bundle.core_bundle
SHARED = Path(__file__).parents[2] / "shared" / "data"
STEP = "step_00000003"
Say = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        (line,) = [line for line in self.err.splitlines() if line.startswith("tuppence: ")]
        return line.removeprefix("tuppence: ")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some documents, in bytes."""
    place, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    texts = ["".join(rng.choices("abc def\n", k=rng.randint(20, 90))) for _ in range(120)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (place / "mine.jsonl").write_text("".join(lines))
    options = Options(val_tokens=1000)
    source = str(place / "mine.jsonl")
    return prepare(source=source, tokenizer="byte", root=place, options=options).folder


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    calibration: Calibration,
    data_plan: DataPlan,
    shards: Path,
) -> Path:
    """Two runs of three steps that differ in their seed, and an export of the first."""
    root = tmp_path_factory.mktemp("work")
    (root / "runs").mkdir()
    manifest = load_manifest(shards)
    data = dataclasses.replace(
        data_plan,
        tokenizer="byte",
        vocab_size=257,
        train_tokens=manifest.train_tokens,
        val_tokens=manifest.val_tokens,
    )
    for seed, name in enumerate(("one", "two"), 1):
        words = ["data.tokenizer=byte", f"train.seed={seed}", "model.sequence_len=32"]
        words += ["model.family=gpt2", "model.n_layer=2", "train.learning_rate=0.05"]
        folder = finished(root / "runs" / name, words, data, shards, calibration)
        folder.write_json("env.json", {"data_folder": str(shards)})
    export(RunFolder(root / "runs" / "one"), which="best", out=root / "model")
    return root


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of this test's own with the runs."""
    place = tmp_path / "work"
    shutil.copytree(trained, place)
    monkeypatch.chdir(place)
    return place


def made_up() -> None:
    """Suites of a few made-up items, wherever the field's are asked for."""
    bundle.core_bundle = lambda given, *, say: small_bundle(12)  # type: ignore[assignment]
    bundle.hellaswag_rows = lambda given, *, say: small_hellaswag(40)  # type: ignore[assignment]


def items_of(folder: Path, name: str = "core") -> list[dict[str, Any]]:
    """What the one journal of a suite holds."""
    (path,) = folder.glob(f"{name}.????????.jsonl")
    return list(journal.rows_of(path))


@pytest.fixture
def eval_(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Runs `tuppence eval` in this process, on made-up suites."""
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    for name in ("core_bundle", "hellaswag_rows"):
        monkeypatch.setattr(bundle, name, getattr(bundle, name))
    made_up()

    def run(*words: str) -> Answer:
        code = cli.main(["eval", *words])
        return Answer(code, *capsys.readouterr())

    return run


def scores(document: dict[str, Any]) -> dict[str, Any]:
    """What a result says but for when and where it was made."""
    apart = ("seconds", "asked", "run", "model", "checkpoint", "step", "weights_sha256", "journal")
    return {key: value for key, value in document.items() if key not in apart}


# ---------------------------------------------------------------- of a run


def test_all_suites_of_a_run_are_kept(eval_: Callable[..., Answer], here: Path) -> None:
    told = eval_("one", "--tasks", "all", "--json").document
    assert [*told["results"]] == ["bpb", "core", "hellaswag", "sample"]
    kept = here / "runs" / "one" / "evaluations" / STEP
    for name, file in (("bpb", "bpb"), ("core", "core"), ("sample", "samples")):
        assert json.loads((kept / f"{file}.json").read_text()) == told["results"][name]
    core = told["results"]["core"]
    assert (core["n"], core["asked"], len(core["tasks"])) == (264, 264, 22)
    assert (core["run"], core["checkpoint"], core["step"]) == ("runs/one", STEP, 3)
    assert core["precision"] == "fp32"
    assert told["results"]["hellaswag"]["n"] == 40
    assert len(told["results"]["sample"]["rows"]) == 12
    assert (told["loss"], told["tokens"]) == (told["results"]["bpb"]["loss"], 999)

    again = eval_("one", "--tasks", "core,hellaswag", "--json").document["results"]
    assert again["core"] == core  # nothing was asked: what it took is what it took before
    assert len(items_of(kept)) == 264
    assert (kept / core["journal"]).exists()


def test_bits_per_byte_alone_is_what_training_says(
    eval_: Callable[..., Answer], here: Path
) -> None:
    told = eval_("one").out.strip()
    assert told.startswith(f"{STEP}: val loss ")
    assert told.endswith("bits per byte (999 tokens)")
    document = eval_("runs/one", "--json").document
    assert f"val loss {document['loss']:.4f} nats" in told
    keys = "run checkpoint split loss bpb tokens of_tokens seconds metric_version val_sha256"
    assert {*keys.split()} <= document.keys()
    on_text = eval_("one", "--val", "two", "--json").document
    assert on_text["loss"] == pytest.approx(document["loss"], rel=1e-6)
    kept = here / "runs/one/evaluations" / STEP
    assert json.loads((kept / "bpb.json").read_text()) == document["results"]["bpb"]
    text = json.loads((kept / f"bpb_{on_text['val_sha256'][:8]}.json").read_text())
    assert text == on_text["results"]["bpb"]
    assert text["val"] == "two"
    assert told_in_a_line(text).endswith("bits/byte on two's val split (999 tokens)")
    assert "bits per byte on two's val split (999 tokens)" in eval_("one", "--val", "two").out
    assert eval_("one", "--batch", "1", "--json").document["loss"] == pytest.approx(
        document["loss"], rel=1e-6
    )


def test_prompts_that_are_left_out_are_told(
    eval_: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = samples.Samples([], ["1 + 1 ="])
    monkeypatch.setattr(samples, "samples", lambda subject, own: found)
    answer = eval_("one", "--tasks", "sample")
    assert "sample: '1 + 1 =' is left out" in answer.err


def test_people_read_tables(eval_: Callable[..., Answer]) -> None:
    assert "--- temperature 0.8" in eval_("one", "--tasks", "sample").out
    out = eval_("one", "--tasks", "core,hellaswag", "--max-per-task", "4").out
    assert "boolq" in out
    assert "GPT-2" in out
    assert "acc_norm" in out
    assert f"{STEP}, fp32" in out
    assert max(map(len, out.splitlines())) <= 100


def test_another_kind_of_result_is_kept_beside(eval_: Callable[..., Answer], here: Path) -> None:
    kept = here / "runs" / "one" / "evaluations" / STEP
    first = eval_("one", "--tasks", "core,hellaswag", "--json").document["results"]
    capped = eval_("one", "--tasks", "core,hellaswag", "--max-per-task", "5", "--json")
    assert capped.document["results"]["core"]["n"] == 110
    assert capped.document["results"]["hellaswag"]["asked"] == 0  # its items are the same
    for name in ("core", "hellaswag"):
        assert json.loads((kept / f"{name}.json.1").read_text()) == first[name]
    assert len(items_of(kept, "hellaswag")) == 40
    eval_("one", "--tasks", "core", "--max-per-task", "5", "--precision", "bf16")
    assert json.loads((kept / "core.json").read_text())["precision"] == "bf16"
    assert (kept / "core.json.2").exists()
    assert eval_("one", "--tasks", "core", "--json").document["results"]["core"]["asked"] == 0


def test_the_fields_own_items(
    eval_: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    paths = [SHARED / "core_eval.tar.xz", SHARED / "hellaswag_val.jsonl.xz"]
    if not all(path.exists() for path in paths):
        pytest.skip("needs ../shared/data/core_eval.tar.xz and hellaswag_val.jsonl.xz")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    words = ["--core-data", str(paths[0]), "--hellaswag-data", str(paths[1])]
    tasks = ["--tasks", "core,hellaswag", "--max-per-task", "2"]
    told = eval_("one", *tasks, *words, "--json").document["results"]
    assert told["core"]["n"] == 44
    assert told["hellaswag"]["n"] == 2
    bundled = eval_("one", *tasks, *words, "--batch", "1", "--out", "again", "--json").document
    for name in told:
        assert scores(bundled["results"][name]) == scores(told[name])


def test_a_disk_that_is_full(eval_: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "core.jsonl")

    monkeypatch.setattr(journal.Journal, "add", full)
    answer = eval_("one", "--tasks", "core")
    assert answer.code == 1
    assert answer.line.startswith("cannot write core.jsonl: No space left on device; make room")
    assert answer.line.endswith("the same command goes on where it was")


# ---------------------------------------------------------------- of others


def test_a_model_of_transformers_scores_as_the_run_that_it_was(
    eval_: Callable[..., Answer], here: Path
) -> None:
    mine = eval_("one", "--tasks", "all", "--json").document["results"]
    words = ["--hf", "model", "--val", "one", "--tasks", "all", "--json"]
    other = eval_(*words).document["results"]
    (kept,) = here.glob("evaluations/*")
    assert kept.name == f"model-{other['core']['weights_sha256'][:8]}"
    assert json.loads((kept / "core.json").read_text()) == other["core"]
    for name in ("core", "hellaswag", "sample"):
        assert scores(other[name]) | {"own_prompt": None} == scores(mine[name]) | {
            "own_prompt": None
        }
    assert other["bpb"]["loss"] == pytest.approx(mine["bpb"]["loss"], rel=1e-5)
    assert other["bpb"]["bpb"] == pytest.approx(mine["bpb"]["bpb"], rel=1e-5)
    told = eval_(*words[:-1], "--against", "one").out
    assert "(the same text, all of it, n=999)" in told
    assert "score" in told
    assert "+0.0000 +- " in told
    assert "(paired, 0 items apart, n=264)" in told


def test_tasks_of_the_harness_are_handed_on(
    eval_: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    asked: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    versions = ["0.4.9"]

    def run(subject: Any, names: Any, **words: Any) -> dict[str, Any]:
        asked.append((tuple(names), words))
        metrics = {"acc": {"value": 2 / 3, "error": 0.1}}
        rows = [{"task": name, "n": 3, "metrics": metrics} for name in names]
        told = {"metric": "lm_eval", "version": 1, "limit": words["limit"], "tasks": rows}
        return told | {"harness": versions[-1]}

    monkeypatch.setattr(harness, "run", run)
    tasks = ["--tasks", "lm_eval:piqa,bpb,lm_eval:arc_easy"]
    out = eval_("one", *tasks, "--limit", "3", "--lm-eval-include", "mine").out
    (names, words) = asked[0]
    assert names == ("piqa", "arc_easy")
    assert (words["include"], words["limit"]) == ("mine", 3)
    assert "acc 0.6667 +- 0.1000" in out

    def kept() -> list[str]:
        found = json.loads((here / f"runs/one/evaluations/{STEP}/lm_eval.json").read_text())
        return [row["task"] for row in found["tasks"]]

    eval_("one", "--tasks", "lm_eval:boolq,lm_eval:piqa", "--limit", "3")
    assert kept() == ["arc_easy", "boolq", "piqa"]
    versions.append("0.4.10")
    eval_("one", "--tasks", "lm_eval:boolq", "--limit", "3")
    assert kept() == ["boolq"]  # those of another version of the harness are beside


# ---------------------------------------------------------------- against


def test_two_runs_against_each_other(eval_: Callable[..., Answer], here: Path) -> None:
    tasks = ["--tasks", "bpb,core,hellaswag"]
    missing = eval_("two", *tasks, "--against", "one")
    assert missing.code == 2
    assert missing.line.endswith("tuppence eval one --tasks bpb")
    one = eval_("one", *tasks, "--json").document["results"]
    told = eval_("two", *tasks, "--against", "one", "--json").document
    against = told["against"]
    (core,) = against["core"]["differences"]
    assert core["difference"] == told["results"]["core"]["score"] - one["core"]["score"]
    assert core["how"].startswith("paired, ")
    assert core["error"] > 0
    assert [d["score"] for d in against["bpb"]["differences"]] == ["loss", "bpb"]
    file = here / f"runs/one/evaluations/{STEP}/core.json"
    by_file = eval_("two", "--tasks", "core", "--against", str(file), "--json").document
    assert by_file["against"] == {"core": against["core"] | {"result": str(file)}}


def test_what_may_not_be_compared_is_refused(eval_: Callable[..., Answer], here: Path) -> None:
    eval_("one", "--tasks", "bpb,core", "--max-per-task", "5")
    refused = eval_("two", "--tasks", "core", "--max-per-task", "6", "--against", "one", "--json")
    assert refused.code == 2
    assert "of --max-per-task one has 6, the other 5" in refused.line
    file = here / f"runs/one/evaluations/{STEP}/bpb.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_sha256": "0" * 64}))
    refused = eval_("two", "--against", str(file), "--json")
    assert refused.code == 0
    file.write_text(json.dumps(json.loads(file.read_text()) | {"val_sha256": "0" * 64}))
    refused = eval_("two", "--against", str(file), "--json")
    assert refused.code == 2
    assert "their tokenizers differ" in refused.line
    assert refused.line.endswith("; tuppence eval one --val two first")
    assert eval_("one", "--val", "two").code == 0
    assert eval_("two", "--against", "one").code == 0  # which finds what was asked for
    refused = eval_("--hf", "model", "--val", "two", "--against", str(file), "--json")
    assert refused.line.endswith("; tuppence eval one --val two first")


def test_a_run_against_itself_measured_otherwise(eval_: Callable[..., Answer]) -> None:
    """The other is the result that was there before, though mine takes its place."""
    eval_("two", "--tasks", "core")
    eval_("one", "--tasks", "core", "--out", "here")
    told = eval_("two", "--tasks", "core", "--out", "here", "--against", "here", "--json").document
    (found,) = told["against"]["core"]["differences"]
    assert found["how"] != "paired, 0 items apart"
    assert found["how"].startswith("paired")
    assert found["difference"] != 0


@pytest.mark.parametrize(
    ("before", "words", "says"),
    [
        (["two", "--tasks", "core", "--max-per-task", "5"], [], "of --max-per-task one has none"),
        (["two", "--tasks", "bpb,hellaswag"], ["--against", "kept"], "kept: it has no core.json"),
        (["two", "--tasks", "core"], ["--core-data", "gone"], "gone: no such"),
        (["two", "--tasks", "core"], ["--out", "model/config.json"], "model/config.json (Fi"),
        (["two", "--tasks", "core"], ["--out", "/proc/x"], "name a folder with --out"),
        (["two", "--tasks", "core"], ["--out", "foreign"], "not a result of tuppence eval"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_asked(
    before: list[str],
    words: list[str],
    says: str,
    eval_: Callable[..., Answer],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert eval_(*before, "--out", "kept").code == 0
    (here / "foreign").mkdir()
    (here / "foreign" / "core.json").write_text("[]")
    if "gone" in words:
        monkeypatch.setattr(bundle, "core_bundle", given_core)

    def never(*given: Any, **also: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(score, "_score", never)
    monkeypatch.setattr(asking, "_own_bpb", never)
    refused = eval_("one", "--tasks", "bpb,core", *(words or ["--against", "kept/core.json"]))
    assert refused.code == 2
    assert says in refused.line


# ---------------------------------------------------------------- wrong words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["one", "--tasks", "cores"], "no task 'cores'; did you mean core?"),
        (["one", "--tasks", "bpb,piqa"], "no task 'piqa'; perhaps lm_eval:piqa? (there are bpb"),
        (["one", "--tasks", "lm_eval:"], "lm_eval:TASK"),
        (["one", "--tasks", ""], "no such task; there are bpb"),
        (["one", "--batch", "0"], "--batch 0: at least 1"),
        (["one", "--tasks", "core", "--max-per-task", "0"], "--max-per-task 0: at least 1"),
        (["one", "--checkpoint", "7"], "--checkpoint 7: write best, last or one of the steps 3"),
        (["three"], "no run 'three'; there are: one, two"),
        (["one", "--hf", "model"], "name one of the two"),
        ([], "see tuppence eval --help"),
        (["--hf", "model"], "say what to ask with --tasks"),
        (["--hf", "model", "--tasks", "bpb"], "--val RUN"),
        (["--hf", "runs", "--tasks", "core"], "runs"),
        (["--hf", "model", "--tasks", "core", "--recurrence", "3"], "only a looped model"),
        (["--hf", "model", "--val", "nowhere"], "--val nowhere: neither prepared shards nor a run"),
        (["one", "--recurrence", "3"], "only a looped model"),
        (["one", "--tasks", "sample", "--against", "two"], "compares bpb, core, hellaswag"),
        (["one", "--against", "nowhere"], "no run 'nowhere'"),
        (["one", "--against", "lm_eval.json"], "is of lm_eval; what is compared is bpb, core, he"),
        (["one", "--core-data", "x"], "--core-data is for core, which --tasks does not name"),
        (["one", "--hellaswag-data", "x", "--tasks", "core"], "--hellaswag-data is for hellaswag"),
        (["one", "--lm-eval-include", "x"], "--lm-eval-include is for lm_eval:TASK"),
        (["one", "--val", "two", "--tasks", "core"], "--val is for bpb"),
        (["one", "--against", "model/config.json"], "not a result of tuppence eval"),
    ],
)
def test_wrong_words(eval_: Callable[..., Answer], words: list[str], says: str, here: Path) -> None:
    (here / "lm_eval.json").write_text('{"metric": "lm_eval"}')
    answer = eval_(*words, "--json")
    assert answer.code == 2
    assert says in answer.line
    assert answer.document["error"]["message"] == answer.line


def test_a_run_whose_shards_are_gone(eval_: Callable[..., Answer], here: Path) -> None:
    (here / "runs/one/env.json").write_text(json.dumps({"data_folder": str(here / "gone")}))
    answer = eval_("one")
    assert answer.code == 2
    assert "the shards of this run are not at" in answer.line
    assert eval_("one", "--tasks", "hellaswag").code == 0  # which needs none


# ---------------------------------------------------------------- ranks, and what is killed


def asked_in_a_process(words: list[str], kill_after: int | None, number: int) -> int:
    """The command in a process of its own, which may send itself a signal between passes."""
    made_up()
    host.settle_threads = lambda threads: {}  # type: ignore[assignment]
    passes, scored = [], score._score

    def _score(*given: Any) -> Any:
        passes.append(1)
        if len(passes) == kill_after:
            os.kill(os.getpid(), number)
        return scored(*given)

    score._score = _score
    return command(["eval", *words])


def test_two_ranks_killed_and_gone_on_with(
    eval_: Callable[..., Answer], here: Path, tmp_path: Path
) -> None:
    tasks = ["--tasks", "bpb,core,hellaswag,sample", "--json"]
    alone = eval_("one", *tasks, "--batch", "1", "--out", "alone").document["results"]
    words = ["one", *tasks, "--batch", "16", "--out", "both"]
    killed = start(
        2, asked_in_a_process, words, 4, signal.SIGKILL, folder=tmp_path / "first", cwd=here
    )
    assert -signal.SIGKILL in killed.codes()
    before = len(items_of(here / "both"))
    assert 0 < before < 264
    again = start(2, asked_in_a_process, words, None, 0, folder=tmp_path / "second", cwd=here)
    assert again.codes() == [0, 0], again.said(0) + again.said(1)
    assert again.said(1) == ""
    for name, result in alone.items():
        both = json.loads((here / "both" / f"{name.replace('sample', 'samples')}.json").read_text())
        if name == "bpb":
            assert both["loss"] == pytest.approx(result["loss"], abs=1e-5)
        else:
            assert scores(both) == scores(result)
    rows = [
        {(row["task"], row["item"]): row for row in items_of(here / place)}
        for place in ("alone", "both")
    ]
    assert rows[0].keys() == rows[1].keys()
    for key, row in rows[0].items():
        assert rows[1][key]["judged"] == row["judged"]
        assert rows[1][key]["nats"] == pytest.approx(row["nats"], abs=1e-5)


def test_ctrl_c_leaves_what_was_answered(here: Path, tmp_path: Path) -> None:
    words = ["one", "--tasks", "core", "--batch", "1"]
    stopped = start(
        1, asked_in_a_process, words, 30, signal.SIGINT, folder=tmp_path / "logs", cwd=here
    )
    assert stopped.codes() == [130]
    assert stopped.lines() == [
        "tuppence: interrupted; the same command goes on with what is not answered"
    ]
    assert "Traceback" not in stopped.said(0)
    kept = here / "runs/one/evaluations" / STEP
    assert 0 < len(items_of(kept)) < 264
    assert not (kept / "core.json").exists()
