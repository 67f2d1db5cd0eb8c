"""Rows of training data: a question, its solution, and the traces of teacher models.

Reads and writes the two formats that s1 published. s1K has one unnamed teacher
(``thinking_trajectories``, a list of one, and ``attempt``). s1K-1.1 has named ones
(``gemini_thinking_trajectory``, ``gemini_attempt``, ``deepseek_...``) with grades. Unknown fields
are kept, so a row that is read and written stays the same. Knows no tokenizer.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError

Json = dict[str, Any]
UNNAMED = ""  # the teacher of an s1K row
_THINKING, _ATTEMPT = "_thinking_trajectory", "_attempt"
_LEADING_FIELDS = ("solution", "cot_type", "source_type", "metadata")


@dataclass(frozen=True, slots=True)
class TeacherTrace:
    """Thinking and answer of one teacher."""

    thinking: str
    attempt: str


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A question with its traces and all other fields."""

    question: str
    traces: Mapping[str, TeacherTrace] = field(default_factory=dict)
    """By teacher."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All other fields, solution and source_type among them."""

    def text(self, name: str) -> str:
        """A field as text; empty if it is missing or not text."""
        value = self.fields.get(name)
        return value if isinstance(value, str) else ""

    def trace(self, teacher: str | None) -> TeacherTrace | None:
        """The trace of ``teacher``; for None the only trace. None if there is none. Raises
        RequestError if ``teacher`` is None and there are several."""
        if teacher is None and len(self.traces) > 1:
            names = ", ".join(self.traces)
            raise RequestError(
                f"teacher must be given: rows have traces of {names}", param="teacher"
            )
        if teacher is None:
            return next(iter(self.traces.values()), None)
        return self.traces.get(teacher)


def parse_row(given: Mapping[str, Any]) -> TrainingRow:
    """A row of either format. Raises ValueError that names the wrong field."""
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("question must be text")
    traces: dict[str, TeacherTrace] = {}
    fields = {name: value for name, value in given.items() if name != "question"}
    if "thinking_trajectories" in given:
        trajectories = fields.pop("thinking_trajectories")
        if not isinstance(trajectories, list) or len(trajectories) != 1:
            raise ValueError("thinking_trajectories must be a list of one")
        _add_trace(traces, UNNAMED, trajectories[0], fields.pop("attempt", None))
    for name in [name for name in given if name.endswith(_THINKING)]:
        teacher = name.removesuffix(_THINKING)
        _add_trace(traces, teacher, fields.pop(name), fields.pop(f"{teacher}{_ATTEMPT}", None))
    return TrainingRow(question, traces, fields)


def _add_trace(
    traces: dict[str, TeacherTrace], teacher: str, thinking: object, attempt: object
) -> None:
    if thinking is None and attempt is None:
        return
    if not isinstance(thinking, str) or not isinstance(attempt, str):
        owner = f"of {teacher!r}" if teacher else "of the row"
        raise ValueError(f"the thinking and the attempt {owner} must both be text")
    traces[teacher] = TeacherTrace(thinking, attempt)


def format_row(row: TrainingRow) -> Json:
    """The row as JSON: an unnamed teacher in s1K's format, named ones in s1K-1.1's."""
    leading = {name: row.fields[name] for name in _LEADING_FIELDS if name in row.fields}
    output: Json = {"question": row.question, **leading, **row.fields}
    for teacher, trace in row.traces.items():
        if teacher == UNNAMED:
            output["thinking_trajectories"] = [trace.thinking]
            output["attempt"] = trace.attempt
        else:
            output[f"{teacher}{_THINKING}"] = trace.thinking
            output[f"{teacher}{_ATTEMPT}"] = trace.attempt
    return output


def read_jsonl(path: Path, param: str) -> Iterator[tuple[int, Json]]:
    """Line number and object of each line. Raises RequestError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise RequestError(f"{param}: {path}: {error.strerror}", param=param) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{param}: {path} is not UTF-8", param=param) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except ValueError as error:
            reason = f"{param}: {path} line {number} is not JSON ({error})"
            raise RequestError(reason, param=param) from error
        if not isinstance(given, dict):
            raise RequestError(f"{param}: {path} line {number} must be an object", param=param)
        yield number, given


def read_complete_lines(path: Path) -> list[Json]:
    """Objects of a file that a run appends to; skips a truncated line. Empty if it is missing."""
    rows: list[Json] = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def write_jsonl(path: Path, rows: list[Json]) -> None:
    """Replaces a file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)
