"""CORE: the prompts, ids and rules are nanochat's, the score is the published one."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from small_corpora import SHARED
from small_suites import BYTES, GPT2, Joins, small_bundle

from tuppence.errors import UserError
from tuppence.evals import core
from tuppence.evals.bundle import CoreBundle, CoreTask, core_bundle, core_tasks
from tuppence.evals.items import Answer, Ask, Judged, Task
from tuppence.evals.subject import RunText
from tuppence.tokenizer.kinds import CharTokenizer

ARCHIVE = SHARED / "core_eval.tar.xz"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "core_prompts.json").read_text("utf-8"))
PUBLISHED = {
    "gpt2": ("openai-community-gpt2.csv", 0.113891),
    "gpt2_medium": ("openai-community-gpt2-medium.csv", 0.184903),
    "gpt2_large": ("openai-community-gpt2-large.csv", 0.214641),
    "gpt2_xl": ("openai-community-gpt2-xl.csv", 0.256525),
}


@pytest.fixture(scope="module")
def standard() -> CoreBundle:
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE.name} is not beside this checkout")
    return core_bundle(str(ARCHIVE), say=print)


def task_of(label: str) -> CoreTask:
    return next(task for task in core_tasks() if task.label == label)


def small(
    label: str, *, items: int = 30, text: Any = BYTES, max_per_task: int | None = None
) -> Task:
    made = core.tasks(small_bundle(items), text, context=1024, max_per_task=max_per_task)
    return next(task for task in made if task.label == label)


def said(ask: Ask) -> tuple[str, str]:
    """What is read, and what of it counts."""
    ids, scored = list(ask.ids), ask.scored
    return BYTES.decode(ids), BYTES.decode(ids[len(ids) - scored :])


def answer(nats: float, tokens: int = 1, *, greedy: bool = False) -> Answer:
    return Answer(nats, tokens, greedy)


# ---------------------------------------------------------------- the field's texts


@pytest.mark.parametrize("which", ["all", "capped at 12"])
def test_ids_and_what_counts_are_nanochats(standard: CoreBundle, which: str) -> None:
    """Of the first twelve items of each task; bench/core_peers.py compares every one."""
    cap = None if which == "all" else 12
    made = core.tasks(standard, GPT2, context=1024, max_per_task=cap)
    assert {task.label: digest(task) for task in made} == GOLDEN[which]


def digest(task: Task) -> str:
    items = []
    for number in range(12):
        asks = task.asks(number)
        ids = [list(ask.ids) for ask in asks]
        starts = [len(ask.ids) - ask.scored for ask in asks]
        told = json.dumps([ids, starts, [len(each) for each in ids]])
        items.append(hashlib.sha256(told.encode()).hexdigest())
    return hashlib.sha256("".join(items).encode()).hexdigest()[:16]


TEMPLATES = {  # as the field writes them: jinja, with what each kind of task shows
    "multiple_choice": "{% for e in examples %}{{ e.query }}{{ d }}{{ e.choices[e.gold] }}\n\n"
    "{% endfor %}{{ item.query }}{{ d }}{{ end }}",
    "schema": "{% for e in examples %}{{ e.context_options[e.gold] }}{{ d }}{{ e.continuation }}"
    "\n\n{% endfor %}{{ end }}{{ d }}{{ item.continuation }}",
    "language_modeling": "{% for e in examples %}{{ e.context | trim }}{{ d }}"
    "{{ e.continuation }}\n\n{% endfor %}{{ item.context | trim }}{{ d }}{{ end }}",
}


@pytest.mark.parametrize("task", core_tasks(), ids=lambda task: task.label)
def test_texts_are_those_of_a_template(standard: CoreBundle, task: CoreTask) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(TEMPLATES[task.kind])
    rng = random.Random(5)
    for _ in range(5):
        item, *examples = standard.items(
            task, rng.sample(range(standard.count(task)), task.shots + 1)
        )
        ends = item.get("choices") or item.get("context_options") or ["", item["continuation"]]
        wanted = [
            template.render(examples=examples, item=item, d=task.delimiter, end=end) for end in ends
        ]
        if task.kind == "language_modeling":
            wanted[0] = wanted[0].strip()
        assert core.rendered(task, item, examples) == wanted


# ---------------------------------------------------------------- rules, on made-up items


def test_a_choice_counts_from_where_choices_differ() -> None:
    task = small("copa")
    first, second, third = [said(ask) for ask in task.asks(0)]
    query = first[0].removesuffix(first[1])
    assert query == second[0].removesuffix(second[1])
    assert third == (f"{second[0]} or so", f"{second[1]} or so")


def test_texts_begin_with_end_of_text() -> None:
    for label in ("copa", "winograd", "coqa"):
        assert all(ask.ids[0] == 256 for ask in small(label).asks(0))


def test_a_schema_counts_what_contexts_share_at_their_end() -> None:
    dogs, cats = [said(ask) for ask in small("winograd").asks(0)]
    assert dogs[1] == cats[1] == "s barked all night."
    assert dogs[0].endswith("dogs barked all night.")


def test_what_no_id_stands_before_does_not_count() -> None:
    same = core.asked("schema", [[0, 5, 6], [0, 5, 6]])
    assert [ask.scored for ask in same] == [2, 2]


def test_a_continuation_counts_with_the_space_before_it() -> None:
    (ask,) = small("coqa").asks(0)
    whole, counted = said(ask)
    assert whole.startswith("Count to")
    assert counted.startswith(" one ")
    assert "\n" not in whole


def test_where_a_tokenizer_joins_what_differs_counts() -> None:
    seen = set()
    for number in range(30):
        (ask,) = small("coqa", text=Joins()).asks(number)
        counted = Joins().decode(ask.ids[len(ask.ids) - ask.scored :]).removesuffix("~")
        end = counted.rpartition(" ")[2]
        odd = len(f"Count to {end}") % 2  # then the last id of the context is half a continuation's
        assert counted == (f"{end[-1]} one {end}" if odd else f" one {end}")
        seen.add(odd)
    assert seen == {0, 1}


def test_examples_come_from_the_others() -> None:
    task = small("arc_easy", items=12)
    for number in range(12):
        text = said(task.asks(number)[0])[0]
        *examples, own = text.split("\n\n")
        assert len(examples) == len(set(examples)) == 10
        assert own.partition(":")[0] not in [example.partition(":")[0] for example in examples]


def test_examples_come_from_what_a_cap_leaves() -> None:
    left = {said(ask)[0].split("\n\n")[-1] for n in range(15) for ask in capped(15).asks(n)}
    shown = {
        example.partition("?")[0]
        for n in range(15)
        for example in said(capped(15).asks(n)[0])[0].split("\n\n")[:-1]
    }
    assert shown <= {text.partition("?")[0] for text in left}


def capped(items: int) -> Task:
    return small("arc_easy", max_per_task=items)


def test_a_cap_is_a_part_of_the_same_order() -> None:
    whole, part = small("copa"), small("copa", max_per_task=4)
    assert part.count == 4
    assert [part.asks(n) for n in range(4)] == [whole.asks(n) for n in range(4)]
    texts = [said(part.asks(n)[0])[0] for n in range(4)]
    assert texts != sorted(texts)


def test_a_cap_below_the_examples_still_shows_them_all() -> None:
    task = capped(2)
    assert task.count == 2
    assert said(task.asks(1)[0])[0].count("\n\n") == 10


@pytest.mark.parametrize(
    ("nats", "tokens", "choice"),
    [
        ([3.0, 2.0, 2.5], [1, 1, 1], 1),
        ([3.0, 4.0, 9.0], [1, 2, 3], 1),
        ([2.0, 2.0, 2.0], [1, 1, 1], 0),
        ([2.0, 0.0, 3.0], [1, 0, 1], 0),  # nan is never the least ...
        ([0.0, 2.0, 1.0], [0, 1, 1], 0),  # ... but where it comes first
    ],
)
def test_the_least_mean_is_chosen(nats: list[float], tokens: list[int], choice: int) -> None:
    task = small("copa")
    golds = [task.asks.__self__.rows[n]["gold"] for n in range(6)]  # type: ignore[attr-defined]
    for number, gold in enumerate(golds):
        judged = task.judge(number, [answer(n, t) for n, t in zip(nats, tokens, strict=True)])
        assert judged == {"choice": choice, "correct": choice == gold}


def test_a_continuation_is_right_where_every_id_is_likeliest() -> None:
    task = small("coqa")
    assert task.judge(0, [answer(1.0, 3, greedy=True)]) == {"correct": True}
    assert task.judge(0, [answer(1.0, 3)]) == {"correct": False}
    assert task.judge(0, [answer(0.0, 0, greedy=True)]) == {"correct": False}


def test_only_the_item_that_is_asked_is_encoded() -> None:
    class Counts(Joins):
        encoded = 0

        def encode_batch(self, texts: Any) -> list[list[int]]:
            Counts.encoded += len(texts)
            return super().encode_batch(texts)

    task = small("copa", text=Counts())
    assert Counts.encoded == 0
    task.asks(3)
    assert Counts.encoded == 3


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    text = RunText(CharTokenizer("abc", end_of_text=False))
    with pytest.raises(UserError, match=r"lacks; train with data\.tokenizer=gpt2, byte or bpe:N"):
        core.tasks(small_bundle(), text, context=64, max_per_task=None)


def test_a_tokenizer_that_cannot_read_the_texts_is_refused() -> None:
    text = RunText(CharTokenizer("abc", end_of_text=True))
    with pytest.raises(UserError, match=r"CORE's copa cannot be read .*'Q'.*data\.tokenizer=gpt2"):
        small("copa", text=text).asks(0)


# ---------------------------------------------------------------- the score


@pytest.mark.parametrize(("model", "told"), PUBLISHED.items(), ids=PUBLISHED)
def test_the_published_scores_are_recomputed(model: str, told: tuple[str, float]) -> None:
    assert core.published()[model] == pytest.approx(told[1], abs=1e-6)


@pytest.mark.parametrize(("model", "told"), PUBLISHED.items(), ids=PUBLISHED)
def test_the_published_tables_are_ours(
    standard: CoreBundle, model: str, told: tuple[str, float]
) -> None:
    with tarfile.open(ARCHIVE) as archive:
        name = next(name for name in archive.getnames() if name.endswith(f"/{told[0]}"))
        content = archive.extractfile(name)
        assert content is not None
        rows = list(csv.reader(content.read().decode().splitlines()))[1:]
    accuracies = {label.strip(): float(accuracy) for label, accuracy, _ in rows[:-1]}
    assert accuracies == {task.label: task.published[model] for task in core_tasks()}
    for task, (_, accuracy, shown) in zip(core_tasks(), rows[:-1], strict=True):
        assert core.centred(float(accuracy), task.baseline) == pytest.approx(float(shown), abs=2e-6)
    mean = sum(float(shown) for _, _, shown in rows[:-1]) / 22
    assert mean == pytest.approx(told[1], abs=1e-6)
    assert float(rows[-1][2]) == told[1]


def judged_as(model: str) -> dict[str, list[Judged]]:
    """Answers that are right as often as a published model's, of a thousand."""
    return {
        task.label: [{"correct": n < round(1000 * task.published[model])} for n in range(1000)]
        for task in core_tasks()
    }


def test_summary_of_answers_like_gpt2s() -> None:
    told = core.summary(small_bundle(), judged_as("gpt2"), max_per_task=1000)
    assert told["score"] == pytest.approx(0.113891, abs=3e-4)
    assert told["interval"][0] < told["score"] < told["interval"][1]
    assert told["n"] == 22_000
    assert told["max_per_task"] == 1000
    assert told["missing"] == []
    row = told["tasks"][3]
    assert row["task"] == "arc_easy"
    assert row["accuracy"] == pytest.approx(0.412)
    assert row["centered"] == pytest.approx((0.412 - 0.25) / 0.75)
    assert row["error"] == pytest.approx(math.sqrt(0.412 * 0.588 / 1000), rel=1e-3)
    assert json.loads(json.dumps(told)) == told


def test_a_task_without_answers_leaves_no_score() -> None:
    judged = judged_as("gpt2") | {"squad": []}
    told = core.summary(small_bundle(), judged)
    assert told["score"] is None
    assert told["error"] is None
    assert told["missing"] == ["squad"]
    assert told["n"] == 21_000
    assert "no score: no item of squad was answered in time" in core.table(told)


def test_the_table_has_the_published_beside_it() -> None:
    lines = core.table(core.summary(small_bundle(), judged_as("gpt2_xl"))).splitlines()
    assert max(map(len, lines)) <= 100
    row = r"arc_easy +1,000 +59\.5% +1\.6% +0\.4600 +41\.2% +48\.0% +53\.5% +59\.5%"
    assert re.fullmatch(row, lines[4])
    assert re.search(r" 0\.1139 +0\.1849 +0\.2146 +0\.2565$", lines[23])
    assert lines[24].startswith("95% of bootstrap draws: 0.2")


def test_what_items_depend_on_is_told() -> None:
    few, many = (core.suite(small_bundle(), max_per_task=cap) for cap in (5, None))
    assert few != many
    assert few == core.suite(small_bundle(), max_per_task=5)
