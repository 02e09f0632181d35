"""Errors of scores, against the textbook and against drawing items one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

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


def test_bootstrap_is_the_same_each_time() -> None:
    assert bootstrap(COUNTS) == bootstrap(COUNTS)
