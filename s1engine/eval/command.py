"""``s1engine eval``: runs methods over a task's questions and writes the results to a folder."""

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
from s1engine.eval.method_registry import build_methods
from s1engine.eval.methods import Method
from s1engine.eval.results import Results
from s1engine.eval.summary import Prices, RunRows, summarize
from s1engine.eval.sweep import run_sweep
from s1engine.eval.tasks import GENERATED, TASKS, Question, arithmetic_questions, load_questions

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Runs the sweep; prints a line for each run, writes results.jsonl, summary.json, report.html
    and its figures. Returns 1 if all questions of a run failed."""
    options = sweep_options(args)
    methods = build_methods([name.strip() for name in args.method.split(",")], options)
    prices = check_flags(args)
    questions = _questions(args)
    with _open_backend(args) as backend:
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
                finished=_run_printer(args.seed),
            )
        except BaseException:  # keep the rows in the order in which they were written
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
            raise RequestError(f"task {GENERATED} is generated and has no --data", param="data")
        return arithmetic_questions(args.seed, args.limit or GENERATED_QUESTIONS)
    loaded = load_questions(
        TASKS[args.task], args.data, seed=args.seed, skip_bad=args.skip_bad, limit=args.limit
    )
    for bad in loaded.skipped:
        print(f"skipped {bad}", file=sys.stderr)
    return loaded.questions


def _check_fits(methods: Sequence[Method], backend: Backend) -> None:
    """Checks that the model can think, if thinking is limited, and that no budget exceeds its
    context."""
    for settings in (run for method in methods for run in method.settings):
        limit = settings.sample_limit
        if not backend.can_think and (limit is not None or settings.num_waits):
            raise RequestError(
                f"{backend.name} has no reasoning format, so no budget applies to it",
                param="budgets",
            )
        if backend.max_thinking is not None and (limit or 0) > backend.max_thinking:
            param = "budgets" if settings.steps is None else "steps"
            raise RequestError(
                f"{param}: {settings.method} asks for {limit} thinking tokens, the model's "
                f"context has {backend.max_thinking}",
                param=param,
            )


def _identity(
    args: argparse.Namespace, questions: Sequence[Question], backend: Backend
) -> dict[str, Any]:
    """The properties that all rows of a folder share."""
    content = json.dumps([(q.id, q.prompt, q.answer) for q in questions])
    return {
        "task": args.task,
        "model": backend.name if args.base_url else args.model or backend.name,
        "base_url": args.base_url,
        "questions": len(questions),
        "questions_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "seed": args.seed,
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "wait_text": args.wait_text,
    }


@contextmanager
def _open_backend(args: argparse.Namespace) -> Iterator[Backend]:
    options = engine_options(args)
    _check_backend_flags(args, options)
    if args.backend == "ray":
        backend: Any = _ray_backend(args, options)
    elif args.base_url is not None:
        backend = _http_backend(args)
    else:
        from s1engine.engine.llm import LLM
        from s1engine.eval.engine_backend import EngineBackend

        yield EngineBackend(LLM(args.model, progress=sys.stderr.isatty(), **options))
        return
    try:
        yield backend
    finally:
        backend.close()


def _ray_backend(args: argparse.Namespace, engine: dict[str, Any]) -> Any:
    from s1engine.eval.ray_backend import RayBackend, RayOptions

    replicas = 1 if args.replicas is None else args.replicas
    address = args.ray_address
    return RayBackend(
        RayOptions(model=args.model, engine=engine, replicas=replicas, address=address)
    )


def _http_backend(args: argparse.Namespace) -> Any:
    from s1engine.eval.http_backend import HttpBackend, HttpOptions

    return HttpBackend(
        HttpOptions(
            base_url=args.base_url,
            api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
            model=args.model,
            concurrency=args.concurrency,
            timeout_s=args.timeout,
            retries=args.retries,
        )
    )


def _check_backend_flags(args: argparse.Namespace, engine: dict[str, Any]) -> None:
    if args.backend == "ray":
        if args.base_url is not None:
            raise RequestError("base_url does not apply with --backend ray", param="base_url")
        return
    for name in ("replicas", "ray_address"):
        if getattr(args, name) is not None:
            raise RequestError(f"{name} needs --backend ray", param=name)
    if args.base_url is not None:
        if engine:
            name = next(iter(engine))
            raise RequestError(f"{name} does not apply with --base-url", param=name)
        if not args.base_url.startswith(("http://", "https://")):
            raise RequestError("base_url must begin with http:// or https://", param="base_url")


def _run_printer(seed: int) -> Callable[[RunRows], None]:
    """A function that prints the figures of a run on one line."""

    def print_run(run: RunRows) -> None:
        (entry,) = summarize([run], seed=seed, prices=Prices())["runs"]
        low, high = entry["interval"]
        settings = "  ".join(f"{key} {value}" for key, value in entry["settings"].items())
        print(
            f"{settings}  accuracy {entry['accuracy']:.1f} % ({low:.1f} to {high:.1f})  "
            f"thinking {entry['thinking_tokens']:.1f} tokens  "
            f"{entry['output_tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )

    return print_run
