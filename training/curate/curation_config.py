"""The configuration of a funnel, and its YAML file: files, servers, and numbers.

    out: out/s1k
    sources:
      - {name: aime, file: aime.jsonl, fields: {question: problem, solution: answer}}
    tests:
      - {name: math500, file: math500.jsonl, fields: {question: problem}}
    teacher: {url: "http://localhost:8000/v1", model: teacher}
    weak:
      small: {url: "http://localhost:8001/v1"}
      large: {url: "http://localhost:8002/v1"}
    judge: {url: "http://localhost:8003/v1"}   # without it: grading by rules
    domain: subject                            # a field of the rows; without it the judge decides
    tokenizer: Qwen/Qwen2.5-32B-Instruct       # lengths of traces; without it in characters
    trusted: [{source: aime}, {source: math, min_tokens: 5600}]
    count: 1000
    seed: 42

``fields`` renames a file's columns. ``key`` of a server names the environment variable with the API
key.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from s1engine.checks import check_float, check_int
from s1engine.errors import RequestError
from s1engine.eval.backend import Backend
from s1engine.eval.http_backend import HttpBackend, HttpOptions
from s1engine.sampling_params import SamplingParams
from s1engine.training.rows import UNNAMED, Json, TrainingRow, parse_row, read_jsonl

CONFIG_FIELDS = {
    "out", "sources", "tests", "teacher", "teacher_name", "weak", "judge", "domain", "tokenizer",
    "trusted", "count", "seed",
}  # fmt: skip
SERVER_FIELDS = {"url", "model", "key", "max_tokens", "temperature", "concurrency", "timeout_s"}


@dataclass(frozen=True, slots=True)
class QuestionSource:
    """Rows of questions under one name."""

    name: str
    rows: Sequence[TrainingRow]


@dataclass(frozen=True, slots=True)
class QueriedModel:
    """A model and the sampling parameters for it."""

    backend: Backend
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class TrustedSource:
    """A source whose questions are selected before the draw if their trace is correct and longer
    than ``min_tokens``."""

    source: str
    min_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CurationConfig:
    """Everything that a funnel needs."""

    out: Path
    sources: Sequence[QuestionSource]
    tests: Sequence[QuestionSource] = ()
    teacher: QueriedModel | None = None
    """None: the rows hold the traces of ``teacher_name``."""
    teacher_name: str = UNNAMED
    """Empty: rows are written in s1K's format. Otherwise in s1K-1.1's, under this name."""
    weak: Mapping[str, QueriedModel] = field(default_factory=dict)
    """Models by name; a question that one of them solves is too easy."""
    judge: QueriedModel | None = None
    """None: grading by rules."""
    domain: Callable[[TrainingRow], str] | None = None
    """The domain of a question; None: the judge decides."""
    num_tokens: Callable[[str], int] = len
    """Length of a trace."""
    trusted: Sequence[TrustedSource] = ()
    count: int = 1000
    seed: int = 42
    progress: bool = True


def read_config(path: Path) -> CurationConfig:
    """The configuration of a YAML file. Raises RequestError that names the field."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", param="config") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not YAML: {error}", param="config") from error
    return parse_config(given)


def parse_config(given: Any) -> CurationConfig:
    """The configuration of plain values, as YAML gives them."""
    _check_fields(given, "config", CONFIG_FIELDS, {"out", "sources"})
    teacher, judge, domain = given.get("teacher"), given.get("judge"), given.get("domain")
    if judge is None and domain is None:
        raise _error("domain", "is missing; without a judge it is required")
    weak = given.get("weak") or {}
    _check_fields(weak, "weak", set(weak), set())
    return CurationConfig(
        out=Path(str(given["out"])),
        sources=[_source(one, f"sources[{i}]") for i, one in _enumerate_list(given, "sources")],
        tests=[_source(one, f"tests[{i}]") for i, one in _enumerate_list(given, "tests")],
        teacher=_server(teacher, "teacher", temperature=1.0) if teacher else None,
        teacher_name=str(given.get("teacher_name") or UNNAMED),
        weak={name: _server(one, f"weak.{name}", temperature=0.05) for name, one in weak.items()},
        judge=_server(judge, "judge", temperature=0.0) if judge else None,
        domain=(lambda row: row.text(str(domain))) if domain else None,
        num_tokens=_token_counter(given.get("tokenizer")),
        trusted=[_trusted(one, f"trusted[{i}]") for i, one in _enumerate_list(given, "trusted")],
        count=check_int("count", given.get("count", 1000), 1, 10**9),
        seed=check_int("seed", given.get("seed", 42), 0, 2**63 - 1),
    )


def read_rows(file: Path, fields: Mapping[str, str], param: str) -> list[TrainingRow]:
    """Rows of a JSON lines file or a JSON list, columns renamed (ours: theirs). Raises RequestError
    that names the row."""
    rows = []
    for place, given in _read_objects(file, param):
        renamed = {ours: given.get(theirs) for ours, theirs in fields.items()}
        row = {**{k: v for k, v in given.items() if k not in fields.values()}, **renamed}
        if "solution" in row and not isinstance(row["solution"], str | None):
            row["solution"] = json.dumps(row["solution"])  # a bare number
        try:
            rows.append(parse_row(row))
        except ValueError as error:
            raise RequestError(f"{param}: {file} {place}: {error}", param=param) from error
    return rows


def _read_objects(file: Path, param: str) -> list[tuple[str, Json]]:
    if file.suffix != ".json":
        return [(f"line {number}", row) for number, row in read_jsonl(file, param)]
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{param}: {file}: {error}", param=param) from error
    if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
        raise RequestError(f"{param}: {file} must hold a list of objects", param=param)
    return [(f"row {number}", row) for number, row in enumerate(given, 1)]


def _source(given: Any, param: str) -> QuestionSource:
    _check_fields(given, param, {"name", "file", "fields"}, {"file"})
    file = Path(str(given["file"])).expanduser()
    fields = given.get("fields") or {}
    _check_fields(fields, f"{param}.fields", set(fields), set())
    return QuestionSource(str(given.get("name") or file.stem), read_rows(file, fields, param))


def _server(given: Any, param: str, temperature: float) -> QueriedModel:
    _check_fields(given, param, SERVER_FIELDS, {"url"})
    key = given.get("key")
    if key is not None and key not in os.environ:
        raise _error(f"{param}.key", f"names {key}, which is not set in the environment")
    options = HttpOptions(
        base_url=str(given["url"]),
        api_key=os.environ[key] if key else None,
        model=given.get("model"),
        concurrency=check_int(f"{param}.concurrency", given.get("concurrency", 64), 1, 4096),
        timeout_s=check_float(f"{param}.timeout_s", given.get("timeout_s", 3600), 1, 1e6),
    )
    params = SamplingParams(
        temperature=given.get("temperature", temperature),
        max_tokens=given.get("max_tokens", 32768),
    )
    return QueriedModel(HttpBackend(options), params)


def _trusted(given: Any, param: str) -> TrustedSource:
    _check_fields(given, param, {"source", "min_tokens"}, {"source"})
    min_tokens = check_int(f"{param}.min_tokens", given.get("min_tokens", 0), 0, 2**31)
    return TrustedSource(str(given["source"]), min_tokens)


def _token_counter(name: Any) -> Callable[[str], int]:
    if name is None:
        return len
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # transformers passes on any error of its parsers and the network
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"tokenizer: {name}: {reason}", param="tokenizer") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _enumerate_list(given: Mapping[str, Any], name: str) -> list[tuple[int, Any]]:
    value = given.get(name) or []
    if not isinstance(value, list):
        raise _error(name, "must be a list")
    return list(enumerate(value))


def _check_fields(given: Any, param: str, allowed: set[str], required: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise _error(param, "must hold fields and values")
    for name in given:
        if name not in allowed:
            raise _error(f"{param}.{name}", "is not known")
    for name in sorted(required):
        if given.get(name) is None:
            raise _error(f"{param}.{name}", "is missing")


def _error(param: str, reason: str) -> RequestError:
    return RequestError(f"{param} {reason}", param=param)
