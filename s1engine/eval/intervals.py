"""How sure an accuracy is: bootstrap intervals over the questions, of one run and between two.

Resampling n questions with replacement only matters through how many of each outcome are drawn, so
the resamples are drawn as those counts: the same distribution, without the questions.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
Interval = tuple[float, float]


def bootstrap_interval(correct: Sequence[bool], seed: int) -> Interval:
    """95 % interval of the accuracy in percent, by 10,000 resamples of the questions."""
    n = len(correct)
    return _middle(np.random.default_rng(seed).binomial(n, sum(correct) / n, RESAMPLES) / n)


def paired_interval(first: Sequence[bool], second: Sequence[bool], seed: int) -> Interval:
    """95 % interval of the second accuracy less the first, in percent, both over the same
    questions, which are resampled together."""
    assert len(first) == len(second)
    n = len(first)
    changes = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    shares = [changes.count(outcome) / n for outcome in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(n, shares, RESAMPLES)  # [RESAMPLES, 3]
    return _middle((counts[:, 2] - counts[:, 0]) / n)


def _middle(draws: np.ndarray) -> Interval:
    low, high = np.percentile(100 * draws, [2.5, 97.5])
    return float(low), float(high)
