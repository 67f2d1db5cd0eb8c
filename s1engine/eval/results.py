"""The rows of a sweep, and the folder that holds them: results.jsonl and sweep.json.

Each row is written at once, so a killed sweep loses no row and can continue. A failed question is a
row too; the next start of the sweep asks it again, and the later row counts. Knows no backends.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from s1engine.errors import RequestError
from s1engine.eval.grade import extract_answer, is_correct
from s1engine.eval.methods import RunAnswer, RunSettings

Row = dict[str, Any]
RESULTS = "results.jsonl"
SWEEP = "sweep.json"
_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps creates an encoder per call
_encode_key = json.JSONEncoder(sort_keys=True).encode


def make_row(answer: RunAnswer, *, session: int, finished_s: float) -> Row:
    """The line of results.jsonl for one question in one run.

    Tokens are those of all samples; in rejection sampling, those of the accepted or last sample.
    ``generated_tokens`` always counts all samples.
    """
    question, choice = answer.question, answer.choice
    counted = _counted_samples(answer)
    extracted = choice.extracted if choice else None
    row: Row = {
        "id": question.id,
        "settings": answer.settings.to_json(),
        "thinking_tokens": sum(sample.thinking_tokens for sample in counted),
        "answer_tokens": sum(s.output_tokens - s.thinking_tokens for s in counted),
        "generated_tokens": sum(sample.output_tokens for sample in answer.samples),
        "waits_used": choice.sample.waits_used if choice else 0,
        "end_reason": choice.sample.end_reason if choice else None,
        "seconds": round(answer.seconds, 6),
        "extracted": extracted,
        "answer": question.answer,
        "correct": is_correct(extracted, question.answer, question.kind),
        "session": session,
        "finished_s": round(finished_s, 6),
    }
    return row | _optional_fields(answer)


def _counted_samples(answer: RunAnswer) -> Sequence[Any]:
    if answer.settings.max_tries:
        return [answer.choice.sample] if answer.choice else answer.samples[-1:]
    return answer.samples


def _optional_fields(answer: RunAnswer) -> Row:
    """The fields of some rows only."""
    question, choice, settings = answer.question, answer.choice, answer.settings
    row: Row = {}
    if answer.error is not None:
        row["error"] = answer.error
    if settings.max_tries:
        row |= {"tries": answer.tries, "accepted": choice is not None}
    if settings.samples > 1 and choice is not None:
        each = [extract_answer(sample.text) for sample in answer.samples]
        row["votes"] = choice.votes
        row["covered"] = any(is_correct(one, question.answer, question.kind) for one in each)
    if choice is not None and choice.sample.segments:
        row["question"] = question.prompt
        row["trace"] = [[text, int(forced)] for text, forced in choice.sample.segments]
    if question.extra:
        row["extra"] = dict(question.extra)
    if any(sample.estimated for sample in answer.samples):
        row["thinking_estimated"] = True
    return row


def run_key(settings: RunSettings | Row) -> str:
    """The key of a run, equal for its settings and for their JSON in a row."""
    data = settings.to_json() if isinstance(settings, RunSettings) else settings
    return _encode_key(data)


@dataclass(slots=True)
class Results:
    """The open folder of a sweep."""

    folder: Path
    session: int
    """Number of this start of the sweep, from 0."""
    rows: dict[tuple[str, str], Row]
    """By run and question."""
    _file: IO[str]

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, overwrite: bool) -> "Results":
        """Opens or creates the folder, with the rows of earlier starts of the same sweep.

        Raises RequestError if the folder holds another sweep and ``overwrite`` is false.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"out: {folder}: {error.strerror}", param="out") from error
        path = folder / RESULTS
        if overwrite:
            path.unlink(missing_ok=True)
            (folder / SWEEP).unlink(missing_ok=True)
        _check_identity(folder / SWEEP, identity, path.exists())
        rows = _read_rows(path) if path.exists() else []
        _rewrite(path, rows)  # drops an incomplete line
        session = 1 + max((row["session"] for row in rows), default=-1)
        by_key = {(run_key(row["settings"]), row["id"]): row for row in rows}
        return cls(folder, session, by_key, path.open("a", encoding="utf-8"))

    def has(self, settings: RunSettings, question_id: str) -> bool:
        """Whether the run has an answer to the question that did not fail."""
        row = self.rows.get((run_key(settings), question_id))
        return row is not None and "error" not in row

    def add(self, row: Row) -> None:
        """Adds a row to the file and flushes it."""
        self.rows[run_key(row["settings"]), row["id"]] = row
        self._file.write(_encode(row) + "\n")
        self._file.flush()

    def run_rows(self, settings: RunSettings, question_ids: Iterable[str]) -> list[Row]:
        """The rows of a run, in the order of the questions."""
        key = run_key(settings)
        return [self.rows[key, name] for name in question_ids if (key, name) in self.rows]

    def close(self, order: Sequence[Row] | None = None) -> None:
        """Closes the file. ``order``: the rows of a finished sweep; the file then lists them first,
        in this order."""
        self._file.close()
        if order is not None:
            ordered = {id(row) for row in order}
            others = [row for row in self.rows.values() if id(row) not in ordered]
            _rewrite(self.folder / RESULTS, [*order, *others])


def _check_identity(path: Path, identity: dict[str, Any], has_results: bool) -> None:
    """Checks that the folder holds this sweep or none; writes its identity."""
    try:
        stored = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError):
        stored = {}
    if stored is None and has_results:
        stored = {}
    if stored is not None and stored != identity:
        differing = [key for key in identity if stored.get(key) != identity[key]]
        raise RequestError(
            f"out: {path.parent} holds another sweep ({', '.join(differing)} differ); "
            "use another folder or --overwrite",
            param="out",
        )
    path.write_text(json.dumps(identity, indent=1) + "\n")


def _read_rows(path: Path) -> list[Row]:
    """The last row of each question and run in a file; ignores an incomplete last line."""
    lines = path.read_bytes().split(b"\n")
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[run_key(row["settings"]), row["id"]] = row
            row["session"], row["finished_s"] = int(row["session"]), float(row["finished_s"])
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                break
            raise RequestError(f"out: {path} line {number} is no row", param="out") from error
    return list(rows.values())


def _rewrite(path: Path, rows: Iterable[Row]) -> None:
    """Replaces a file atomically."""
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", encoding="utf-8") as out:
        out.writelines(_encode(row) + "\n" for row in rows)
    os.replace(fresh, path)
