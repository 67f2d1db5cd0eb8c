"""The rows of a sweep, and the folder that keeps them: results.jsonl and sweep.json.

A row is written as soon as it is known, so a killed sweep loses nothing and goes on where it was.
A question that failed is a row, too; when the sweep is run again it is asked again, and the later
row counts. Knows nothing of backends.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from s1engine.errors import RequestError
from s1engine.eval.grade import extract_answer, is_correct
from s1engine.eval.methods import Answer, RunSettings

Row = dict[str, Any]
RESULTS = "results.jsonl"
SWEEP = "sweep.json"
_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every row
_encode_key = json.JSONEncoder(sort_keys=True).encode


def make_row(answer: Answer, *, session: int, finished_s: float) -> Row:
    """The line of results.jsonl for one question in one run.

    Tokens are those of all samples together where the samples are taken together (majority, best
    of n), of the accepted one in rejection sampling; ``generated_tokens`` counts everything.
    """
    question, choice = answer.question, answer.choice
    spent = _spent(answer)
    extracted = choice.extracted if choice else None
    marked = [sample for sample in answer.samples if sample.estimated]
    row: Row = {
        "id": question.id,
        "settings": answer.settings.to_json(),
        "thinking_tokens": sum(sample.thinking_tokens for sample in spent),
        "answer_tokens": sum(s.output_tokens - s.thinking_tokens for s in spent),
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
    return row | _particulars(answer) | ({"thinking_estimated": True} if marked else {})


def _spent(answer: Answer) -> Sequence[Any]:
    if answer.settings.max_tries:
        return [answer.choice.sample] if answer.choice else answer.samples[-1:]
    return answer.samples


def _particulars(answer: Answer) -> Row:
    """What only some rows have."""
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
    return row


def run_key(settings: RunSettings | Row) -> str:
    """Names a run, the same for settings and for what a row says of them."""
    data = settings.to_json() if isinstance(settings, RunSettings) else settings
    return _encode_key(data)


@dataclass(slots=True)
class Results:
    """The open folder of a sweep."""

    folder: Path
    session: int
    """Counts the times that the sweep was started, from 0."""
    rows: dict[tuple[str, str], Row]
    """By run and question."""
    _file: IO[str]

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, overwrite: bool) -> "Results":
        """Opens the folder, made if missing, with what an earlier start of the same sweep left.

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
        _rewrite(path, rows)  # drops a line that was cut short
        session = 1 + max((row["session"] for row in rows), default=-1)
        by_key = {(run_key(row["settings"]), row["id"]): row for row in rows}
        return cls(folder, session, by_key, path.open("a", encoding="utf-8"))

    def has(self, settings: RunSettings, question_id: str) -> bool:
        """Is the question answered in this run, without a failure?"""
        row = self.rows.get((run_key(settings), question_id))
        return row is not None and "error" not in row

    def add(self, row: Row) -> None:
        """Writes a row, at once."""
        self.rows[run_key(row["settings"]), row["id"]] = row
        self._file.write(_encode(row) + "\n")
        self._file.flush()

    def of(self, settings: RunSettings, question_ids: Iterable[str]) -> list[Row]:
        """The rows of a run in the order of the questions."""
        key = run_key(settings)
        return [self.rows[key, name] for name in question_ids if (key, name) in self.rows]

    def close(self, order: Sequence[Row] | None = None) -> None:
        """Ends writing. With ``order``, a whole sweep's rows, these stand first, in that order."""
        self._file.close()
        if order is not None:
            ours = {id(row) for row in order}
            others = [row for row in self.rows.values() if id(row) not in ours]
            _rewrite(self.folder / RESULTS, [*order, *others])


def _check_identity(path: Path, identity: dict[str, Any], has_results: bool) -> None:
    """The sweep in the folder must be this one; a folder without one is claimed."""
    try:
        there = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError):
        there = {}
    if there is None and has_results:
        there = {}
    if there is not None and there != identity:
        differing = [key for key in identity if there.get(key) != identity[key]]
        raise RequestError(
            f"out: {path.parent} holds another sweep ({', '.join(differing)} differ); "
            "name another folder or give --overwrite",
            param="out",
        )
    path.write_text(json.dumps(identity, indent=1) + "\n")


def _read_rows(path: Path) -> list[Row]:
    """Rows of a file, the last of each question and run; a last line that was cut short is none."""
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
    """Replaces a file in one step."""
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", encoding="utf-8") as out:
        out.writelines(_encode(row) + "\n" for row in rows)
    os.replace(fresh, path)
