"""What may be compared: losses of one metric, tokenizer, split and part; results of one suite."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tuppence.data.prepare import Options, prepare
from tuppence.data.shards import load_manifest
from tuppence.evals import against
from tuppence.evals.against import Difference, Result, differences, refusal
from tuppence.evals.identity import fields, is_whole, refuse
from tuppence.evals.items import Judged
from tuppence.evals.journal import Journal

ROW: dict[str, Any] = {
    "metric_version": 1,
    "tokenizer_sha256": "a" * 64,
    "val_sha256": "b" * 64,
    "val_tokens": 999,
    "tokens": 999,
    "of_tokens": 999,
    "sequence_len": 16,
    "loss": 2.0,
    "bpb": 1.0,
}
HERE = Path()
PART = {"tokens": 64, "of_tokens": 64}


@pytest.mark.parametrize(
    ("mine", "other", "says"),
    [
        ({}, {}, None),
        ({}, {"sequence_len": 32}, None),  # the whole split, whatever the windows
        ({}, {"metric_version": 2}, "versions 1 and 2 of the metric"),
        ({}, {"tokenizer_sha256": "c" * 64}, "tokenizers differ (aaaaaaaaaaaa and cccccccccccc)"),
        ({}, {"val_sha256": "c" * 64}, "val splits hold other tokens (bbbbbbbbbbbb and cccccc"),
        (PART, {}, "64 of 999 tokens in windows of 16 against 999 of 999"),
        (PART, PART, None),
        (PART, {**PART, "sequence_len": 32}, "windows of 16 against 64 of 999 tokens in windows o"),
        (PART, {"tokens": 64}, "different parts"),  # cut short by a deadline
        ({"val_tokens": None}, {"val_tokens": None}, None),  # the same of both, however much it is
        ({"val_sha256": None}, {}, "the first does not say its val_sha256; evaluate it again"),
        ({}, {"metric_version": None}, "the second does not say its metric_version"),
    ],
)
def test_losses_that_may_not_be_compared(
    mine: dict[str, Any], other: dict[str, Any], says: str | None
) -> None:
    found = refuse(ROW | mine, ROW | other)
    assert (found is None) == (says is None), found
    assert says is None or says in str(found)
    assert (refuse(ROW | other, ROW | mine) is None) == (says is None)


def test_bits_per_byte_hold_across_tokenizers_on_one_text() -> None:
    hub = ROW | {"tokenizer_sha256": "c" * 64, "tokens": 500, "of_tokens": 500, "val_tokens": 500}
    assert refuse(ROW, hub) is not None
    assert refuse(ROW, hub, unit="bpb") is None
    assert "parts" in str(refuse(ROW | PART, hub, unit="bpb"))
    assert "tokenizers differ" in str(refuse(ROW, hub | {"val_sha256": "d" * 64}, unit="bpb"))
    kept = [each.score for each in differences("bpb", Result(ROW, HERE), Result(hub, HERE))]
    assert kept == ["bpb"]
    kept = [each.score for each in differences("bpb", Result(ROW, HERE), Result(ROW, HERE))]
    assert kept == ["loss", "bpb"]


def test_fields_tell_the_split_that_is_pinned(tmp_path: Path) -> None:
    texts = [f"document {i}: {'word ' * (i % 7)}" for i in range(200)]

    def made(name: str, texts: list[str], **options: Any) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        done = prepare(
            source=str(path), tokenizer="byte", root=tmp_path / "data", options=Options(**options)
        )
        found = fields(done.folder, sequence_len=16)
        assert found["val_tokens"] == load_manifest(done.folder).val_tokens - 1
        return found | {"tokens": found["val_tokens"], "of_tokens": found["val_tokens"]}

    first = made("first", texts, val_tokens=500)
    assert is_whole(first)
    assert refuse(first, made("first", texts, val_tokens=500, max_tokens=1000)) is None
    other = made("other", ["something else", *texts], val_tokens=500)
    assert "val splits hold other tokens" in str(refuse(first, other))


# ---------------------------------------------------------------- suites


def core(right: dict[str, list[bool]], **other: Any) -> dict[str, Any]:
    baselines = {"a": 0.25, "b": 0.0}
    rows = [{"task": t, "n": len(r), "baseline": baselines[t]} for t, r in right.items()]
    scores = [(sum(r) / len(r) - baselines[t]) / (1 - baselines[t]) for t, r in right.items()]
    told = {"metric": "core", "version": 1, "bundle_sha256": "s", "max_per_task": None}
    told |= {"tasks": rows, "n": sum(map(len, right.values())), "error": 0.03}
    return told | {"score": sum(scores) / len(scores)} | other


SUBJECT = {"weights_sha256": "w", "tokenizer_sha256": "t", "precision": "fp32", "context": 16}


def kept(
    folder: Path, document: dict[str, Any], rows: dict[str, list[Judged]], **asked: Any
) -> Result:
    """A result with the journal that it names, of a model that is `asked`."""
    suite = {key: value for key, value in document.items() if key in ("metric", "version")}
    lines = Journal(
        folder / "suite.jsonl", {"subject": SUBJECT | asked, "suite": suite}, lambda text: None
    )
    lines.open()
    for task, judged in rows.items():
        for item, each in enumerate(judged):
            lines.add((task, item), [], each)
    lines.close()
    return Result(document | SUBJECT | {"journal": lines.path.name}, folder)


def core_of(folder: Path, right: dict[str, list[bool]], **asked: Any) -> Result:
    rows: dict[str, list[Judged]] = {t: [{"correct": r} for r in rs] for t, rs in right.items()}
    return kept(folder, core(right), rows, **asked)


def drawn(seed: int, share: float, like: dict[str, list[bool]] | None = None) -> Any:
    """Answers; those `like` others differ in one of ten items."""
    rng = random.Random(seed)
    if like is not None:
        return {task: [r ^ (rng.random() < 0.1) for r in judged] for task, judged in like.items()}
    return {"a": [rng.random() < share for _ in range(300)], "b": [rng.random() < 0.3] * 200}


def test_the_error_of_a_paired_difference_is_that_of_its_items(tmp_path: Path) -> None:
    mine = drawn(0, 0.5)
    other = drawn(1, 0.5, like=mine)
    results = [core_of(tmp_path / str(i), right) for i, right in enumerate((mine, other))]
    (found,) = differences("core", *results)
    apart = {t: [int(x) - int(y) for x, y in zip(mine[t], other[t], strict=True)] for t in mine}
    assert found.difference == pytest.approx(
        sum(apart["a"]) / 300 / 0.75 / 2 + sum(apart["b"]) / 200 / 2
    )
    assert (
        found.how == f"paired, {sum(map(abs, apart['a'])) + sum(map(abs, apart['b']))} items apart"
    )
    rng = random.Random(3)
    draws = []
    for _ in range(2000):  # the bootstrap that the formula stands for
        again = {t: sum(rng.choices(d, k=len(d))) / len(d) for t, d in apart.items()}
        draws.append(again["a"] / 0.75 / 2 + again["b"] / 2)
    mean = sum(draws) / len(draws)
    spread = (sum((d - mean) ** 2 for d in draws) / len(draws)) ** 0.5
    assert found.error == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("lacking", ["journal", "name", "an item", "identity"])
def test_without_the_same_items_the_errors_are_added(tmp_path: Path, lacking: str) -> None:
    mine = drawn(0, 0.5)
    first = core_of(tmp_path / "mine", mine)
    other = core_of(tmp_path / "other", mine)
    path = other.folder / other.document["journal"]
    if lacking == "journal":
        path.unlink()
    elif lacking == "name":
        del other.document["journal"]
    elif lacking == "an item":
        path.write_bytes(path.read_bytes()[:-9])
    else:  # that of a model whose evaluation was interrupted
        third = core_of(tmp_path / "third", mine, weights_sha256="v")
        shutil.copy(third.folder / third.document["journal"], path)
    (found,) = differences("core", first, other)
    assert found.how == "unpaired"
    assert found.error == pytest.approx(0.03 * 2**0.5)


def test_items_that_a_result_does_not_count_are_not_paired(tmp_path: Path) -> None:
    """A journal holds more than a result of fewer items."""
    told = {"metric": "hellaswag", "version": 1, "sha256": "s", "n": 100}
    told |= {"acc": 0.5, "error": 0.05, "acc_norm": 0.5, "error_norm": 0.05}
    rows: list[Judged] = [{"correct": n % 2 == 0, "correct_norm": True} for n in range(300)]
    result = kept(tmp_path, told, {"hellaswag": rows})
    found = differences("hellaswag", result, result)
    nothing, error = "paired, 0 items apart", pytest.approx(1 / 102)  # which is no certainty
    assert found == [
        Difference("acc", 0.5, 0.5, 0.0, error, nothing, 100),
        Difference("acc_norm", 0.5, 0.5, 0.0, error, nothing, 100),
    ]


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("core", {}, None),
        ("core", {"version": 2}, "of version one has 1, the other 2"),
        ("core", {"bundle_sha256": "t"}, "of bundle one has s, the other t"),
        ("core", {"max_per_task": 100}, "of --max-per-task one has none, the other 100"),
        ("core", {"tasks": [{"n": 3}], "n": 3}, "cut short: 500 items against 3"),
        ("core", {"score": None}, "no score"),
    ],
)
def test_results_that_may_not_be_compared(
    name: str, other: dict[str, Any], says: str | None
) -> None:
    mine = core(drawn(0, 0.5))
    for pair in ((mine, mine | other), (mine | other, mine)):
        found = refusal(name, *pair)
        assert (found is None) == (says is None)
    assert says is None or says in str(refusal(name, mine, mine | other))


def test_every_suite_that_is_compared_says_what_must_be_the_same() -> None:
    assert against.COMPARED.keys() == against.SAME.keys()
