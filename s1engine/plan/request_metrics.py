"""Times and token counts of served requests, and their summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s1engine.plan.workload import PlannedRequest

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class RequestMetrics:
    """One served request; times in seconds since the start."""

    number: int
    request: PlannedRequest
    first: float = 0.0  # time of the first token
    end: float = 0.0
    output_tokens: int = 0
    thinking_tokens: int = 0
    forced_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.first - self.request.at

    @property
    def e2e(self) -> float:
        return self.end - self.request.at

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 if there is only one token."""
        return (self.end - self.first) / max(self.output_tokens - 1, 1)


def summarize_requests(served: Sequence[RequestMetrics]) -> dict[str, Any]:
    """Rates, and mean and percentiles of latencies in seconds."""
    begin, end = min(one.request.at for one in served), max(one.end for one in served)
    tokens = sum(one.output_tokens for one in served)
    summary: dict[str, Any] = {
        "requests": len(served),
        "duration_s": end - begin,
        "output_tokens": tokens,
        "thinking_tokens": sum(one.thinking_tokens for one in served),
        "tokens_per_s": tokens / (end - begin),
        "requests_per_s": len(served) / (end - begin),
    }
    for name in ("ttft", "tpot", "e2e"):
        values = [getattr(one, name) for one in served]
        summary[f"{name}_s"] = {"mean": float(np.mean(values))} | {
            f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES
        }
    return summary
