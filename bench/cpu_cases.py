"""The cases of ``bench cpu``: lengths, prompts, and the figures that follow from the seconds.

Starts no engine.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s1engine.bench.load_generator import FIRST_ID
from s1engine.bench.shapes import step_bytes
from s1engine.models.model_config import ModelConfig

BITS = {"bf16": 16, "int8": 8, "int4": 4}  # per weight, without scales and tensors that stay wider


@dataclass(frozen=True, slots=True)
class CpuCase:
    """Requests that all arrive at the start."""

    lengths: tuple[int, ...]  # prompt tokens of each request
    new: int  # tokens to generate for each request

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths) + self.new

    @property
    def total_len(self) -> int:
        """Tokens of all sequences when they end."""
        return sum(self.lengths) + self.new * len(self.lengths)

    def scaled(self, factor: float) -> "CpuCase":
        """The same with lengths times ``factor``."""
        lengths = tuple(max(round(length * factor), 1) for length in self.lengths)
        return CpuCase(lengths, max(round(self.new * factor), 1))

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random ids."""
        rng = random.Random(seed)
        return [[rng.randrange(FIRST_ID, vocab_size) for _ in range(n)] for n in self.lengths]


def _mixed(count: int, low: int = 64, high: int = 512) -> tuple[int, ...]:
    """Lengths spread evenly from ``low`` to ``high``, shuffled."""
    lengths = [low + (high - low) * i // (count - 1) for i in range(count)]
    random.Random(count).shuffle(lengths)
    return tuple(lengths)


CASES = {
    "1": CpuCase((128,), 256),
    "16": CpuCase(_mixed(16), 128),
    "64": CpuCase(_mixed(64), 128),
    "prefill": CpuCase((2048,), 1),
}


@dataclass(slots=True)
class RoundTimes:
    """Seconds of an engine's rounds in one case."""

    first: list[float] = field(default_factory=list)  # until all first tokens; empty: not measured
    whole: list[float] = field(default_factory=list)  # until all tokens


def figures(case: CpuCase, times: RoundTimes, model: ModelConfig, precision: str) -> dict[str, Any]:
    """Rates of the median round. Decoding time is the whole time minus the time to the first
    tokens; ``read_gb_per_s`` counts the weights and the cache that a single sequence reads."""
    count = len(case.lengths)
    whole = statistics.median(times.whole)
    row: dict[str, Any] = {
        "rounds": len(times.whole),
        "seconds": round(whole, 4),
        "best_seconds": round(min(times.whole), 4),
        "output_tokens_per_s": round(count * case.new / whole, 2),
    }
    first = whole if case.new == 1 else statistics.median(times.first) if times.first else None
    if first is not None:
        row["prefill_tokens_per_s"] = round(sum(case.lengths) / first, 1)
    if first is not None and case.new > 1 and whole > first:
        rate = count * (case.new - 1) / (whole - first)
        row["decode_tokens_per_s"] = round(rate, 2)
        if count == 1:
            nbytes = _bytes_per_token(model, precision, case.lengths[0] + case.new // 2)
            row["read_gb_per_s"] = round(nbytes * rate / 1e9, 2)
    return row


def _bytes_per_token(model: ModelConfig, precision: str, context: int) -> float:
    """Weights at their nominal size and a bf16 KV cache."""
    weights = step_bytes(model, 1, 0, 0) * BITS[precision] / 8
    return weights + step_bytes(model, 2, 1, context) - step_bytes(model, 2, 0, 0)


def headline(row: dict[str, Any]) -> float | None:
    """The main rate of a row: decoding for one request, output for many, otherwise prefill."""
    key = {"1": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}
    rate: float | None = row.get(key.get(row["case"], "output_tokens_per_s"))
    return rate


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of equal first tokens: near 1 for engines that compute the same model in bf16, near 0
    otherwise."""
    same = [a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]
    return round(sum(same) / len(same), 3)
