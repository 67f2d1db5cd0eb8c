"""What is asked, and when: recorded traces, or drawn lengths at a rate.

The text of a prompt is of no matter, only which blocks of it were seen before. What a request
generates is a script: so many tokens of thinking until the model tries to end it, so many of
answer.
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

FIRST_TOKEN = 16  # ids below mean something to the simulation
TRACE_BLOCK = 512  # tokens that a hash of a Mooncake trace stands for


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace."""

    at: float | None  # seconds; None: the trace has lengths only
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()  # hashes of the prompt's blocks, where they are known


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request."""

    at: float  # seconds since the start
    prompt_len: int
    answer: int  # tokens
    thinking: int | None = None  # tokens until the model first tries to end; None: no thinking
    blocks: tuple[int, ...] = ()

    def prompt(self, number: int) -> np.ndarray:
        """[prompt_len] int32. Equal where the trace says so, else no other request's."""
        if not self.blocks:
            return np.full(self.prompt_len, FIRST_TOKEN + 2 * number + 1, np.int32)
        names = FIRST_TOKEN + 2 * np.array(self.blocks, np.int32)
        whole = np.repeat(names, TRACE_BLOCK)[: self.prompt_len]
        missing = self.prompt_len - len(whole)
        tail = np.full(missing, FIRST_TOKEN + 2 * number + 1, np.int32)
        return np.concatenate([whole, tail])


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBudget:
    """How the engine bounds thinking; token counts of phrases are those of s1's format."""

    max_thinking: int | None = None
    num_waits: int = 0
    wait_thinking: int = 256
    """Tokens that the model thinks after a wait before it tries to end again."""
    start_len: int = 2
    natural_end_len: int = 2
    newline_len: int = 1
    forced_end_len: int = 6
    wait_len: int = 1


def read_trace(path: Path) -> list[Arrival]:
    """Lines of Azure's and vidur's traces (CSV), Mooncake's and LLMServingSim's (JSON lines).

    Raises:
        RequestError: the file is none of them.
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
    """Lengths up to ``spread`` (a share) away from those asked for."""
    chance = random.Random(seed)

    def about(length: int) -> int:
        least, most = int(length * (1 - spread)), int(length * (1 + spread))
        return max(chance.randint(least, most), 1)

    return [Arrival(None, about(input_len), about(output_len)) for _ in range(count)]


def plan_requests(arrivals: Iterable[Arrival], thinking_share: float) -> list[PlannedRequest]:
    """Requests that generate what the trace says, a share of it as thinking."""
    requests = []
    for one in arrivals:
        output = max(one.output_len, 1)
        thinking = round(thinking_share * output) if thinking_share else None
        answer = max(output - (thinking or 0), 1)
        requests.append(
            PlannedRequest(one.at or 0.0, max(one.input_len, 1), answer, thinking, one.blocks)
        )
    start = requests[0].at if requests else 0.0
    return [replace(request, at=request.at - start) for request in requests]


def pace_requests(
    requests: Sequence[PlannedRequest], rate: float | None, seed: int
) -> list[PlannedRequest]:
    """At ``rate`` requests a second: those that come over time come faster or slower, others by a
    Poisson process. None: as they are; infinite: all at once."""
    if rate is None or not requests:
        return list(requests)
    if rate == float("inf"):
        return [replace(request, at=0.0) for request in requests]
    if requests[-1].at > 0:
        scale = (len(requests) - 1) / requests[-1].at / rate
        return [replace(request, at=request.at * scale) for request in requests]
    chance, at, found = random.Random(seed), 0.0, []
    for request in requests:
        found.append(replace(request, at=at))
        at += chance.expovariate(rate)
    return found


def thinking_len(request: PlannedRequest, budget: PlannedBudget) -> tuple[int, bool]:
    """Thinking tokens, waits included, and whether the budget cuts them off: what the core's state
    machine makes of the script."""
    tokens, cap = request.thinking or 0, budget.max_thinking
    for _ in range(budget.num_waits):
        if cap is not None and tokens + budget.wait_len >= cap:
            break
        tokens += budget.wait_len + budget.wait_thinking
    return (tokens, False) if cap is None or tokens < cap else (cap, True)


def output_len(request: PlannedRequest, budget: PlannedBudget) -> int:
    """Tokens of output: thinking with its waits, delimiter and forced text, answer."""
    if request.thinking is None:
        return request.answer
    tokens, cut = thinking_len(request, budget)
    end = budget.newline_len + budget.forced_end_len if cut else budget.natural_end_len
    return tokens + end + request.answer


def prompt_len(request: PlannedRequest, budget: PlannedBudget) -> int:
    """Tokens of the prompt, with the opened thinking."""
    return request.prompt_len + (0 if request.thinking is None else budget.start_len)


def max_thinking(request: PlannedRequest, budget: PlannedBudget) -> int:
    """What the scheduler is given: the budget, or one more than all that the model wants."""
    wanted = thinking_len(request, replace(budget, max_thinking=None))[0] + 1
    return wanted if budget.max_thinking is None else min(wanted, budget.max_thinking)


def max_len(request: PlannedRequest, budget: PlannedBudget) -> int:
    """Tokens that the request may come to, prompt and output."""
    room = 0
    if request.thinking is not None:
        end = max(budget.natural_end_len, budget.newline_len + budget.forced_end_len)
        room = max_thinking(request, budget) + end
    return prompt_len(request, budget) + room + request.answer
