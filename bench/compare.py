"""Compare two result files of one bench: the numbers that changed, and their ratios.

Numbers at the same path are compared; above 1 the second file's number is larger.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError


def numbers_of(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its path; rows of a list are labelled by what they measure."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name != "where":
                yield from numbers_of(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers_of(inner, f"{path}[{_label(inner, i)}]")


def _label(row: Any, index: int) -> str:
    keys = ("kernel", "shape", "batch", "context")
    named = [str(row[k]) for k in keys if isinstance(row, dict) and row.get(k) is not None]
    return " ".join(named) or str(index)


def changes(first: Any, second: Any, threshold: float) -> list[tuple[str, float, float]]:
    """Paths whose numbers differ by more than ``threshold`` (0.05: 5 %), the largest change
    first."""
    before, after = dict(numbers_of(first)), dict(numbers_of(second))
    shared = [(path, before[path], after[path]) for path in before if path in after]
    changed = [row for row in shared if abs(row[2] - row[1]) > threshold * max(abs(row[1]), 1e-12)]
    return sorted(changed, key=lambda row: -abs(row[2] / row[1] - 1) if row[1] else 0.0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the changes on stderr; the result holds them too."""
    first, second = (_read(path) for path in (args.first, args.second))
    if first.get("bench") != second.get("bench"):
        raise RequestError(
            f"{args.second}: a result of {second.get('bench')}, not of {first.get('bench')}",
            param="second",
        )
    changed = changes(first, second, args.threshold)
    for path, before, after in changed:
        ratio = f"{after / before:8.3f}" if before else "        "
        print(f"{ratio}  {before:>14,.6g} -> {after:<14,.6g}  {path}", file=sys.stderr)
    return {
        "first": first.get("where"),
        "second": second.get("where"),
        "changed": [{"place": p, "before": b, "after": a} for p, b, a in changed],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: not a result of a bench: {error}", param="first") from error
    if not isinstance(result, dict):
        raise RequestError(f"{path}: not a result of a bench", param="first")
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench compare``."""
    parser.add_argument("first", type=Path, help="result file written by --save")
    parser.add_argument("second", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="smallest relative change to report"
    )
