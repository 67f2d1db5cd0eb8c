"""What is asked of every engine on a CPU, and what the answers mean.

Owns lengths, prompts and the arithmetic from seconds to tokens a second. Starts nothing.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s1engine.bench.load_generator import FIRST_ID
from s1engine.bench.shapes import step_bytes
from s1engine.models.model_config import ModelConfig

BITS = {"bf16": 16, "int8": 8, "int4": 4}  # of a weight; scales and what is kept wider not counted


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that are all there at the start."""

    lengths: tuple[int, ...]  # tokens of each prompt
    new: int  # tokens to generate for each

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths) + self.new

    @property
    def total_len(self) -> int:
        """Tokens of all sequences at their end."""
        return sum(self.lengths) + self.new * len(self.lengths)

    def scaled(self, factor: float) -> "Case":
        """The same with lengths times ``factor``."""
        lengths = tuple(max(round(length * factor), 1) for length in self.lengths)
        return Case(lengths, max(round(self.new * factor), 1))

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random ids."""
        chance = random.Random(seed)
        return [[chance.randrange(FIRST_ID, vocab_size) for _ in range(n)] for n in self.lengths]


def _mixed(count: int, low: int = 64, high: int = 512) -> tuple[int, ...]:
    """Lengths spread evenly from ``low`` to ``high``, in an order of no meaning."""
    lengths = [low + (high - low) * i // (count - 1) for i in range(count)]
    random.Random(count).shuffle(lengths)
    return tuple(lengths)


CASES = {
    "1": Case((128,), 256),
    "16": Case(_mixed(16), 128),
    "64": Case(_mixed(64), 128),
    "prefill": Case((2048,), 1),
}


@dataclass(slots=True)
class Times:
    """Seconds of an engine's rounds in one case."""

    first: list[float] = field(default_factory=list)  # to the first tokens; empty: not measured
    whole: list[float] = field(default_factory=list)  # to all of them


def figures(case: Case, times: Times, model: ModelConfig, precision: str) -> dict[str, Any]:
    """Rates of the median round. Decoding is what remains of the whole when the time to the first
    tokens is taken off; ``weights_gb_per_s`` what a lone sequence reads of weights and cache."""
    count = len(case.lengths)
    whole = statistics.median(times.whole)
    found: dict[str, Any] = {
        "rounds": len(times.whole),
        "seconds": round(whole, 4),
        "best_seconds": round(min(times.whole), 4),
        "output_tokens_per_s": round(count * case.new / whole, 2),
    }
    first = whole if case.new == 1 else statistics.median(times.first) if times.first else None
    if first is not None:
        found["prefill_tokens_per_s"] = round(sum(case.lengths) / first, 1)
    if first is not None and case.new > 1 and whole > first:
        rate = count * (case.new - 1) / (whole - first)
        found["decode_tokens_per_s"] = round(rate, 2)
        if count == 1:
            nbytes = _bytes_a_token(model, precision, case.lengths[0] + case.new // 2)
            found["read_gb_per_s"] = round(nbytes * rate / 1e9, 2)
    return found


def _bytes_a_token(model: ModelConfig, precision: str, context: int) -> float:
    """Weights at their nominal size and a bf16 KV cache."""
    weights = step_bytes(model, 1, 0, 0) * BITS[precision] / 8
    return weights + step_bytes(model, 2, 1, context) - step_bytes(model, 2, 0, 0)


def headline(row: dict[str, Any]) -> float | None:
    """The one number of a row: decoding for one request, tokens out for many, else prefill."""
    key = {"1": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}
    found: float | None = row.get(key.get(row["case"], "output_tokens_per_s"))
    return found


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of first tokens that are the same: engines that compute the same model in bf16 agree
    on nearly all, those that do not on none."""
    same = [a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]
    return round(sum(same) / len(same), 3)
