"""Errors of scores, against the textbook and against drawing items one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuppence.evals.against import _error
from tuppence.evals.statistics import Count, bootstrap, centred


def test_a_guess_is_zero_and_all_right_is_one() -> None:
    assert centred(0.25, 0.25) == 0
    assert centred(1.0, 0.62) == 1
    assert centred(0.0, 0.5) == -1


def test_error_of_many_answers_is_the_textbook_one() -> None:
    count = Count(3_000, 10_000, 0.25)
    assert count.error == pytest.approx(math.sqrt(0.3 * 0.7 / 10_000), rel=1e-3)


def test_a_few_answers_that_are_all_right_are_not_certain() -> None:
    # Wilson at z = 1: from (k + 1/2 -+ sqrt(k (n - k) / n + 1/4)) / (n + 1)
    assert Count(2, 2, 0).error == pytest.approx(0.5 / 3)
    assert Count(0, 2, 0).error == pytest.approx(0.5 / 3)
    assert Count(1, 2, 0).error == pytest.approx(math.sqrt(1 / 2 + 1 / 4) / 3)


COUNTS = [Count(40, 100, 0.25), Count(7, 10, 0.5), Count(300, 1000, 0.0)]


def test_bootstrap_has_the_exact_variance() -> None:
    variances = [c.accuracy * (1 - c.accuracy) / c.n / (1 - c.baseline) ** 2 for c in COUNTS]
    assert bootstrap(COUNTS).error == pytest.approx(math.sqrt(sum(variances)) / 3, rel=0.02)


def test_bootstrap_is_items_drawn_anew_within_each_task() -> None:
    rng = np.random.default_rng(1)
    answers = [np.arange(c.n) < c.right for c in COUNTS]
    draws = []
    for _ in range(4000):
        again = [rng.choice(each, size=len(each)).mean() for each in answers]
        drawn = [centred(float(a), c.baseline) for a, c in zip(again, COUNTS, strict=True)]
        draws.append(sum(drawn) / 3)
    spread = bootstrap(COUNTS)
    assert [spread.low, spread.high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.02)
    assert spread.error == pytest.approx(np.std(draws), rel=0.06)


@pytest.mark.parametrize("right", [0, 1])
def test_bootstrap_of_an_item_a_task_is_not_certain(right: int) -> None:
    """All wrong or all right: of each task sqrt(1/4 x 3/4), about the score."""
    counts = [Count(right, 1, 0.25)] * 22
    score, spread = centred(float(right), 0.25), bootstrap(counts)
    assert spread.error == pytest.approx(math.sqrt(3 / 16 / 22) / 0.75, rel=0.02)
    assert spread.low < score - spread.error
    assert spread.high > score + spread.error


@pytest.mark.parametrize("n", [1, 5])
def test_bootstrap_is_what_asking_others_would_show(n: int) -> None:
    """22 tasks of a few items each, asked again and again of a model that is right in 0.35."""
    right = np.random.default_rng(2).binomial(n, 0.35, size=(40, 22))
    errors = [bootstrap([Count(int(r), n, 0.25) for r in row]).error for row in right]
    assert np.mean(errors) == pytest.approx(math.sqrt(0.35 * 0.65 / n / 22) / 0.75, rel=0.1)


def test_bootstrap_of_many_items_is_items_drawn_anew() -> None:
    rng = np.random.default_rng(1)
    counts = [Count(3_000, 10_000, 0.25), Count(600, 1_000, 0.5)]
    draws = sum(centred(rng.binomial(c.n, c.accuracy, 20_000) / c.n, c.baseline) for c in counts)
    spread = bootstrap(counts)
    assert spread.error == pytest.approx(np.std(draws / 2), rel=0.02)
    expected = np.percentile(draws / 2, [2.5, 97.5])
    assert [spread.low, spread.high] == pytest.approx(expected, abs=0.001)


def test_bootstrap_is_the_same_each_time() -> None:
    assert bootstrap(COUNTS) == bootstrap(COUNTS)


# ---------------------------------------------------------------- of pairs


def test_no_items_apart_are_no_certainty() -> None:
    """Half an item more of each kind, as Agresti and Min have it."""
    assert _error({"a": [0] * 16}, None) == pytest.approx(1 / 18)
    assert _error({"a": [1] * 16}, None) == pytest.approx(
        math.sqrt(17 / 18 - (16 / 18) ** 2) / 18**0.5
    )
    assert _error({"a": [0] * 8, "b": [0] * 8}, {"a": 0.5, "b": 0.5}) < _error({"a": [0] * 8}, None)


def test_error_of_many_pairs_is_mcnemars() -> None:
    pairs = [1] * 700 + [-1] * 600 + [0] * 8_700
    expected = math.sqrt((1_300 - 100**2 / 10_000) / 10_000**2)
    assert _error({"a": pairs}, None) == pytest.approx(expected, rel=1e-3)
