"""HellaSwag as llm.c scores it: ids encoded apart, the least sum and the least mean."""

from __future__ import annotations

import math

import pytest
from small_corpora import SHARED
from small_suites import GPT2, Joins, small_hellaswag

from tuppence.errors import UserError
from tuppence.evals import hellaswag
from tuppence.evals.bundle import HellaSwag, Question, hellaswag_rows
from tuppence.evals.items import Answer
from tuppence.evals.subject import RunText
from tuppence.tokenizer.kinds import CharTokenizer

FILE = SHARED / "hellaswag_val.jsonl.xz"


def test_context_and_endings_are_encoded_apart() -> None:
    rows = HellaSwag((Question("He", ("runs.", "is"), 0),), "made up")
    (task,) = hellaswag.tasks(rows, Joins(), max_items=None)
    encoded = Joins().encode_batch(["He", " runs.", " is"])
    assert [ask.ids for ask in task.asks(0)] == [encoded[0] + ending for ending in encoded[1:]]
    assert [ask.scored for ask in task.asks(0)] == [3, 2]


def test_ids_are_those_of_llm_c() -> None:
    """The example of its script, in ids of GPT-2 that tiktoken gives: no end-of-text before it."""
    context = "A man is sitting on a roof. he"
    endings = (
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    )
    (task,) = hellaswag.tasks(HellaSwag((Question(context, endings, 3),), ""), GPT2, max_items=None)
    first = task.asks(0)[0]
    assert first.ids[:9] == [32, 582, 318, 5586, 319, 257, 9753, 13, 339]
    assert first.ids[9:] == [318, 1262, 14441, 284, 14441, 257, 5166, 286, 1341, 271, 13]
    assert first.scored == 11


def answers(*given: tuple[float, int]) -> list[Answer]:
    return [Answer(nats, tokens, False) for nats, tokens in given]


def test_sum_and_mean_may_choose_differently() -> None:
    (task,) = hellaswag.tasks(small_hellaswag(1), GPT2, max_items=None)  # its label is 0
    judged = task.judge(0, answers((4.0, 4), (3.0, 2), (9.0, 3), (9.0, 3)))
    assert judged == {"choice": 1, "correct": False, "choice_norm": 0, "correct_norm": True}


def test_the_first_of_equals_is_chosen() -> None:
    (task,) = hellaswag.tasks(small_hellaswag(1), GPT2, max_items=None)
    judged = task.judge(0, answers((3.0, 3), (2.0, 2), (2.0, 2), (4.0, 4)))
    assert (judged["choice"], judged["choice_norm"]) == (1, 0)


def test_fewer_items_are_the_first_of_a_shuffled_order() -> None:
    rows = small_hellaswag()
    (whole,) = hellaswag.tasks(rows, GPT2, max_items=None)
    (part,) = hellaswag.tasks(rows, GPT2, max_items=10)
    assert (whole.count, part.count) == (30, 10)
    assert [part.asks(n) for n in range(10)] == [whole.asks(n) for n in range(10)]
    contexts = [GPT2.decode(part.asks(n)[0].ids) for n in range(10)]
    assert len(set(contexts)) == 10
    assert contexts != [GPT2.decode(hellaswag_ids(rows, n)) for n in range(10)]


def hellaswag_ids(rows: HellaSwag, number: int) -> list[int]:
    """Of the row in the file's order, with its first ending."""
    row = rows.rows[number]
    return GPT2.encode_batch([f"{row.context} {row.endings[0]}"])[0]


def test_labels_go_with_their_items() -> None:
    rows = small_hellaswag()
    (task,) = hellaswag.tasks(rows, GPT2, max_items=None)
    for number in range(30):
        shown = GPT2.decode(task.asks(number)[0].ids)
        label = next(row.label for row in rows.rows if shown.startswith(row.context))
        nats = [(0.0 if i == label else 1.0, 1) for i in range(4)]
        assert task.judge(number, answers(*nats))["correct"]


def test_a_tokenizer_that_cannot_read_it_is_refused() -> None:
    text = RunText(CharTokenizer("abc", end_of_text=False))
    (task,) = hellaswag.tasks(small_hellaswag(), text, max_items=None)
    with pytest.raises(UserError, match=r"HellaSwag cannot be read .*'A'.*data\.tokenizer=gpt2"):
        task.asks(0)


def test_summary_has_both_scores_with_their_errors() -> None:
    judged = [{"correct": n < 30, "correct_norm": n < 40} for n in range(100)]
    told = hellaswag.summary({"hellaswag": judged}, sha256="made up")
    assert (told["acc"], told["acc_norm"], told["n"]) == (0.3, 0.4, 100)
    assert told["error"] == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.01)
    assert told["error_norm"] == pytest.approx(math.sqrt(0.4 * 0.6 / 100), rel=0.01)
    assert told["sha256"] == "made up"
    shown = hellaswag.table(told)
    assert "this model                           100    30.00%  4.56%    40.00%  4.88%" in shown
    assert "GPT-2 124M                        10,042    28.59%           29.55%" in shown


def test_no_answer_is_no_score() -> None:
    told = hellaswag.summary({})
    assert (told["acc"], told["error_norm"], told["n"]) == (None, None, 0)
    assert "this model                             0         -" in hellaswag.table(told)


def test_the_fields_rows_are_all_there() -> None:
    if not FILE.exists():
        pytest.skip(f"{FILE.name} is not beside this checkout")
    rows = hellaswag_rows(str(FILE), say=print)
    (task,) = hellaswag.tasks(rows, GPT2, max_items=None)
    assert task.count == 10_042
    assert [len(task.asks(n)) for n in range(50)] == [4] * 50
