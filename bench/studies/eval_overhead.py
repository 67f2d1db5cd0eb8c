"""Overhead of the evaluation harness: the share of a run's time spent outside the engine.

Runs budget forcing over the arithmetic task as ``s1engine eval`` does, and adds up the time inside
the engine's calls. Goal: under 3 %.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s1engine.engine.llm import LLM
from s1engine.eval.engine_backend import EngineBackend
from s1engine.eval.method_registry import SweepOptions, build_methods
from s1engine.eval.results import Results
from s1engine.eval.sweep import run_sweep
from s1engine.eval.tasks import arithmetic_questions

BUDGET = 64


def outside_share(llm: LLM, questions: int, folder: Path) -> float:
    """Share of one run's wall time outside the engine, 0 to 1."""
    inside = [0.0]
    timed: list[tuple[Any, str]] = [
        (llm.engine, "step"), (llm.engine, "add_request"), (llm, "make_request")
    ]  # fmt: skip
    for owner, name in timed:
        setattr(owner, name, _timed(getattr(owner, name), inside))
    try:
        methods = build_methods(["budget-forcing"], SweepOptions(budgets=(BUDGET,)))
        asked = arithmetic_questions(4, questions)
        opened = Results.open(folder, {}, overwrite=True)
        (run,) = run_sweep(
            methods, asked, EngineBackend(llm), opened, traces=1, finished=lambda run: None
        )
        opened.close()
    finally:
        for owner, name in timed:
            delattr(owner, name)
    return 1 - inside[0] / run.wall_s


def _timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            spent[0] += time.perf_counter() - begin

    return timed


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of all rounds after one warm-up."""
    llm = LLM(args.model, progress=False, max_num_seqs=args.batch)
    with tempfile.TemporaryDirectory() as folder:
        rounds = range(args.rounds + 1)  # the first warms up
        shares = [outside_share(llm, args.questions, Path(folder)) for _ in rounds][1:]
    return {
        "questions": args.questions,
        "batch": args.batch,
        "budget": BUDGET,
        "outside_share": round(statistics.median(shares), 4),
        "outside_shares": [round(share, 4) for share in shares],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=5)
