"""The requests of a workload and when they arrive: a recorded trace, or random lengths at a rate.

The text of a prompt does not matter, only which of its blocks repeat. A request's output is
scripted: thinking tokens until the model first tries to end its thinking, then answer tokens.
Knows no engine. ``bench serve`` reads its traces and paces its requests here too.
"""

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from s1engine.errors import RequestError

FIRST_TOKEN = 16  # the simulation uses the ids below
TRACE_BLOCK = 512  # tokens of one block hash of a Mooncake trace


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace."""

    at: float | None  # seconds; None: the trace has lengths only
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()  # hashes of the prompt's blocks, if the trace has them


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request and its scripted output."""

    at: float  # seconds since the start
    prompt_len: int
    answer: int  # tokens
    thinking: int | None = None  # tokens until the model first tries to end; None: no thinking
    blocks: tuple[int, ...] = ()

    def prompt(self, number: int) -> np.ndarray:
        """[prompt_len] int32: equal ids for equal block hashes, ids of its own elsewhere."""
        own = FIRST_TOKEN + 2 * number + 1
        if not self.blocks:
            return np.full(self.prompt_len, own, np.int32)
        block_ids = FIRST_TOKEN + 2 * np.array(self.blocks, np.int32)
        shared = np.repeat(block_ids, TRACE_BLOCK)[: self.prompt_len]
        return np.concatenate([shared, np.full(self.prompt_len - len(shared), own, np.int32)])


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBudget:
    """How the engine bounds thinking. The default phrase lengths are those of the s1 format."""

    max_thinking: int | None = None
    num_waits: int = 0
    wait_thinking: int = 256
    """Tokens that the model thinks after a wait before it tries to end again."""
    start_len: int = 2
    natural_end_len: int = 2
    newline_len: int = 1
    forced_end_len: int = 6
    wait_len: int = 1


# --- traces and random workloads ---


def read_trace(path: Path) -> list[Arrival]:
    """Reads a trace of Azure or vidur (CSV), Mooncake or LLMServingSim (JSON lines).

    Raises:
        RequestError: the file has none of these forms.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".csv":
                return [_from_csv(row) for row in csv.DictReader(file)]
            return [_from_json(json.loads(line)) for line in file]
    except (KeyError, ValueError, TypeError) as error:
        raise RequestError(
            f"trace: {path} has no line of a known form (Azure, vidur: CSV; Mooncake, "
            f"LLMServingSim: JSON lines): {type(error).__name__} {error}",
            param="trace",
        ) from error


def _from_csv(row: dict[str, str]) -> Arrival:
    if "num_prefill_tokens" in row:
        return Arrival(None, int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
    at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
    return Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _from_json(row: dict[str, Any]) -> Arrival:
    if "arrival_time_ns" in row:
        return Arrival(row["arrival_time_ns"] / 1e9, row["input_toks"], row["output_toks"])
    blocks = tuple(row.get("hash_ids", ()))
    return Arrival(row["timestamp"] / 1e3, row["input_length"], row["output_length"], blocks)


def random_arrivals(
    count: int, input_len: int, output_len: int, spread: float, seed: int
) -> list[Arrival]:
    """Random lengths, uniform within a share ``spread`` of the given means."""
    rng = random.Random(seed)

    def near(length: int) -> int:
        return max(rng.randint(int(length * (1 - spread)), int(length * (1 + spread))), 1)

    return [Arrival(None, near(input_len), near(output_len)) for _ in range(count)]


def pace(times: Sequence[float], rate: float | None, seed: int) -> list[float]:
    """Moves ascending arrival times, the first at 0, to a mean ``rate`` of requests a second.

    Times that differ are scaled; times that are all 0 become a Poisson process. None: no change;
    infinity: all at 0.
    """
    if rate is None or not times:
        return list(times)
    if rate == float("inf"):
        return [0.0] * len(times)
    if times[-1] > 0:
        scale = (len(times) - 1) / times[-1] / rate
        return [at * scale for at in times]
    rng, at, paced = random.Random(seed), 0.0, []
    for _ in times:
        paced.append(at)
        at += rng.expovariate(rate)
    return paced


def plan_requests(arrivals: Iterable[Arrival], thinking_share: float) -> list[PlannedRequest]:
    """Requests with the trace's lengths, a share of each output as thinking; the first at 0."""
    requests = []
    for arrival in arrivals:
        output = max(arrival.output_len, 1)
        thinking = round(thinking_share * output) if thinking_share else None
        answer = max(output - (thinking or 0), 1)
        prompt = max(arrival.input_len, 1)
        requests.append(PlannedRequest(arrival.at or 0.0, prompt, answer, thinking, arrival.blocks))
    start = requests[0].at if requests else 0.0
    return [replace(request, at=request.at - start) for request in requests]


def pace_requests(
    requests: Sequence[PlannedRequest], rate: float | None, seed: int
) -> list[PlannedRequest]:
    """The requests at a mean ``rate``, see ``pace``."""
    times = pace([request.at for request in requests], rate, seed)
    return [replace(request, at=at) for request, at in zip(requests, times, strict=True)]


# --- tokens of a request under a budget ---


def thinking_len(request: PlannedRequest, budget: PlannedBudget) -> tuple[int, bool]:
    """Thinking tokens, wait texts included, and whether the budget cuts the thinking. Agrees with
    the core's state machine."""
    tokens, cap = request.thinking or 0, budget.max_thinking
    for _ in range(budget.num_waits):
        if cap is not None and tokens + budget.wait_len >= cap:
            break
        tokens += budget.wait_len + budget.wait_thinking
    return (tokens, False) if cap is None or tokens < cap else (cap, True)


def output_len(request: PlannedRequest, budget: PlannedBudget) -> int:
    """Output tokens: thinking with its waits, end delimiter and forced text, answer."""
    if request.thinking is None:
        return request.answer
    tokens, cut = thinking_len(request, budget)
    end = budget.newline_len + budget.forced_end_len if cut else budget.natural_end_len
    return tokens + end + request.answer


def prompt_len(request: PlannedRequest, budget: PlannedBudget) -> int:
    """Prompt tokens, with the start delimiter of the thinking."""
    return request.prompt_len + (0 if request.thinking is None else budget.start_len)


def max_thinking(request: PlannedRequest, budget: PlannedBudget) -> int:
    """The maximum for the scheduler: the budget, at most one more token than the model wants."""
    wanted = thinking_len(request, replace(budget, max_thinking=None))[0] + 1
    return wanted if budget.max_thinking is None else min(wanted, budget.max_thinking)


def max_len(request: PlannedRequest, budget: PlannedBudget) -> int:
    """The largest number of tokens the request can reach, prompt and output."""
    thinking = 0
    if request.thinking is not None:
        end = max(budget.natural_end_len, budget.newline_len + budget.forced_end_len)
        thinking = max_thinking(request, budget) + end
    return prompt_len(request, budget) + thinking + request.answer
