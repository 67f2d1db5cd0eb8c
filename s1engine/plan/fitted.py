"""Time of a step fitted to measured steps of this machine.

    step = fixed + f(tokens) + s * samples + d * decode_context + e * extend_context
                 + p * extend_pairs + a * admitted + x if any row extends + m if others decode then

f is piecewise linear between powers of two, since a product's speed depends on its rows. No
coefficient is negative, so more work never takes less time. Errors count relative to the time.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from s1engine.plan.step import Step

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
OTHERS = (
    "samples", "decode_context", "extend_context", "extend_pairs", "admitted", "extends", "mixed"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FittedTime:
    """``at_knots``: seconds of a step of so many tokens and nothing else; ``each``: of one unit of
    the others."""

    at_knots: tuple[float, ...]
    each: tuple[float, ...]

    def seconds(self, step: Step) -> float:
        """Of one step."""
        each: float = sum(
            cost * getattr(step, name) for name, cost in zip(OTHERS, self.each, strict=True)
        )
        return self._of_tokens(step.tokens) + each

    def _of_tokens(self, tokens: float) -> float:
        """Beyond the last knot the last slope goes on."""
        knots, values = KNOTS, self.at_knots
        for i in range(1, len(knots)):
            if tokens <= knots[i] or i == len(knots) - 1:
                slope = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
                return values[i - 1] + slope * (max(tokens, 1) - knots[i - 1])
        raise AssertionError("there are knots")

    def to_json(self) -> dict[str, Any]:
        return {"knots": list(KNOTS), **asdict(self)}


def fit(steps: Sequence[Step], seconds: Sequence[float]) -> FittedTime:
    """By least squares of relative errors."""
    weights = 1 / np.array(seconds)
    columns = np.array([_columns(step) for step in steps])  # [points, coefficients]
    found = non_negative(columns * weights[:, None], np.ones(len(steps)))
    slopes = found[1 : len(KNOTS)]
    at_knots = found[0] + np.concatenate([[0.0], np.cumsum(slopes * np.diff(KNOTS))])
    return FittedTime(tuple(at_knots.tolist()), tuple(found[len(KNOTS) :].tolist()))


def _columns(step: Step) -> list[float]:
    ramps = [
        max(min(step.tokens, high) - low, 0.0)
        for low, high in zip(KNOTS, (*KNOTS[1:-1], float("inf")), strict=False)
    ]
    return [1.0, *ramps, *(getattr(step, name) for name in OTHERS)]


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |a x - b|: Lawson and Hanson's active sets. a: [m, n], b: [m]."""
    scale = np.maximum(np.linalg.norm(a, axis=0), 1e-300)
    a = a / scale
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(10 * len(x)):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        best = int(gradient.argmax())
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        x = _step_inside(a, b, x, free)
    return np.asarray(x / scale)


def _step_inside(a: np.ndarray, b: np.ndarray, x: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The least squares over the free ones; those that would turn negative are freed no more."""
    while True:
        wanted = np.zeros_like(x)
        wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        negative = free & (wanted <= 0)
        if not negative.any():
            return wanted
        share = (x[negative] / np.maximum(x[negative] - wanted[negative], 1e-300)).min()
        x = x + share * (wanted - x)
        free &= x > 1e-12
        x = np.where(free, x, 0.0)
