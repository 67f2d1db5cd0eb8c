"""The flags of ``s1engine eval``: names, bounds, and the options they become."""

import argparse
from pathlib import Path
from typing import Any

from s1engine.checks import check_float, check_int
from s1engine.config import (
    DEVICES,
    DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
)
from s1engine.errors import RequestError
from s1engine.eval.method_registry import METHODS, SweepOptions
from s1engine.eval.summary import Prices
from s1engine.eval.tasks import GENERATED, TASK_NAMES

GENERATED_QUESTIONS = 200
ENGINE_FLAGS = {
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "tensor_parallel_size": int,
    "kv_cache_memory_gb": float,
    "gpu_memory_utilization": float,
    "reasoning_format": str,
    "reasoning_start": str,
    "reasoning_end": str,
}
ENGINE_CHOICES = {
    "dtype": DTYPES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "quantization": QUANTIZATIONS,
    "device": DEVICES,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine eval``."""
    parser.add_argument(
        "model",
        nargs="?",
        help="directory or hub id (default: bundled s1-nano); with --base-url the name there",
    )
    _add_task_flags(parser.add_argument_group("questions"))
    _add_method_flags(parser.add_argument_group("methods"))
    _add_server_flags(parser.add_argument_group("a server instead of a model in this process"))
    _add_engine_flags(parser.add_argument_group("the engine"))
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
        "--method",
        default="budget-forcing",
        metavar="M,M,...",
        help=f"default: budget-forcing. {listed}",
    )
    group.add_argument(
        "--budgets",
        help="thinking tokens, comma-separated; 'none': unbounded, the default of most methods",
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
    group.add_argument(
        "--timeout", type=float, default=600, help="seconds a request (default: 600)"
    )
    group.add_argument("--retries", type=int, default=4, help="further tries (default: 4)")


def _add_engine_flags(group: Any) -> None:
    group.add_argument(
        "--backend",
        choices=("engine", "ray"),
        default="engine",
        help="in this process, or on Ray, in batches (default: engine)",
    )
    group.add_argument("--replicas", type=int, metavar="N", help="engines on Ray (default: 1)")
    group.add_argument(
        "--ray-address", metavar="HOST:PORT", help="or auto; default: Ray on this machine"
    )
    for name, kind in ENGINE_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind)
    for name, choices in ENGINE_CHOICES.items():
        group.add_argument(f"--{name.replace('_', '-')}", choices=choices)


def _add_result_flags(group: Any) -> None:
    group.add_argument(
        "--out", required=True, type=Path, help="folder; a killed sweep continues in it"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="delete earlier results in it first"
    )
    group.add_argument("--traces", type=int, default=3, help="questions shown in full (default: 3)")
    group.add_argument("--watts", type=float, help="power drawn, for joules a question")
    group.add_argument("--dollars-per-hour", type=float, help="of the machine")
    group.add_argument("--dollars-per-million-tokens", type=float, help="generated")


# --- from flags to options ---


def sweep_options(args: argparse.Namespace) -> SweepOptions:
    """The options of the sweep. Raises RequestError that names the flag."""
    return SweepOptions(
        budgets=_parse_list("budgets", args.budgets, none=True),
        num_waits=_parse_counts("num_waits", args.num_waits),
        steps=_parse_counts("steps", args.steps),
        samples=_parse_counts("samples", args.samples),
        max_tries=args.max_tries,
        wait_text=args.wait_text,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )


def _parse_list(param: str, text: str | None, none: bool = False) -> tuple[int | None, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 16) and not (
            none and word == "none"
        ):
            raise RequestError(f"{param}: {word!r} is not a count", param=param)
    return tuple(None if word == "none" else int(word) for word in words)


def _parse_counts(param: str, text: str | None) -> tuple[int, ...] | None:
    values = _parse_list(param, text)
    return None if values is None else tuple(value for value in values if value is not None)


def check_flags(args: argparse.Namespace) -> Prices:
    """Checks the bounds of flags without a check elsewhere. Returns the prices."""
    if args.limit is not None and args.limit < 1:
        raise RequestError("limit must be at least 1", param="limit")
    check_int("seed", args.seed, 0, 2**63 - 1)
    check_int("traces", args.traces, 0, 1000)
    check_int("concurrency", args.concurrency, 1, 4096)
    check_int("retries", args.retries, 0, 100)
    check_float("timeout", args.timeout, 0.001, 1e6)
    prices = {
        n: getattr(args, n) for n in ("watts", "dollars_per_hour", "dollars_per_million_tokens")
    }
    for name, value in prices.items():
        if value is not None:
            check_float(name, value, 0.0, 1e9)
    return Prices(**prices)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The given fields of EngineConfig."""
    values = {name: getattr(args, name) for name in (*ENGINE_FLAGS, *ENGINE_CHOICES)}
    return {name: value for name, value in values.items() if value is not None}
