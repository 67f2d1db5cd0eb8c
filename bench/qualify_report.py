"""The results of ``bench qualify`` as Markdown."""

import json
from collections.abc import Iterator
from typing import Any

from s1engine.bench.kernel_speed import markdown_table


def report(results: dict[str, Any], failures: list[str]) -> str:
    """The report of all phases."""
    return "\n".join(_sections(results, failures)) + "\n"


def _sections(results: dict[str, Any], failures: list[str]) -> Iterator[str]:
    yield "# Qualification\n"
    yield f"Failures: {len(failures)}\n"
    yield from (f"```\n{failure}\n```" for failure in failures)
    if "ceilings" in results:
        rows = [{"limit": name, "value": value} for name, value in results["ceilings"].items()]
        yield "## Ceilings\n\n" + markdown_table(rows) + "\n"
    if "numerics" in results:
        rows = [{"case": case, **row} for case, row in results["numerics"].items()]
        yield "## Numerics\n\n" + markdown_table(rows) + "\n"
    if "kernels" in results:
        yield "## Kernels\n\n" + markdown_table(results["kernels"]) + "\n"
    for name, one in results.get("engine", {}).items():
        yield f"## Engine, {name}\n\n{one.get('skipped') or one['equal']}\n"
        for rows in (one.get("rows", []), one.get("mixed", [])):
            yield markdown_table([_rounded(row) for row in rows]) + "\n"
    if "transformers" in results:
        yield f"## transformers\n\n{json.dumps(results['transformers'])}\n"


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
