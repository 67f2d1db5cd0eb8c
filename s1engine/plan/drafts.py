"""What drafts make of a step's time, on paper: a few tokens more computed, more than one kept.

The engine drafts as far as its costs say that it pays, and not at all where it does not; so does
this, among the pairs of drafted and kept tokens that were measured on traces, or that follow from
an acceptance. Steps in which prompts are computed are taken without drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from s1engine.plan.step import Step, StepTime

# Drafted and kept tokens a row and step, by the longest draft, from cautious to bold: the engine's
# drafter along every eighth trace of QwQ-32B in misguided_qwq32b.json (118,845 tokens), guesses
# with a chance of at least 0.6, 0.4, 0.3, 0.2, 0.1 (``bench.speculation.Own``).
MEASURED: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.260, 1.195), (0.506, 1.321), (0.560, 1.340), (0.665, 1.366), (0.686, 1.371)),
    2: ((0.310, 1.227), (0.668, 1.403), (0.812, 1.452), (1.062, 1.510), (1.236, 1.538)),
    4: ((0.331, 1.240), (0.747, 1.439), (0.960, 1.505), (1.341, 1.588), (1.843, 1.654)),
    8: ((0.338, 1.243), (0.776, 1.449), (1.018, 1.521), (1.458, 1.613), (2.158, 1.696)),
}


def choices(most: int, acceptance: float | None) -> tuple[tuple[float, float], ...]:
    """Pairs of drafted and kept tokens for drafts of up to ``most``. None: as on the traces; else
    every guess is right with that chance if those before it were."""
    if acceptance is None:
        return MEASURED[max(length for length in MEASURED if length <= most)]
    kept = 1.0
    found = []
    for drafted in range(1, most + 1):
        kept += acceptance**drafted
        found.append((float(drafted), kept))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class DraftedTime:
    """Seconds of a step that gives each decoding row one token, its share of a step with drafts."""

    plain: StepTime
    choices: Sequence[tuple[float, float]]

    def seconds(self, step: Step) -> float:
        """Of one step."""
        alone = self.plain.seconds(step)
        if step.extends or step.samples != step.tokens:
            return alone
        return min([alone, *(self._drafting(step, *choice) for choice in self.choices)])

    def _drafting(self, step: Step, drafted: float, kept: float) -> float:
        """Cached tokens are read once for all that is drafted behind them."""
        rows = step.tokens * (1 + drafted)
        return self.plain.seconds(replace(step, tokens=rows, samples=rows)) / kept
