"""Questions out of a local file or the hub: rows read, bad ones reported by their line.

Files are JSON lines, a JSON list, or CSV, told by their ending. The hub needs
``datasets``.
"""

import csv
import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError
from s1engine.eval.tasks import HubSource, Question, RowError, Task

MAX_SHOWN = 5  # bad rows named in an error


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no question, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Dataset:
    """The questions of a task, in the order of its rows."""

    questions: list[Question]
    skipped: list[BadRow]


def load_questions(
    task: Task, data: Path | None, *, seed: int, skip_bad: bool, limit: int | None = None
) -> Dataset:
    """Reads ``data``, or the hub if None. Raises RequestError naming the bad rows unless
    ``skip_bad``, and where there is nothing to read."""
    if data is not None:
        rows, name = _file_rows(data), data.stem
    elif task.hub is not None:
        rows, name = _hub_rows(task.name, task.hub), task.name
    else:
        raise RequestError(f"task {task.name} needs --data FILE", param="data")
    found = _read(task, rows, name, random.Random(seed))
    if found.skipped and not skip_bad:
        raise RequestError(f"{data or task.name}: {_listed(found.skipped)}", param="data")
    if not found.questions:
        raise RequestError(f"{data or task.name} holds no questions", param="data")
    return Dataset(found.questions[:limit], found.skipped)


def _listed(bad: list[BadRow]) -> str:
    shown = "; ".join(map(str, bad[:MAX_SHOWN]))
    more = f"; and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else ""
    return f"{len(bad)} bad rows (--skip-bad leaves them out): {shown}{more}"


def _read(task: Task, rows: Iterable[tuple[str, Any]], name: str, rng: random.Random) -> Dataset:
    questions: dict[str, Question] = {}
    bad: list[BadRow] = []
    for index, (place, row) in enumerate(rows):
        try:
            if isinstance(row, ValueError):
                raise RowError(str(row))
            if not isinstance(row, dict):
                raise RowError("must be an object")
            question = task.read(row, f"{name}-{index}", rng)
            if question.id in questions:
                raise RowError(f"id {question.id!r} is taken by an earlier row")
        except RowError as error:
            bad.append(BadRow(place, str(error)))
        else:
            questions[question.id] = question
    return Dataset(list(questions.values()), bad)


# --- rows, each with its place; a ValueError stands for one that cannot be read ---


def _file_rows(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", param="data") from error
    if path.suffix == ".json":
        return _json_rows(path, raw)
    return _csv_rows(raw) if path.suffix == ".csv" else _jsonl_rows(raw)


def _jsonl_rows(raw: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return ValueError("is not UTF-8")
    except (ValueError, RecursionError) as error:
        return ValueError(f"is no JSON ({error})")


def _json_rows(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    rows = _parsed(raw)
    if isinstance(rows, ValueError) or not isinstance(rows, list):
        reason = rows if isinstance(rows, ValueError) else "must hold a list of rows"
        raise RequestError(f"{path} {reason}", param="data")
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _csv_rows(raw: bytes) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline=""))
    try:
        for row in reader:
            short = None in row.values()
            yield f"line {reader.line_num}", ValueError("has too few columns") if short else row
    except csv.Error as error:
        yield f"line {reader.line_num}", ValueError(str(error))


def _hub_rows(task: str, source: HubSource) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RequestError(
            f"task {task} needs --data FILE, or the package 'datasets' to read {source.path} "
            "from the hub (pip install datasets)",
            param="data",
        ) from error
    try:
        rows = load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # whatever the network, the hub or its parsers raise
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"task {task}: {source.path} cannot be read from the hub ({reason}); give --data FILE",
            param="data",
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)
