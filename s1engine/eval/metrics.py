"""Control, Scaling and Performance of a method, and the uncertainty of an accuracy.

The three metrics of s1 (arXiv 2501.19393, section 3.2), each over the runs of one method.
Accuracies are exact fractions, so only the last step rounds. Cases that the paper leaves open:

    no limit              counts as within the limit
    equal x               the pair has no slope and is left out
    x = 0                 has no logarithm: its pairs are left out, except in the linear form
    no pair left          Scaling is None (one run, or all runs equally long)
    no run                all three are None

Intervals are bootstrap intervals over the questions. Knows no questions, models or files.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LINEAR_UNIT = 1000  # thinking tokens per unit of x in the linear form
RESAMPLES = 10_000
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """One run: mean thinking tokens, accuracy in percent, limits of thinking tokens."""

    tokens: float
    accuracy: Fraction
    limit: float | None = None
    limit_min: float | None = None

    @property
    def within(self) -> bool:
        """Whether the mean thinking is within both limits."""
        low = self.limit_min is None or self.tokens >= self.limit_min
        return low and (self.limit is None or self.tokens <= self.limit)


def control(points: Sequence[Point]) -> float | None:
    """Control: percent of runs within their limits."""
    if not points:
        return None
    return float(Fraction(100 * sum(point.within for point in points), len(points)))


def scaling(points: Sequence[Point], *, linear: bool = False) -> float | None:
    """Scaling: mean slope over all pairs of runs, in percent of accuracy per doubling of thinking
    tokens; ``linear``: per 1,000 tokens."""
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
    """Performance: the best accuracy, in percent."""
    return float(max(point.accuracy for point in points)) if points else None


def method_metrics(points: Sequence[Point], *, linear: bool = False) -> dict[str, float | None]:
    """All three metrics by name."""
    return {
        "control": control(points),
        "scaling": scaling(points, linear=linear),
        "performance": performance(points),
    }


def exact_accuracy(percent: float, questions: int | None = None) -> Fraction:
    """``percent`` as a fraction. With a number of questions n, the nearest k/n if it is within a
    tenth of a percent: 56.7 of 30 questions is 17/30."""
    if questions:
        share = Fraction(100 * round(percent * questions / 100), questions)
        if abs(share - Fraction(percent)) < Fraction(1, 10):
            return share
    return Fraction(percent)


# --- intervals: resampling n questions with replacement, drawn as counts of each outcome ---


def bootstrap_interval(correct: Sequence[bool], seed: int) -> Interval:
    """95 % interval of an accuracy in percent, from 10,000 resamples of the questions."""
    n = len(correct)
    return _percentiles(np.random.default_rng(seed).binomial(n, sum(correct) / n, RESAMPLES) / n)


def paired_interval(first: Sequence[bool], second: Sequence[bool], seed: int) -> Interval:
    """95 % interval of the second accuracy minus the first, in percent, both over the same
    questions, resampled together."""
    assert len(first) == len(second)
    n = len(first)
    changes = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    shares = [changes.count(outcome) / n for outcome in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(n, shares, RESAMPLES)  # [RESAMPLES, 3]
    return _percentiles((counts[:, 2] - counts[:, 0]) / n)


def _percentiles(draws: np.ndarray) -> Interval:
    low, high = np.percentile(100 * draws, [2.5, 97.5])
    return float(low), float(high)
