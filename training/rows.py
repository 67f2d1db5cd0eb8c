"""Rows of training data: a question, its solution, and what teachers thought and answered.

Reads and writes the two formats that s1 published. s1K has one unnamed teacher
(``thinking_trajectories``, a list of one, and ``attempt``); s1K-1.1 has named ones
(``gemini_thinking_trajectory``, ``gemini_attempt``, ``deepseek_...``) with grades. Fields that are
not known are kept, so what is read and written back is the same. Knows no tokenizer.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError

Json = dict[str, Any]
UNNAMED = ""  # the teacher of an s1K row
_THINKING, _ATTEMPT = "_thinking_trajectory", "_attempt"
_TEXTS = ("solution", "cot_type", "source_type", "metadata")


@dataclass(frozen=True, slots=True)
class Trace:
    """What one teacher made of a question."""

    thinking: str
    attempt: str


@dataclass(frozen=True, slots=True)
class Row:
    """A question with everything known about it."""

    question: str
    traces: Mapping[str, Trace] = field(default_factory=dict)
    """By teacher."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """All other fields, solution and source_type among them."""

    def get(self, name: str) -> str:
        """A field of ``rest`` as text, empty if it is missing."""
        value = self.rest.get(name)
        return value if isinstance(value, str) else ""

    def trace(self, teacher: str | None) -> Trace | None:
        """The trace of ``teacher``, or the only one if None. Raises RequestError where that leaves
        a choice or nothing."""
        if teacher is None and len(self.traces) > 1:
            names = ", ".join(self.traces)
            raise RequestError(
                f"teacher must be given: rows have traces of {names}", param="teacher"
            )
        if teacher is None:
            return next(iter(self.traces.values()), None)
        return self.traces.get(teacher)


def from_json(given: Mapping[str, Any]) -> Row:
    """A row of either format. Raises ValueError saying which field is wrong."""
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("question must be text")
    traces: dict[str, Trace] = {}
    rest = {name: value for name, value in given.items() if name != "question"}
    if "thinking_trajectories" in given:
        thoughts = rest.pop("thinking_trajectories")
        if not isinstance(thoughts, list) or len(thoughts) != 1:
            raise ValueError("thinking_trajectories must be a list of one")
        _add(traces, UNNAMED, thoughts[0], rest.pop("attempt", None))
    for name in [name for name in given if name.endswith(_THINKING)]:
        teacher = name.removesuffix(_THINKING)
        _add(traces, teacher, rest.pop(name), rest.pop(f"{teacher}{_ATTEMPT}", None))
    return Row(question, traces, rest)


def _add(traces: dict[str, Trace], teacher: str, thinking: object, attempt: object) -> None:
    name = f"of {teacher!r}" if teacher else "of the row"
    if thinking is None and attempt is None:
        return
    if not isinstance(thinking, str) or not isinstance(attempt, str):
        raise ValueError(f"the thinking and the attempt {name} must both be text")
    traces[teacher] = Trace(thinking, attempt)


def to_json(row: Row) -> Json:
    """Either format: s1K's for an unnamed teacher, s1K-1.1's for named ones."""
    found: Json = {name: row.rest.get(name) for name in _TEXTS if name in row.rest}
    found = {"question": row.question, **found, **row.rest}
    for teacher, trace in row.traces.items():
        if teacher == UNNAMED:
            found["thinking_trajectories"] = [trace.thinking]
            found["attempt"] = trace.attempt
        else:
            found[f"{teacher}{_THINKING}"] = trace.thinking
            found[f"{teacher}{_ATTEMPT}"] = trace.attempt
    return found


def read_jsonl(path: Path, param: str) -> Iterator[tuple[int, Json]]:
    """Line number and object of each line. Raises RequestError naming the line."""
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
            reason = f"{param}: {path} line {number} is no JSON ({error})"
            raise RequestError(reason, param=param) from error
        if not isinstance(given, dict):
            raise RequestError(f"{param}: {path} line {number} must be an object", param=param)
        yield number, given


def write_jsonl(path: Path, rows: list[Json]) -> None:
    """Replaces a file in one step."""
    fresh = path.with_name(f".{path.name}.partial")
    with fresh.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    fresh.replace(path)
