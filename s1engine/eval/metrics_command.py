"""``s1engine metrics``: Control, Scaling and Performance of the runs in a file."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError
from s1engine.eval.metrics import Point, exact_accuracy, method_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine metrics``."""
    parser.add_argument(
        "file",
        type=Path,
        help='JSON: {"runs": [{"tokens", "accuracy", "limit", "limit_min", "questions"}, ...]}, '
        "accuracy in percent, the last three optional",
    )
    parser.add_argument(
        "--linear",
        action="store_true",
        help="Scaling per 1,000 thinking tokens, not per doubling of them",
    )


def run(args: argparse.Namespace) -> int:
    """Prints one JSON object."""
    print(json.dumps(method_metrics(read_points(args.file), linear=args.linear)))
    return 0


def read_points(path: Path) -> list[Point]:
    """The runs in a file. Raises RequestError that names the bad field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", param="file") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no JSON: {error}", param="file") from error
    runs = data.get("runs") if isinstance(data, dict) else None
    if not isinstance(runs, list) or not runs:
        raise RequestError(f'{path}: "runs" must be a list with at least one run', param="runs")
    return [_point(run, f"runs[{i}]") for i, run in enumerate(runs)]


def _point(run: object, where: str) -> Point:
    if not isinstance(run, dict):
        raise RequestError(f"{where} must be an object", param=where)
    questions = run.get("questions")
    if questions is not None and (type(questions) is not int or questions < 1):
        raise RequestError(f"{where}.questions must be a count", param=f"{where}.questions")
    accuracy = _number(run, "accuracy", where, 100)
    tokens = _number(run, "tokens", where)
    if accuracy is None or tokens is None:
        missing = f"{where}.{'accuracy' if accuracy is None else 'tokens'}"
        raise RequestError(f"{missing} is missing", param=missing)
    return Point(
        tokens=tokens,
        accuracy=exact_accuracy(accuracy, questions),
        limit=_number(run, "limit", where),
        limit_min=_number(run, "limit_min", where),
    )


def _number(run: dict[str, Any], key: str, where: str, high: float = math.inf) -> float | None:
    value = run.get(key)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= high:
        bound = f"from 0 to {high:g}" if math.isfinite(high) else "of at least 0"
        raise RequestError(f"{where}.{key} must be a number {bound}", param=f"{where}.{key}")
    return float(value)
