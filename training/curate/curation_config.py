"""A funnel's YAML file: which files, which servers, and how many.

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
    domain: subject                            # a field of the rows; without it the judge says
    tokenizer: Qwen/Qwen2.5-32B-Instruct       # lengths of traces; without it characters count
    trusted: [{source: aime}, {source: math, min_tokens: 5600}]
    count: 1000
    seed: 42

``fields`` renames a file's columns. An API key is read from the environment variable that ``key``
names.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from s1engine.config import check_float, check_int
from s1engine.errors import RequestError
from s1engine.eval.http_backend import HttpBackend, HttpOptions
from s1engine.sampling_params import SamplingParams
from s1engine.training import rows
from s1engine.training.curate.pipeline import Asked, Curation, Source, Trusted

FIELDS = {
    "out", "sources", "tests", "teacher", "teacher_name", "weak", "judge", "domain", "tokenizer",
    "trusted", "count", "seed",
}  # fmt: skip
SERVER = {"url", "model", "key", "max_tokens", "temperature", "concurrency", "timeout_s"}


def read(path: Path) -> Curation:
    """The funnel of a YAML file. Raises RequestError naming the field at fault."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", param="config") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is no YAML: {error}", param="config") from error
    return from_dict(given)


def from_dict(given: Any) -> Curation:
    """The same from plain values."""
    _check(given, "config", FIELDS, {"out", "sources"})
    teacher, judge, domain = given.get("teacher"), given.get("judge"), given.get("domain")
    if judge is None and domain is None:
        raise _error("domain", "is missing, and there is no judge to say it")
    weak = given.get("weak") or {}
    _check(weak, "weak", set(weak), set())
    return Curation(
        out=Path(str(given["out"])),
        sources=[_source(one, f"sources[{i}]") for i, one in _listed(given, "sources")],
        tests=[_source(one, f"tests[{i}]") for i, one in _listed(given, "tests")],
        teacher=_server(teacher, "teacher", temperature=1.0) if teacher else None,
        teacher_name=str(given.get("teacher_name") or rows.UNNAMED),
        weak={name: _server(one, f"weak.{name}", temperature=0.05) for name, one in weak.items()},
        judge=_server(judge, "judge", temperature=0.0) if judge else None,
        domain=(lambda row: row.get(str(domain))) if domain else None,
        num_tokens=_counter(given.get("tokenizer")),
        trusted=[_trusted(one, f"trusted[{i}]") for i, one in _listed(given, "trusted")],
        count=check_int("count", given.get("count", 1000), 1, 10**9),
        seed=check_int("seed", given.get("seed", 42), 0, 2**63 - 1),
    )


def read_rows(file: Path, fields: Mapping[str, str], param: str) -> list[rows.Row]:
    """Rows of a JSON lines file or a JSON list, columns renamed (ours: theirs). Raises RequestError
    naming the row."""
    found = []
    for place, given in _objects(file, param):
        renamed = {ours: given.get(theirs) for ours, theirs in fields.items()}
        row = {**{k: v for k, v in given.items() if k not in fields.values()}, **renamed}
        if "solution" in row and not isinstance(row["solution"], str | None):
            row["solution"] = json.dumps(row["solution"])  # a bare number
        try:
            found.append(rows.from_json(row))
        except ValueError as error:
            raise RequestError(f"{param}: {file} {place}: {error}", param=param) from error
    return found


def _objects(file: Path, param: str) -> list[tuple[str, rows.Json]]:
    if file.suffix != ".json":
        return [(f"line {number}", row) for number, row in rows.read_jsonl(file, param)]
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{param}: {file}: {error}", param=param) from error
    if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
        raise RequestError(f"{param}: {file} must hold a list of objects", param=param)
    return [(f"row {number}", row) for number, row in enumerate(given, 1)]


def _source(given: Any, param: str) -> Source:
    _check(given, param, {"name", "file", "fields"}, {"file"})
    file = Path(str(given["file"])).expanduser()
    fields = given.get("fields") or {}
    _check(fields, f"{param}.fields", set(fields), set())
    return Source(str(given.get("name") or file.stem), read_rows(file, fields, param))


def _server(given: Any, param: str, temperature: float) -> Asked:
    _check(given, param, SERVER, {"url"})
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
    return Asked(HttpBackend(options), params)


def _trusted(given: Any, param: str) -> Trusted:
    _check(given, param, {"source", "min_tokens"}, {"source"})
    least = check_int(f"{param}.min_tokens", given.get("min_tokens", 0), 0, 2**31)
    return Trusted(str(given["source"]), least)


def _counter(tokenizer: Any) -> Callable[[str], int]:
    if tokenizer is None:
        return len
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers and the network raise
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"tokenizer: {tokenizer}: {reason}", param="tokenizer") from error
    return lambda text: len(loaded.encode(text, add_special_tokens=False))


def _listed(given: Mapping[str, Any], name: str) -> list[tuple[int, Any]]:
    value = given.get(name) or []
    if not isinstance(value, list):
        raise _error(name, "must be a list")
    return list(enumerate(value))


def _check(given: Any, param: str, allowed: set[str], needed: set[str]) -> None:
    """An object with the fields it may and must have."""
    if not isinstance(given, Mapping):
        raise _error(param, "must hold fields and values")
    for name in given:
        if name not in allowed:
            raise _error(f"{param}.{name}", "is not known")
    for name in sorted(needed):
        if given.get(name) is None:
            raise _error(f"{param}.{name}", "is missing")


def _error(param: str, why: str) -> RequestError:
    return RequestError(f"{param} {why}", param=param)
