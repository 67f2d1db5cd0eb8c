"""Runs a sweep: every method over every question; writes each answer as it arrives.

All questions of a run form one continuous batch. Owns order and progress; knows no files
(``results``) and no flags (``command``).
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from s1engine.eval.backend import Backend
from s1engine.eval.methods import Method
from s1engine.eval.results import Results, make_row
from s1engine.eval.summary import RunRows
from s1engine.eval.tasks import Question

Finished = Callable[[RunRows], None]


def run_sweep(
    methods: Sequence[Method],
    questions: Sequence[Question],
    backend: Backend,
    results: Results,
    *,
    traces: int,
    finished: Finished,
) -> list[RunRows]:
    """Answers the questions that ``results`` lacks. Returns the runs in the order asked and calls
    ``finished`` with each complete run. Keeps the text of the first ``traces`` questions."""
    traced = frozenset(question.id for question in questions[:traces])
    pending = [_pending(method, questions, results) for method in methods]
    total = sum(len(qs) * len(m.settings) for m, qs in zip(methods, pending, strict=True))
    runs: list[RunRows] = []
    pause = 0.2 if sys.stderr.isatty() else 10  # seconds between two updates of the bar
    with tqdm(total=total, unit="question", mininterval=pause) as bar:
        meter = _Meter(bar, backend)
        for method, left in zip(methods, pending, strict=True):
            _run_method(method, left, backend, results, traced, meter)
            for settings in method.settings:
                runs.append(
                    RunRows(settings, results.run_rows(settings, [q.id for q in questions]))
                )
                finished(runs[-1])
    return runs


def _pending(method: Method, questions: Sequence[Question], results: Results) -> list[Question]:
    """The questions that some run of the method still needs."""
    return [q for q in questions if not all(results.has(run, q.id) for run in method.settings)]


def _run_method(
    method: Method,
    questions: Sequence[Question],
    backend: Backend,
    results: Results,
    traced: frozenset[str],
    meter: "_Meter",
) -> None:
    begin = time.perf_counter()
    for answer in method.answer(questions, backend, traced):
        elapsed = time.perf_counter() - begin
        results.add(make_row(answer, session=results.session, finished_s=elapsed))
        meter.update()


class _Meter:
    """The progress bar: questions done, time left, tokens per second."""

    def __init__(self, bar: Any, backend: Backend) -> None:
        self._bar = bar
        self._backend = backend
        self._before = backend.generated_tokens
        self._begin = time.perf_counter()

    def update(self) -> None:
        elapsed = max(time.perf_counter() - self._begin, 1e-9)
        rate = (self._backend.generated_tokens - self._before) / elapsed
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update()
