"""docs/OPERATING.md and examples/deploy/: what they say is what the code does."""

import argparse
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from s1engine.cli import serve
from s1engine.config import EngineConfig
from s1engine.engine.supervision import Supervision

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "OPERATING.md").read_text()
LIMITS_HEAD = "| limit | value | flag | constant |"
UNITS = {"": 1, "ms": 1e-3, "s": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
VALUE = re.compile(r"([\d,.]+) ?(\w*)")
FLAG_UNITS = dict.fromkeys(("--max-body-mb", "--max-buffered-mb", "--response-store-mb"), 2**20)
# Of these modules every limit must be in the table.
BOUNDED = (
    *("server.http_protocol", "server.serving", "server.middleware", "server.admission"),
    *("server.request_notes", "server.api.tokenization"),
    *("server.app", "server.api.body", "server.body_route", "server.buffer_budget"),
    *("server.json_pieces", "server.logprob_limit", "server.response_store"),
    *("server.api.completions", "server.api.chat_completions", "server.api.request_fields"),
    *(
        "server.api.call_syntax",
        "server.api.tools",
        "server.streaming",
        "server.generation",
        "sampling_params",
    ),
    *("engine.grammar_limits", "engine.grammar_validator", "engine.grammar_trial"),
    *("engine.grammar_worker", "engine.mask_threads", "engine.messages", "engine.engine_process"),
    *("engine.client_connection", "engine.engine_child", "engine.supervision"),
    *("template_environment", "model_files", "logs", "server.tracing"),
)
LIMIT = re.compile(r"MAX_\w+|\w+_(?:S|BYTES)")
# Not limits of what a client may do.
NO_LIMITS = {
    "engine.grammar_trial": {"MAX_COMPARED"},
    "engine.grammar_worker": {"READ_BYTES"},
    "engine.mask_threads": {"MASKS_WAIT_S"},
    "server.api.request_fields": {"MAX_ID_DIGITS"},
    "template_environment": {"MAX_REASON_CHARS"},
    "server.admission": {"RETRY_AFTER_S", "DRAINING_RETRY_AFTER_S"},
    "server.buffer_budget": {"RETRY_AFTER_S"},
    "server.middleware": {"VALUE_BYTES"},
    "server.logprob_limit": {"LOGPROB_BYTES"},
    "server.response_store": {"RESPONSE_BYTES"},
    "server.json_pieces": {"VALUE_BYTES", "ESCAPED_BYTES"},
    "server.streaming": {"LARGE_BYTES"},
    "server.api.completions": {"MAX_SPELLINGS"},
    "server.api.chat_completions": {"MAX_SPELLINGS"},
    "server.app": {"RESTART_RETRY_AFTER_S"},
    "engine.engine_process": {"STATS_S"},
    "engine.client_connection": {"HEARTBEAT_S", "READ_BYTES"},
    "engine.engine_child": {"READ_BYTES", "REAP_S"},
    "engine.supervision": {"RESTART_WINDOW_S", "FIRST_PAUSE_S"},
    "sampling_params": {"MAX_TOKEN_ID", "MAX_LOGITS_PROCESSORS"},
}


def limit_rows() -> list[tuple[str, str, str, str]]:
    """Name, value, flag and constant of each row of the table of limits."""
    table = PAGE[PAGE.index(LIMITS_HEAD) :].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    cells = [[cell.strip(" `") for cell in row] for row in rows]
    return [(name, value, flag, constant) for name, value, flag, constant, _ in cells if value]


def number(text: str) -> float | None:
    """A value in the base unit: bytes, seconds or a count; None for "none"."""
    if text == "none":
        return None
    match = VALUE.fullmatch(text)
    assert match, f"{text!r} is no value"
    return float(match[1].replace(",", "")) * UNITS[match[2]]


def constant(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"s1engine.{module}"), attribute)


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser


def flag_default(flag: str) -> float | None:
    """The default of a flag in the base unit; some have it in a dataclass."""
    (action,) = (a for a in serve_parser()._actions if flag in a.option_strings)
    options = (*fields(EngineConfig), *fields(Supervision))
    defaults = {field.name: field.default for field in options}
    value = defaults.get(action.dest, action.default)
    return None if value is None else float(value) * FLAG_UNITS.get(flag, 1)


@pytest.mark.parametrize("row", limit_rows(), ids=lambda row: row[3] or row[2])
def test_each_limit_is_that_of_the_code(row: tuple[str, str, str, str]) -> None:
    _, value, flag, name = row
    assert flag or name
    if name:
        assert number(value) == constant(name), f"{name} is {constant(name)}: mend the table"
    if flag:
        default = flag_default(flag)
        assert default == number(value) or (default is None and name)


def test_no_limit_is_left_out() -> None:
    """A limit that a change adds must get a row in docs/OPERATING.md, or a place in NO_LIMITS."""
    shown = {row[3] for row in limit_rows()}
    missing = [
        f"{module}.{name}"
        for module in BOUNDED
        for name, value in vars(import_module(f"s1engine.{module}")).items()
        if LIMIT.fullmatch(name)
        and isinstance(value, int | float)
        and defines(module, name)
        and f"{module}.{name}" not in shown
        and name not in NO_LIMITS.get(module, ())
    ]
    assert missing == []


def defines(module: str, name: str) -> bool:
    source = (ROOT / "s1engine" / f"{module.replace('.', '/')}.py").read_text()
    return re.search(rf"^{name}\b.* = ", source, re.MULTILINE) is not None


def test_the_table_is_read() -> None:
    assert len(limit_rows()) > 40
    assert number("4 MiB") == 2**22 and number("1,024") == 1024 and number("0.5 s") == 0.5
