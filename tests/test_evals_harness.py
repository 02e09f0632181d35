"""lm-evaluation-harness asks our subjects what it asks a model of its own, and hears the same."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gloo import start
from hub_models import begins_texts, written
from small_suites import BYTES

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a network
pytest.importorskip("transformers", reason="[dev] installs transformers")
pytest.importorskip("accelerate", reason="[dev] installs accelerate")
pytest.importorskip("lm_eval", reason="[dev] installs lm_eval")

from tuppence.errors import UserError
from tuppence.evals import bundle, core, foreign, harness, hellaswag, score
from tuppence.evals.subject import Subject
from tuppence.ranks import ALONE, Ranks, join
from tuppence.tokenizer.spec import build_tokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
CONTEXT = 64
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "one"),
    *("day", "it", "ran", "to", "the", "sea", "where", "ships", "of", "old", "were", "waiting"),
]

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its many libraries' own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GPT-2, and a Llama whose tokenizer begins each text; both with GPT-2's tokens."""
    root, tokens = tmp_path_factory.mktemp("hub"), build_tokenizer("gpt2", texts=lambda: iter(()))
    gpt2 = written(root / "gpt2", tokens, "GPT2LMHeadModel", sharp=6, n_positions=CONTEXT)
    words = {"sharp": 6, "max_position_embeddings": CONTEXT}
    llama = written(root / "llama", tokens, "LlamaForCausalLM", **words)
    wide = written(root / "wide", tokens, "GPT2LMHeadModel", sharp=6, n_positions=2 * CONTEXT)
    return {"gpt2": gpt2, "llama": begins_texts(llama, "<|endoftext|>"), "wide": wide}


@pytest.fixture(scope="module")
def subjects(folders: dict[str, Path]) -> dict[str, Subject]:
    words = {"precision": "fp32", "device": "cpu", "cores": 2, "say": print}
    return {name: foreign.of_transformers(str(f), **words) for name, f in folders.items()}


@pytest.fixture(scope="module")
def peers(folders: dict[str, Path]) -> Callable[[str], Any]:
    """The harness's own model of transformers."""
    from lm_eval.models.huggingface import HFLM

    def peer(name: str, batch: int = 3) -> Any:
        return HFLM(str(folders[name]), device="cpu", dtype="float32", batch_size=batch)

    return peer


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three tasks of one's own: a choice, a whole text and a text continued."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw, rows = random.Random(0), []
    for n in range(12):
        choices = [text(draw, draw.choice([1, 2, 5])) for _ in range(3)]
        rows.append({"query": text(draw, 8), "choices": choices, "gold": n % 3})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 2.0},
    }
    told: dict[str, dict[str, Any]] = {
        "chosen": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "choices",
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "whole": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{query}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "written": {
            "output_type": "generate_until",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, config in told.items():
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **base, **config}))
    return folder


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def asked(kind: str, rows: list[tuple[Any, ...]], *, of_each: int = 1) -> list[Any]:
    """Requests as the harness makes them, so many of each document."""
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, row, i % of_each, ("task", i // of_each, 1))
        for i, row in enumerate(rows)
    ]


# ---------------------------------------------------------------- item by item


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_log_likelihoods_are_those_of_its_own_model(
    name: str, subjects: dict[str, Subject], peers: Callable[[str], Any]
) -> None:
    draw, rows = random.Random(0), []
    # no context, one that begins as texts do, one that ends with spaces, one that must be cut
    for context in ["", "<|endoftext|>The", text(draw, 10) + "  ", text(draw, 90), text(draw, 5)]:
        for words in (1, 1, 4, 9):
            space = "" if context.endswith(" ") or not context else " "
            rows.append((context, space + text(draw, words)))
    rows += [("", "<|endoftext|>to be"), ("<|endoftext|>", "to be")] * 2
    requests = asked("loglikelihood", rows, of_each=4)
    found = harness.Asked(subjects[name]).loglikelihood(requests)
    expected = peers(name).loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([x for x, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(nats, 3) for nats, _ in found}) > 15


def test_what_is_greedy_is_known(subjects: dict[str, Subject]) -> None:
    model = harness.Asked(subjects["gpt2"])
    (said,) = model.generate_until(asked("generate_until", [("to the sea", {"max_gen_toks": 3})]))
    rows = [("to the sea", said), ("to the sea", said + " x")]
    first, second = model.loglikelihood(asked("loglikelihood", rows, of_each=2))
    assert first[1]
    assert not second[1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_whole_texts_as_its_own_model(
    name: str, subjects: dict[str, Subject], peers: Callable[[str], Any]
) -> None:
    draw = random.Random(1)
    lengths = [1, 30, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 7]
    requests = asked("loglikelihood_rolling", [(text(draw, n),) for n in lengths])
    found = harness.Asked(subjects[name]).loglikelihood_rolling(requests)
    expected = peers(name).loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert len(set(found)) == len(lengths)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("until", [[], ["e"], ["ing", "a "]])
def test_texts_continued_as_its_own_model(
    name: str, until: list[str], subjects: dict[str, Subject], peers: Callable[..., Any]
) -> None:
    draw = random.Random(2)
    words = {"until": until, "max_gen_toks": 12, "do_sample": False}
    rows = [(text(draw, n), dict(words)) for n in (1, 5, 30, CONTEXT, 2 * CONTEXT)]
    requests = asked("generate_until", rows)
    found = harness.Asked(subjects[name], batch=2).generate_until(requests)
    # one at a time: in a batch it cuts by the longest text
    assert found == peers(name, 1).generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 1
    assert not any(stop in said for stop in until for said in found)


def _answers(folder: str, ranks: Ranks) -> dict[str, Any]:
    """Of a few requests of each kind."""
    words = {"precision": "fp32", "device": "cpu", "cores": 1, "say": print}
    model = harness.Asked(foreign.of_transformers(folder, **words), batch=2, ranks=ranks)
    draw = random.Random(5)
    rows = [(text(draw, 3 + n // 3), " " + text(draw, 2)) for n in range(9)]
    whole = [(text(draw, 50 * n),) for n in range(1, 4)]
    goes_on = [(context, {"max_gen_toks": 5, "temperature": 0.7}) for context, _ in rows]
    return {
        "log-likelihoods": model.loglikelihood(asked("loglikelihood", rows, of_each=3)),
        "whole": model.loglikelihood_rolling(asked("loglikelihood_rolling", whole)),
        "written": model.generate_until(asked("generate_until", goes_on)),
    }


def _on_rank(folder: str, out: str) -> int:
    ranks = join("cpu")
    (Path(out) / f"{ranks.rank}.json").write_text(json.dumps(_answers(folder, ranks)))
    ranks.part()
    return 0


def test_every_rank_hears_every_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    started = start(2, _on_rank, str(folders["gpt2"]), str(tmp_path), folder=tmp_path)
    assert started.codes() == [0, 0], started.said(0) + started.said(1)
    alone = _answers(str(folders["gpt2"]), ALONE)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for (nats, greedy), expected in zip(
            found["log-likelihoods"], alone["log-likelihoods"], strict=True
        ):
            assert nats == pytest.approx(expected[0], abs=1e-4)
            assert greedy == expected[1]
        assert found["whole"] == pytest.approx(alone["whole"], abs=1e-3)
        assert found["written"] == alone["written"]


# ---------------------------------------------------------------- choices


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data: CORE and HellaSwag")
@pytest.mark.parametrize("label", ["openbook_qa", "copa", "piqa", "hellaswag"])
def test_choices_are_those_of_its_own_model(
    label: str,
    subjects: dict[str, Subject],
    peers: Callable[[str], Any],
    unpacked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As bench/harness.py has it of two hundred items of each task and of models of 124M."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import harness_peer

    subject, lm, count = subjects["wide"], peers("wide"), 12 if label == "piqa" else 20
    if label == "hellaswag":
        path = SHARED / "hellaswag_val.jsonl.xz"
        expected = harness_peer.hellaswag(lm, path, count)
        rows = bundle.hellaswag_rows(str(path), say=print)
        (task,) = hellaswag.tasks(rows, subject.text, max_items=count)
    else:
        expected = harness_peer.core(lm, unpacked, label, count)
        told = bundle.core_bundle(str(unpacked), say=print)
        made = core.tasks(told, subject.text, context=subject.context, max_per_task=count)
        (task,) = [each for each in made if each.label == label]
    found = dict(score.answers(subject, [(n, task.asks(n)) for n in range(count)]))
    assert len(expected) == len(found) == count
    chosen = [task.judge(n, found[n]) for n in range(count)]
    for judged, other in zip(chosen, expected, strict=True):
        if label == "hellaswag":
            assert judged["choice"] == other.choice_by_sum
            assert judged["choice_norm"] == other.choice
        else:
            assert judged["choice"] == other.choice
    assert len({judged["choice"] for judged in chosen}) > 1


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CORE's bundle as a folder."""
    import tarfile

    folder = tmp_path_factory.mktemp("core")
    with tarfile.open(SHARED / "core_eval.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob("core.yaml")).parent


# ---------------------------------------------------------------- tasks


def test_tasks_of_ones_own(
    tasks: Path,
    subjects: dict[str, Subject],
    peers: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    import lm_eval

    names = ["chosen", "whole", "written"]
    told = harness.run(subjects["gpt2"], names, include=str(tasks), limit=9, shots=1)
    assert "%|" not in capfd.readouterr().err  # no bars of others
    assert told["metric"] == "lm_eval"
    assert told["harness"] == harness.version()
    assert told["limit"] == 9
    rows = {row["task"]: row for row in told["tasks"]}
    assert list(rows) == names
    assert all(row["n"] == 9 and row["version"] == 2.0 for row in rows.values())
    assert {name: row["shots"] for name, row in rows.items()}["chosen"] == 1
    loaded = harness.load(names, include=str(tasks), shots=1)
    theirs = lm_eval.evaluate(peers("gpt2", 1), loaded, limit=9, log_samples=False)["results"]
    for name, metric in (
        ("chosen", "acc"),
        ("chosen", "acc_norm"),
        ("whole", "bits_per_byte"),
        ("written", "exact_match"),
    ):
        value = rows[name]["metrics"][metric]["value"]
        assert value == pytest.approx(theirs[name][f"{metric},none"], rel=1e-5)
    error = rows["chosen"]["metrics"]["acc"]["error"]
    accuracy = rows["chosen"]["metrics"]["acc"]["value"]
    assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 8))
    assert 0 < accuracy < 1
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("own", "shots", "shown"),
    [(None, None, 0), (None, 1, 1), (0, 1, 0), (2, None, 2), (2, 1, 1)],
)
def test_how_many_examples_are_shown(
    own: int | None, shots: int | None, shown: int, tasks: Path
) -> None:
    config = json.loads((tasks / "chosen.yaml").read_text())
    (tasks / "chosen.yaml").write_text(json.dumps(config | {"num_fewshot": own}))
    (task,) = harness.load(["chosen"], include=str(tasks), shots=shots)["tasks"].values()
    assert task.get_config("num_fewshot") == shown


def refused(subject: Subject, name: str, **words: Any) -> str:
    with pytest.raises(UserError) as told:
        harness.run(subject, [name], **words)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_task_that_is_not_there(
    subjects: dict[str, Subject], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    index = lm_eval.tasks.TaskManager

    def few(include_path: str, include_defaults: bool = True) -> Any:
        return index(include_path=include_path, include_defaults=False)  # its own take seconds

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    subject = subjects["gpt2"]
    assert "no such folder" in refused(subject, "chosen", include=str(tasks / "nowhere"))
    line = refused(subject, "choosen", include=str(tasks))
    assert "lm_eval:choosen" in line
    assert "chosen" in line.partition("did you mean")[2]


def test_data_that_is_not_there(subjects: dict[str, Subject], tasks: Path) -> None:
    config = json.loads((tasks / "chosen.yaml").read_text())
    config |= {"task": "lost", "dataset_path": "nobody/nothing"}
    config.pop("dataset_kwargs")
    (tasks / "lost.yaml").write_text(json.dumps(config))
    line = refused(subjects["gpt2"], "lost", include=str(tasks))
    assert "lm_eval:lost" in line
    assert "nobody/nothing" in line
    assert "cache" in line


def test_a_task_that_would_run_what_a_model_writes(
    subjects: dict[str, Subject], tasks: Path
) -> None:
    config = json.loads((tasks / "written.yaml").read_text())
    (tasks / "written.yaml").write_text(json.dumps(config | {"unsafe_code": True}))
    assert "not run here" in refused(subjects["gpt2"], "written", include=str(tasks))


@pytest.mark.parametrize("words", [{"num_beams": 4}, {"repetition_penalty": 1.2}])
def test_a_continuation_of_a_kind_that_we_have_not(
    words: dict[str, Any], subjects: dict[str, Subject], tasks: Path
) -> None:
    config = json.loads((tasks / "written.yaml").read_text())
    (tasks / "written.yaml").write_text(json.dumps(config | {"generation_kwargs": words}))
    assert next(iter(words)) in refused(subjects["gpt2"], "written", include=str(tasks))


def test_without_the_harness(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    assert "tuppence[harness]" in refused(subjects["gpt2"], "piqa")


def test_a_tokenizer_without_a_start(subjects: dict[str, Subject]) -> None:
    class Startless:
        start = None
        ends = frozenset[int]()
        encode_batch = staticmethod(BYTES.encode_batch)
        decode = staticmethod(BYTES.decode)

    model = harness.Asked(dataclasses.replace(subjects["gpt2"], text=Startless()))
    with pytest.raises(UserError, match="no end-of-text"):
        model.loglikelihood_rolling(asked("loglikelihood_rolling", [("to be",)]))
    assert model.loglikelihood(asked("loglikelihood", [("to be", " or")]))[0][0] < 0
