"""The tasks: where their rows are, and how a row becomes a question.

A task is data: a source on the hub, and a reader of one row. Rows come from a local file (JSON
lines, a JSON list or CSV, by its suffix) or from the hub, which needs the package ``datasets``.
Bad rows are reported by their line. Knows nothing of grading (``grade``).
"""

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError
from s1engine.eval import arithmetic
from s1engine.eval.grade import Kind
from s1engine.extras import require_extra

Row = Mapping[str, Any]
CHOICES = "ABCD"


class RowError(ValueError):
    """A row that is not a question; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it is asked, and its right answer."""

    id: str
    prompt: str
    answer: str
    kind: Kind = "math"
    extra: Row = field(default_factory=dict)
    """Other keys of its row, kept in the results."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set of the Hugging Face hub."""

    path: str
    split: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark.

    ``read`` gets a row, the id for a row without one, and a random generator for the whole data
    set.
    """

    name: str
    read: Callable[[Row, str, random.Random], Question]
    hub: HubSource | None = None


def arithmetic_questions(seed: int, count: int) -> list[Question]:
    """Held-out questions of s1-nano's own task."""
    return [
        Question(q.id, q.question, q.answer, extra={"steps": len(q.steps)})
        for q in arithmetic.generate(seed, count)
    ]


def _read_math(row: Row, fallback_id: str, _: random.Random) -> Question:
    """Problem and answer by the names that AIME and MATH sets use."""
    prompt = _text(row, ("problem", "question", "Problem", "Question"))
    answer = _text(row, ("answer", "Answer", "expected_answer"))
    return Question(_id(row, fallback_id), prompt, answer)


def _read_jsonl(row: Row, fallback_id: str, _: random.Random) -> Question:
    extra = {key: value for key, value in row.items() if key not in ("id", "question", "answer")}
    answer, prompt = _text(row, ("answer",)), _text(row, ("question",))
    return Question(_id(row, fallback_id), prompt, answer, extra=extra)


def _read_gsm8k(row: Row, fallback_id: str, _: random.Random) -> Question:
    solution = _text(row, ("answer",))
    if "####" not in solution:
        raise RowError("answer has no '####' before its result")
    answer = solution.rpartition("####")[2].strip().replace(",", "")
    return Question(_id(row, fallback_id), _text(row, ("question",)), answer)


def _read_gpqa(row: Row, fallback_id: str, rng: random.Random) -> Question:
    """Four options in random order, one a line."""
    right = _option(row, "Correct Answer")
    options = [_option(row, f"Incorrect Answer {i}") for i in (1, 2, 3)] + [right]
    order = list(range(len(options)))
    rng.shuffle(order)
    lines = [f"{letter}) {options[i]}" for letter, i in zip(CHOICES, order, strict=True)]
    prompt = "\n".join([_text(row, ("Question",)), "", *lines])
    letter = CHOICES[order.index(len(options) - 1)]
    return Question(_id(row, fallback_id), prompt, letter, kind="choice")


def _option(row: Row, key: str) -> str:
    return re.sub(r"\s+", " ", _text(row, (key,)))


def _text(row: Row, keys: Sequence[str]) -> str:
    """The value of the first of ``keys`` in the row, as text: 3.0 becomes ``3``."""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"{key!r} must be text or a number")
        if not str(value).strip():
            raise RowError(f"{key!r} is empty")
        return str(value).strip()
    raise RowError(f"{' or '.join(map(repr, keys))} is missing")


def _id(row: Row, fallback: str) -> str:
    keys = ("id", "unique_id", "ID", "Record ID")
    return _text(row, keys) if any(row.get(key) is not None for key in keys) else fallback


# Sources are those of s1's evaluation; of MATH500 and GSM8K, those of lm-evaluation-harness.
TASKS = {
    task.name: task
    for task in (
        Task("aime24", _read_math, HubSource("simplescaling/aime24_nofigures", "train")),
        Task("aime25", _read_math, HubSource("TIGER-Lab/AIME25", "train")),
        Task("math500", _read_math, HubSource("HuggingFaceH4/MATH-500", "test")),
        Task("gpqa-diamond", _read_gpqa, HubSource("Idavidrein/gpqa", "train", "gpqa_diamond")),
        Task("gsm8k", _read_gsm8k, HubSource("openai/gsm8k", "test", "main")),
        Task("jsonl", _read_jsonl),
    )
}
GENERATED = "arithmetic"
TASK_NAMES = (GENERATED, *TASKS)

MAX_SHOWN = 5  # bad rows in an error message


# --- reading rows ---


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not a question, and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of a task, in the order of its rows."""

    questions: list[Question]
    skipped: list[BadRow]


def load_questions(
    task: Task, data: Path | None, *, seed: int, skip_bad: bool, limit: int | None = None
) -> QuestionSet:
    """Reads ``data``, or the hub if None. Raises RequestError for an unreadable or empty source,
    and unless ``skip_bad`` for bad rows."""
    if data is not None:
        rows, name = _file_rows(data), data.stem
    elif task.hub is not None:
        rows, name = _hub_rows(task.name, task.hub), task.name
    else:
        raise RequestError(f"task {task.name} needs --data FILE", param="data")
    questions = _read_questions(task, rows, name, random.Random(seed))
    if questions.skipped and not skip_bad:
        raise RequestError(f"{data or task.name}: {_list_bad(questions.skipped)}", param="data")
    if not questions.questions:
        raise RequestError(f"{data or task.name} holds no questions", param="data")
    return QuestionSet(questions.questions[:limit], questions.skipped)


def _list_bad(bad: list[BadRow]) -> str:
    shown = "; ".join(map(str, bad[:MAX_SHOWN]))
    more = f"; and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else ""
    return f"{len(bad)} bad rows (--skip-bad leaves them out): {shown}{more}"


def _read_questions(
    task: Task, rows: Iterable[tuple[str, Any]], name: str, rng: random.Random
) -> QuestionSet:
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
    return QuestionSet(list(questions.values()), bad)


# --- rows with their places; a ValueError replaces a row that cannot be read ---


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
            yield f"line {number}", _parse_json(line)


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return ValueError("is not UTF-8")
    except (ValueError, RecursionError) as error:
        return ValueError(f"is no JSON ({error})")


def _json_rows(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    rows = _parse_json(raw)
    if isinstance(rows, ValueError) or not isinstance(rows, list):
        reason = rows if isinstance(rows, ValueError) else "must be a list of rows"
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
        require_extra("hub", param="data")
    except RequestError as error:
        raise RequestError(
            f"task {task} needs --data FILE, or reads {source.path} from the hub: {error}",
            param="data",
        ) from error
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the network, the hub and its parsers raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"task {task}: {source.path} cannot be read from the hub ({reason}); give --data FILE",
            param="data",
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)
