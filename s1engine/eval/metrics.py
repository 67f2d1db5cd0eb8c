"""Control, Scaling and Performance: how well one method turns thinking into accuracy.

The three figures of s1 (arXiv 2501.19393, section 3.2), each from the runs of one method.
Accuracies are exact fractions, so no rounding enters before the last step. Where the paper leaves a
case open:

    no limit              a bound that is missing cannot be broken: the run counts as within
    equal x               no slope joins the two runs, so their pair is left out
    x = 0                 has no logarithm: its pairs are left out, but not of the linear form
    no pair left          Scaling is None (one run, or all runs equally long)
    no run                all three are None

Knows nothing of questions, models or files.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LINEAR_UNIT = 1000  # thinking tokens per unit of x in the linear form


@dataclass(frozen=True, slots=True)
class Point:
    """One run: mean thinking tokens, accuracy in percent, and how much thinking was asked for."""

    tokens: float
    accuracy: Fraction
    limit: float | None = None
    limit_min: float | None = None

    @property
    def within(self) -> bool:
        """Did the run think no more and no less than asked, on average?"""
        low = self.limit_min is None or self.tokens >= self.limit_min
        return low and (self.limit is None or self.tokens <= self.limit)


def control(points: Sequence[Point]) -> float | None:
    """Share of runs within their limits, percent."""
    if not points:
        return None
    return float(Fraction(100 * sum(point.within for point in points), len(points)))


def scaling(points: Sequence[Point], *, linear: bool = False) -> float | None:
    """Mean slope over all pairs of runs, in percent of accuracy per doubling of thinking tokens;
    ``linear``: per 1,000 of them."""
    slopes = list(_slopes(points, linear))
    return math.fsum(slopes) / len(slopes) if slopes else None


def _slopes(points: Sequence[Point], linear: bool) -> Iterator[float]:
    for a, b in itertools.combinations(points, 2):
        if a.tokens == b.tokens:
            continue
        rise = float(b.accuracy - a.accuracy)
        if linear:
            yield rise / (b.tokens - a.tokens) * LINEAR_UNIT
        elif min(a.tokens, b.tokens) > 0:
            width = math.log2(b.tokens) - math.log2(a.tokens)
            if width:  # neighbouring floats can have equal logarithms
                yield rise / width


def performance(points: Sequence[Point]) -> float | None:
    """The best accuracy, percent."""
    return float(max(point.accuracy for point in points)) if points else None


def method_metrics(points: Sequence[Point], *, linear: bool = False) -> dict[str, float | None]:
    """All three by name."""
    return {
        "control": control(points),
        "scaling": scaling(points, linear=linear),
        "performance": performance(points),
    }


def exact_accuracy(percent: float, questions: int | None = None) -> Fraction:
    """``percent`` as a fraction; with the number of questions known, the share k/n that it rounds
    (56.7 of 30 questions is 17/30) if there is one within a tenth of a percent."""
    if questions:
        share = Fraction(100 * round(percent * questions / 100), questions)
        if abs(share - Fraction(percent)) < Fraction(1, 10):
            return share
    return Fraction(percent)


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
