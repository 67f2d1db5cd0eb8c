"""``s1engine eval``: a task, methods, a sweep of budgets and waits, results in a folder."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s1engine.config import DEVICES, DTYPES, REASONING_FORMATS, check_float, check_int
from s1engine.errors import RequestError
from s1engine.eval.backend import Backend
from s1engine.eval.dataset import load_questions
from s1engine.eval.methods import Method
from s1engine.eval.plan import METHODS, SweepOptions, plan
from s1engine.eval.results import Results
from s1engine.eval.summary import Prices, RunRows, summarize
from s1engine.eval.sweep import run_sweep
from s1engine.eval.tasks import GENERATED, TASK_NAMES, TASKS, Question, arithmetic_questions

GENERATED_QUESTIONS = 200
ENGINE_FLAGS = {
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "kv_cache_memory_gb": float,
    "gpu_memory_utilization": float,
}
ENGINE_CHOICES = {"dtype": DTYPES, "device": DEVICES, "reasoning_format": REASONING_FORMATS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine eval``."""
    parser.add_argument(
        "model",
        nargs="?",
        help="directory or hub id, default: bundled s1-nano; with --base-url the model's name there",
    )
    _add_task_flags(parser.add_argument_group("questions"))
    _add_method_flags(parser.add_argument_group("methods"))
    _add_server_flags(parser.add_argument_group("a server instead of a model in this process"))
    _add_engine_flags(parser.add_argument_group("the engine in this process"))
    _add_result_flags(parser.add_argument_group("results"))


def _add_task_flags(group: Any) -> None:
    group.add_argument("--task", required=True, choices=TASK_NAMES)
    group.add_argument("--data", type=Path, help="local file instead of the hub")
    group.add_argument("--skip-bad", action="store_true", help="leave malformed rows out")
    group.add_argument(
        "--limit", type=int, help=f"questions; default: all, {GENERATED_QUESTIONS} of {GENERATED}"
    )
    group.add_argument("--seed", type=int, default=0, help="of questions, samples and intervals")


def _add_method_flags(group: Any) -> None:
    listed = "; ".join(f"{name}: {kind.help}" for name, kind in METHODS.items())
    group.add_argument(
        "--method", default="budget-forcing", metavar="M,M,...", help=f"default: budget-forcing. {listed}"
    )
    group.add_argument(
        "--budgets",
        help="thinking tokens, comma-separated; 'none' is unbounded. Default: none for most methods",
    )
    group.add_argument("--num-waits", help="comma-separated (default: 0)")
    group.add_argument("--wait-text", help="appended where the model tried to end (default: Wait)")
    group.add_argument("--steps", help="of step-conditional, comma-separated")
    group.add_argument("--samples", help="of majority-voting and best-of-n, comma-separated")
    group.add_argument("--max-tries", type=int, help="of rejection-sampling (default: 16)")
    group.add_argument("--temperature", type=float, help="default: 0, of sampling methods 1")
    group.add_argument("--max-tokens", type=int, help="thinking and answer (default: the context)")


def _add_server_flags(group: Any) -> None:
    group.add_argument("--base-url", help="OpenAI-compatible server, with its /v1")
    group.add_argument("--api-key", help="default: the environment's OPENAI_API_KEY")
    group.add_argument("--concurrency", type=int, default=64, help="requests at once (default: 64)")
    group.add_argument("--timeout", type=float, default=600, help="seconds a request (default: 600)")
    group.add_argument("--retries", type=int, default=4, help="further tries (default: 4)")


def _add_engine_flags(group: Any) -> None:
    for name, kind in ENGINE_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind)
    for name, choices in ENGINE_CHOICES.items():
        group.add_argument(f"--{name.replace('_', '-')}", choices=choices)


def _add_result_flags(group: Any) -> None:
    group.add_argument("--out", required=True, type=Path, help="folder; a killed sweep goes on in it")
    group.add_argument("--overwrite", action="store_true", help="begin anew what is in the folder")
    group.add_argument("--traces", type=int, default=3, help="questions shown in full (default: 3)")
    group.add_argument("--watts", type=float, help="power drawn, for joules a question")
    group.add_argument("--dollars-per-hour", type=float, help="of the machine")
    group.add_argument("--dollars-per-million-tokens", type=float, help="generated")


def run(args: argparse.Namespace) -> int:
    """Runs the sweep; prints a line for each run, writes results.jsonl, summary.json, report.html
    and its figures. Returns 1 if a run has no answer at all."""
    options = _sweep_options(args)
    methods = plan([name.strip() for name in args.method.split(",")], options)
    prices = _check_flags(args)
    questions = _questions(args)
    with _backend(args) as backend:
        _check_budgets(methods, backend)
        identity = _identity(args, questions, backend)
        results = Results.open(args.out, identity, overwrite=args.overwrite)
        try:
            runs = run_sweep(
                methods,
                questions,
                backend,
                results,
                traces=args.traces,
                progress=sys.stderr.isatty(),
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


# --- flags to what they mean ---


def _sweep_options(args: argparse.Namespace) -> SweepOptions:
    return SweepOptions(
        budgets=_list("budgets", args.budgets, none=True),
        num_waits=_counts("num_waits", args.num_waits),
        steps=_counts("steps", args.steps),
        samples=_counts("samples", args.samples),
        max_tries=args.max_tries,
        wait_text=args.wait_text,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )


def _list(param: str, text: str | None, none: bool = False) -> tuple[int | None, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 16) and not (none and word == "none"):
            raise RequestError(f"{param}: {word!r} is no count", param=param)
    return tuple(None if word == "none" else int(word) for word in words)


def _counts(param: str, text: str | None) -> tuple[int, ...] | None:
    found = _list(param, text)
    return None if found is None else tuple(value for value in found if value is not None)


def _check_flags(args: argparse.Namespace) -> Prices:
    """Bounds of the flags that nothing else checks. Returns the prices among them."""
    if args.limit is not None and args.limit < 1:
        raise RequestError("limit must be at least 1", param="limit")
    check_int("seed", args.seed, 0, 2**63 - 1)
    check_int("traces", args.traces, 0, 1000)
    check_int("concurrency", args.concurrency, 1, 4096)
    check_int("retries", args.retries, 0, 100)
    check_float("timeout", args.timeout, 0.001, 1e6)
    prices = {n: getattr(args, n) for n in ("watts", "dollars_per_hour", "dollars_per_million_tokens")}
    for name, value in prices.items():
        if value is not None:
            check_float(name, value, 0.0, 1e9)
    return Prices(**prices)


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


def _check_budgets(methods: Sequence[Method], backend: Backend) -> None:
    """No budget may exceed the context: it could never be reached."""
    for method in methods:
        for settings in method.settings:
            if backend.max_thinking is not None and (settings.limit or 0) > backend.max_thinking:
                raise RequestError(
                    f"budgets: {settings.method} asks for {settings.limit} thinking tokens, the "
                    f"model's context has {backend.max_thinking}",
                    param="budgets" if settings.steps is None else "steps",
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
    given = {name: getattr(args, name) for name in (*ENGINE_FLAGS, *ENGINE_CHOICES)}
    given = {name: value for name, value in given.items() if value is not None}
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
