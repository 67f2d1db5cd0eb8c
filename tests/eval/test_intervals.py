"""Bootstrap intervals: against resampling the questions themselves."""

import numpy as np
import pytest

from s1engine.eval.metrics import bootstrap_interval, paired_interval

FIRST = [i % 3 == 0 for i in range(60)]
SECOND = [i % 2 == 0 for i in range(60)]


def resampled(values: list[int]) -> tuple[float, float]:
    """The textbook way: sample questions, average, return the middle 95 %."""
    rng = np.random.default_rng(7)
    draws = 100 * rng.choice(np.array(values), size=(20_000, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def test_the_interval_is_that_of_resampled_questions() -> None:
    step = 100 / len(FIRST)  # means of n questions come in steps of one question
    assert bootstrap_interval(FIRST, 0) == pytest.approx(resampled(list(map(int, FIRST))), abs=step)


def test_the_paired_interval_is_that_of_resampled_pairs() -> None:
    changes = [int(b) - int(a) for a, b in zip(FIRST, SECOND, strict=True)]
    step = 100 / len(FIRST)
    assert paired_interval(FIRST, SECOND, 0) == pytest.approx(resampled(changes), abs=step)


def test_pairing_sees_what_single_intervals_do_not() -> None:
    better = [a or i < 3 for i, a in enumerate(FIRST)]
    low, high = paired_interval(FIRST, better, 0)
    assert 0 <= low < high < 10
    assert paired_interval(FIRST, FIRST, 0) == (0.0, 0.0)


def test_the_interval_narrows_with_more_questions() -> None:
    few, many = (bootstrap_interval([True, False] * n, 0) for n in (10, 1000))
    assert few[0] < many[0] < 50 < many[1] < few[1]
    assert bootstrap_interval([True] * 9, 0) == (100.0, 100.0)
