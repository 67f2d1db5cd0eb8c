"""``s1engine eval``: a task, methods, a sweep of budgets and waits, results in a folder."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from s1engine.errors import RequestError
from s1engine.eval.backend import Backend
from s1engine.eval.flags import (
    GENERATED_QUESTIONS,
    add_arguments,
    check_flags,
    engine_options,
    sweep_options,
)
from s1engine.eval.method_registry import plan
from s1engine.eval.methods import Method
from s1engine.eval.results import Results
from s1engine.eval.summary import Prices, RunRows, summarize
from s1engine.eval.sweep import run_sweep
from s1engine.eval.tasks import GENERATED, TASKS, Question, arithmetic_questions, load_questions

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Runs the sweep; prints a line for each run, writes results.jsonl, summary.json, report.html
    and its figures. Returns 1 if a run has no answer at all."""
    options = sweep_options(args)
    methods = plan([name.strip() for name in args.method.split(",")], options)
    prices = check_flags(args)
    questions = _questions(args)
    with _backend(args) as backend:
        _check_fits(methods, backend)
        identity = _identity(args, questions, backend)
        results = Results.open(args.out, identity, overwrite=args.overwrite)
        try:
            runs = run_sweep(
                methods,
                questions,
                backend,
                results,
                traces=args.traces,
                finished=_printer(args.seed),
            )
        except BaseException:  # what is known is kept, in whatever order
            results.close()
            raise
        results.close([row for run in runs for row in run.rows])
    return _write(args, runs, prices, identity)


def _write(
    args: argparse.Namespace, runs: list[RunRows], prices: Prices, identity: dict[str, Any]
) -> int:
    from s1engine.eval.report import write_report

    summary = summarize(runs, seed=args.seed, prices=prices)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(args.out, summary, [row for run in runs for row in run.rows], identity)
    print(f"wrote {args.out / 'report.html'}", file=sys.stderr)
    failed = sum(entry["failed"] for entry in summary["runs"])
    if failed:
        first = next(row for run in runs for row in run.rows if "error" in row)
        print(
            f"{failed} questions failed and count as wrong; the same command asks them again. "
            f"First: {first['id']}: {first['error']}",
            file=sys.stderr,
        )
    return int(any(entry["failed"] == entry["questions"] for entry in summary["runs"]))


def _questions(args: argparse.Namespace) -> list[Question]:
    if args.task == GENERATED:
        if args.data is not None:
            raise RequestError(f"task {GENERATED} takes no --data: it is generated", param="data")
        return arithmetic_questions(args.seed, args.limit or GENERATED_QUESTIONS)
    found = load_questions(
        TASKS[args.task], args.data, seed=args.seed, skip_bad=args.skip_bad, limit=args.limit
    )
    for bad in found.skipped:
        print(f"skipped {bad}", file=sys.stderr)
    return found.questions


def _check_fits(methods: Sequence[Method], backend: Backend) -> None:
    """The model must be able to think if thinking is to be limited, and no budget may exceed its
    context: it could never be reached."""
    for settings in (run for method in methods for run in method.settings):
        asked = settings.sample_limit
        if not backend.can_think and (asked is not None or settings.num_waits):
            raise RequestError(
                f"{backend.name} has no reasoning format, so no budget applies to it",
                param="budgets",
            )
        if backend.max_thinking is not None and (asked or 0) > backend.max_thinking:
            param = "budgets" if settings.steps is None else "steps"
            raise RequestError(
                f"{param}: {settings.method} asks for {asked} thinking tokens, the model's "
                f"context has {backend.max_thinking}",
                param=param,
            )


def _identity(
    args: argparse.Namespace, questions: Sequence[Question], backend: Backend
) -> dict[str, Any]:
    """What must not change for a folder's rows to belong to this sweep."""
    asked = json.dumps([(q.id, q.prompt, q.answer) for q in questions])
    return {
        "task": args.task,
        "model": backend.name if args.base_url else args.model or backend.name,
        "base_url": args.base_url,
        "questions": len(questions),
        "questions_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "seed": args.seed,
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "wait_text": args.wait_text,
    }


@contextmanager
def _backend(args: argparse.Namespace) -> Iterator[Backend]:
    given = engine_options(args)
    _check_backend(args)
    if args.backend == "ray":
        from s1engine.eval.ray_backend import RayBackend, RayOptions

        replicas = 1 if args.replicas is None else args.replicas
        on_ray = RayBackend(
            RayOptions(model=args.model, engine=given, replicas=replicas, address=args.ray_address)
        )
        try:
            yield on_ray
        finally:
            on_ray.close()
        return
    if args.base_url is None:
        from s1engine.engine.llm import LLM
        from s1engine.eval.engine_backend import EngineBackend

        yield EngineBackend(LLM(args.model, progress=sys.stderr.isatty(), **given))
        return
    if given:
        name = next(iter(given))
        raise RequestError(f"{name} does not apply with --base-url", param=name)
    from s1engine.eval.http_backend import HttpBackend, HttpOptions

    if not args.base_url.startswith(("http://", "https://")):
        raise RequestError("base_url must begin with http:// or https://", param="base_url")
    backend = HttpBackend(
        HttpOptions(
            base_url=args.base_url,
            api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
            model=args.model,
            concurrency=args.concurrency,
            timeout_s=args.timeout,
            retries=args.retries,
        )
    )
    try:
        yield backend
    finally:
        backend.close()


def _check_backend(args: argparse.Namespace) -> None:
    if args.backend == "ray":
        if args.base_url is not None:
            raise RequestError("base_url does not apply with --backend ray", param="base_url")
        return
    for name in ("replicas", "ray_address"):
        if getattr(args, name) is not None:
            raise RequestError(f"{name} needs --backend ray", param=name)


def _printer(seed: int) -> Callable[[RunRows], None]:
    """Prints the figures of a run on one line."""

    def show(run: RunRows) -> None:
        (entry,) = summarize([run], seed=seed, prices=Prices())["runs"]
        low, high = entry["interval"]
        named = "  ".join(f"{key} {value}" for key, value in entry["settings"].items())
        print(
            f"{named}  accuracy {entry['accuracy']:.1f} % ({low:.1f} to {high:.1f})  "
            f"thinking {entry['thinking_tokens']:.1f} tokens  "
            f"{entry['output_tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )

    return show
