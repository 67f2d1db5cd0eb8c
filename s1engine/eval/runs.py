"""Runs of a task at different budgets, and what they come to.

A run is one pass over all questions with one ThinkingBudget. Uses the public engine only.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from s1engine.engine.llm import LLM
from s1engine.eval.arithmetic import Question
from s1engine.eval.grade import extract_answer, is_correct
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What tells one run from another."""

    method: str
    budget: int | None  # thinking tokens, None: unbounded
    num_waits: int


@dataclass(frozen=True, slots=True)
class Row:
    """One question in one run."""

    id: str
    settings: RunSettings
    thinking_tokens: int
    answer_tokens: int
    waits_used: int
    end_reason: str | None
    seconds: float
    extracted: str | None
    answer: str
    correct: bool

    def to_json(self) -> dict[str, Any]:
        """A line of results.jsonl."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Run:
    """All rows of one pass, and its wall time in seconds."""

    settings: RunSettings
    rows: list[Row]
    wall_s: float

    def summary(self, seed: int) -> dict[str, Any]:
        """An entry of summary.json."""
        output_tokens = sum(row.thinking_tokens + row.answer_tokens for row in self.rows)
        correct = [row.correct for row in self.rows]
        return {
            "settings": asdict(self.settings),
            "accuracy": 100 * statistics.mean(correct),
            "interval": bootstrap_interval(correct, seed),
            "thinking_tokens": statistics.mean(row.thinking_tokens for row in self.rows),
            "answer_tokens": statistics.mean(row.answer_tokens for row in self.rows),
            "output_tokens_per_s": output_tokens / self.wall_s,
            "wall_s": self.wall_s,
        }


def run_budget_forcing(
    llm: LLM, questions: Sequence[Question], settings: RunSettings, *, progress: bool
) -> Run:
    """Answers every question greedily under ``settings``, all of them concurrently."""
    budget = ThinkingBudget(max_tokens=settings.budget, num_waits=settings.num_waits)
    params = SamplingParams(temperature=0, thinking=budget)
    conversations = [[{"role": "user", "content": question.question}] for question in questions]
    begin = time.perf_counter()
    outputs = llm.chat(conversations, params, progress=progress)
    wall_s = time.perf_counter() - begin
    rows = [_row(q, settings, out) for q, out in zip(questions, outputs, strict=True)]
    return Run(settings, rows, wall_s)


def _row(question: Question, settings: RunSettings, output: RequestOutput) -> Row:
    sample = output.outputs[0]
    assert sample.thinking is not None
    extracted = extract_answer(sample.text)
    return Row(
        id=question.id,
        settings=settings,
        thinking_tokens=sample.thinking.tokens,
        answer_tokens=len(sample.token_ids) - sample.thinking.tokens,
        waits_used=sample.thinking.waits_used,
        end_reason=sample.thinking.end_reason,
        seconds=output.timing.total_s,
        extracted=extracted,
        answer=question.answer,
        correct=is_correct(extracted, question.answer),
    )


def bootstrap_interval(correct: Sequence[bool], seed: int) -> tuple[float, float]:
    """95 % interval of the accuracy in percent, by 10,000 resamples of the questions."""
    # Resampling n questions with replacement draws a binomial number of correct ones.
    n, share = len(correct), statistics.mean(correct)
    draws = 100 * np.random.default_rng(seed).binomial(n, share, RESAMPLES) / n
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
