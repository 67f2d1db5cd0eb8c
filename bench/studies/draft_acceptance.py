"""Draft acceptance on recorded traces: replays their tokens with several drafting rules.

A trace holds sampled tokens, so a draft is accepted as far as the trace continues with it: the
tokens of a step are counted, not modelled. The engine's drafter is compared with a look-up of the
latest n-gram of fixed length, and with a vote over all matches. A step with d draft tokens is
assumed to cost 1 + a * d, for several a.

The traces are a JSON file: ``results``, each with ``prompt`` and lists ``thinking`` and ``output``.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from s1engine import _core
from s1engine.tokenizer import Tokenizer

SLOPES = (0.01, 0.03, 0.1, 0.3)  # a: about the first on a GPU with one sequence, the last on a CPU
AFTER_WAIT = 64  # tokens counted as following a "Wait"
LIMIT = 8  # longest draft of the engine's drafter
LEAST = 0.05  # acceptance probability below which the scheduler ignores a draft token


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """One request: prompt, thinking and answer; the latter two start at these positions."""

    tokens: np.ndarray  # int32
    thinking: int
    answer: int


class DraftSource(Protocol):
    """A drafting rule on one trace."""

    def draft(self, position: int) -> list[int]:
        """Draft tokens for ``position`` and after; positions never decrease."""

    def learn(self, sampled: list[int]) -> None:
        """Record the tokens that the step yielded."""


class NgramLookup:
    """Drafts the tokens after the latest match of the last n tokens, for the longest n."""

    def __init__(self, tokens: np.ndarray, shortest: int, longest: int, limit: int) -> None:
        self._tokens: list[int] = tokens.tolist()
        self._sizes = range(longest, shortest - 1, -1)
        self._limit = limit
        self._latest: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def draft(self, position: int) -> list[int]:
        for end in range(self._seen + 1, position):
            for n in self._sizes:
                if n <= end:
                    self._latest[tuple(self._tokens[end - n : end])] = end
        self._seen = position - 1
        for n in self._sizes:
            place = self._latest.get(tuple(self._tokens[max(position - n, 0) : position]))
            if place is not None:
                return self._tokens[place : min(place + self._limit, position)]
        return []

    def learn(self, sampled: list[int]) -> None:
        pass


class SuffixVote:
    """Drafts by a vote over all places of the longest match, like a suffix tree with counts."""

    def __init__(self, tokens: np.ndarray, limit: int) -> None:
        self._tokens: list[int] = tokens.tolist()
        self._limit = limit
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._seen = 1

    def draft(self, position: int) -> list[int]:
        tokens = self._tokens
        for end in range(self._seen + 1, position):
            self._places[tuple(tokens[end - 2 : end])].append(end)
        self._seen = max(position - 1, 1)
        places = self._places.get(tuple(tokens[position - 2 : position]), [])
        size = 2
        while len(places) > 1:
            size += 1
            wanted = tokens[position - size]
            longer = [p for p in places if p >= size and tokens[p - size] == wanted]
            if not longer or size == position:
                break
            places = longer
        drafted: list[int] = []
        while places and len(drafted) < self._limit:
            at = len(drafted)
            votes = [tokens[p + at] for p in places if p + at < position]
            if not votes:
                break
            winner = max(reversed(votes), key=votes.count)
            places = [p for p in places if p + at < position and tokens[p + at] == winner]
            drafted.append(winner)
        return drafted

    def learn(self, sampled: list[int]) -> None:
        pass


class EngineDrafter:
    """The engine's drafter; ``least``: acceptance probability below which a token is left out."""

    def __init__(self, tokens: np.ndarray, least: float, limit: int = LIMIT) -> None:
        self._tokens = tokens
        self._least = least
        self._limit = limit
        self._drafter = _core.Drafter()
        self._proposed: list[tuple[int, int, float]] = []
        self._drafted = 0

    def draft(self, position: int) -> list[int]:
        self._proposed = self._drafter.propose(
            self._tokens[:position], limit=self._limit, min_probability=LEAST
        )
        chosen = [token for token, _, probability in self._proposed if probability >= self._least]
        self._drafted = len(chosen)
        return chosen

    def learn(self, sampled: list[int]) -> None:
        """As csrc/core/draft_planner.cpp does: it also learns whether the first token after the
        accepted draft was right."""
        for (token, level, _), actual in zip(self._proposed, sampled, strict=False):
            self._drafter.record(level, token == actual)


@dataclass(slots=True)
class StepTotals:
    """Totals over steps."""

    steps: int = 0
    tokens: int = 0
    drafted: int = 0

    def add(self, yielded: int, drafted: int) -> None:
        self.steps += 1
        self.tokens += yielded
        self.drafted += drafted

    def summary(self) -> dict[str, Any]:
        accepted = self.tokens - self.steps
        return {
            "tokens_per_step": round(self.tokens / self.steps, 3),
            "drafted_per_step": round(self.drafted / self.steps, 3),
            "accepted_share": round(accepted / max(self.drafted, 1), 3),
            "speedup": {
                str(a): round(self.tokens / (self.steps + a * self.drafted), 3) for a in SLOPES
            },
        }


def replay(trace: RecordedTrace, source: DraftSource) -> Iterator[tuple[int, int, int]]:
    """Position, tokens yielded and tokens drafted, for every step of a trace."""
    tokens = trace.tokens.tolist()
    position = trace.thinking
    while position < len(tokens):
        draft = source.draft(position)[: len(tokens) - position - 1]
        accepted = 0
        while accepted < len(draft) and draft[accepted] == tokens[position + accepted]:
            accepted += 1
        source.learn(tokens[position : position + accepted + 1])
        yield position, accepted + 1, len(draft)
        position += accepted + 1


SOURCES: dict[str, Callable[[np.ndarray], DraftSource]] = {}
for _n, _m in ((1, 3), (2, 4), (3, 5)):
    for _k in (1, 2, 4, 8):
        SOURCES[f"latest of {_n} to {_m}, k={_k}"] = partial(
            NgramLookup, shortest=_n, longest=_m, limit=_k
        )
for _k in (2, 4):
    SOURCES[f"vote of all, k={_k}"] = partial(SuffixVote, limit=_k)
for _least in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
    SOURCES[f"own, least={_least}"] = partial(EngineDrafter, least=_least)
PARTS_OF = "own, least=0.1"


def read_traces(path: Path, tokenizer: Tokenizer, every: int) -> list[RecordedTrace]:
    """Every ``every``-th trace of the file."""
    traces = []
    for row in json.loads(path.read_text(encoding="utf-8"))["results"]:
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        for thinking, answer in zip(row["thinking"], row["output"], strict=True):
            head, middle = tokenizer.encode(prompt), tokenizer.encode(thinking or "")
            tail = tokenizer.encode(f"\n</think>\n\n{answer or ''}")
            tokens = np.array([*head, *middle, *tail], np.int32)
            traces.append(RecordedTrace(tokens, len(head), len(head) + len(middle)))
    return traces[::every]


def parts(trace: RecordedTrace, waits: set[int]) -> np.ndarray:
    """Part of each position: 0 to 3 a quarter of the thinking, 4 the answer; plus 10 after a
    Wait."""
    at = np.arange(len(trace.tokens))
    length = max(trace.answer - trace.thinking, 1)
    part = np.clip(4 * (at - trace.thinking) // length, 0, 4)
    part[trace.answer :] = 4
    for position in np.flatnonzero(np.isin(trace.tokens[: trace.answer], list(waits))):
        part[position + 1 : min(position + 1 + AFTER_WAIT, trace.answer)] %= 10
        part[position + 1 : min(position + 1 + AFTER_WAIT, trace.answer)] += 10
    return part


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Totals of every source over the traces; for PARTS_OF also by part of the trace."""
    tokenizer = Tokenizer.from_dir(args.tokenizer)
    traces = read_traces(args.traces, tokenizer, args.every)
    waits = {i for text in ("Wait", " Wait", "\nWait") for i in tokenizer.encode(text)[-1:]}
    summaries: dict[str, Any] = {}
    by_part: defaultdict[int, StepTotals] = defaultdict(StepTotals)
    for name, source in SOURCES.items():
        totals = StepTotals()
        for trace in traces:
            part = parts(trace, waits) if name == PARTS_OF else None
            for position, yielded, drafted in replay(trace, source(trace.tokens)):
                totals.add(yielded, drafted)
                if part is not None:
                    by_part[int(part[position])].add(yielded, drafted)
        summaries[name] = totals.summary()
        print(f"{name}: {summaries[name]}", file=sys.stderr)
    return {
        "traces": len(traces),
        "tokens": sum(len(trace.tokens) - trace.thinking for trace in traces),
        "sources": summaries,
        "best_speedup": {kind: _best(summaries, kind) for kind in ("latest", "vote", "own")},
        "parts": {"source": PARTS_OF, **_named(by_part)},
    }


def _best(summaries: dict[str, Any], kind: str) -> dict[str, float]:
    """The best speedup of a kind for each slope."""
    speedups = [row["speedup"] for name, row in summaries.items() if name.startswith(kind)]
    return {str(a): max(speedup[str(a)] for speedup in speedups) for a in SLOPES}


def _named(by_part: dict[int, StepTotals]) -> dict[str, Any]:
    named: dict[str, tuple[int, ...]] = {
        f"thinking, quarter {q + 1}": (q, q + 10) for q in range(4)
    }
    named |= {"answer": (4,), "after Wait": (10, 11, 12, 13), "thinking elsewhere": (0, 1, 2, 3)}
    summaries = {}
    for name, keys in named.items():
        total = StepTotals()
        for count in (by_part[key] for key in keys if key in by_part):
            total.steps += count.steps
            total.tokens += count.tokens
            total.drafted += count.drafted
        summaries[name] = total.summary() if total.steps else None
    return summaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("traces", type=Path, help="JSON file of traces")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th trace")
