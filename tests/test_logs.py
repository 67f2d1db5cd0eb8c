"""Logging: the variable's levels, one error for a wrong one, what debug lines say, and output that
cannot be written."""

import fcntl
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.logs import (
    LEVEL_VARIABLE,
    MAX_PENDING_BYTES,
    BackgroundStream,
    configure_logging,
)
from s1engine.sampling_params import SamplingParams

PACKAGE = logging.getLogger("s1engine")
DIGITS = "start: /[0-9]{1,3}/"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level = PACKAGE.level
    yield
    PACKAGE.setLevel(level)


@pytest.mark.parametrize(
    ("value", "level"),
    [(None, logging.WARNING), ("debug", logging.DEBUG), ("Info", logging.INFO)],
)
def test_the_variable_sets_the_level_of_the_package(
    monkeypatch: pytest.MonkeyPatch, value: str | None, level: int
) -> None:
    root = logging.getLogger().level
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(LEVEL_VARIABLE, value)
    configure_logging()
    assert PACKAGE.level == level
    assert logging.getLogger().level == root  # other libraries keep their own


@pytest.mark.parametrize("value", ["loud", "", "10"])
def test_an_unknown_level_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, value)
    with pytest.raises(
        RequestError, match=f"{LEVEL_VARIABLE} must be one of debug, .*got {value!r}"
    ):
        configure_logging()


def test_debug_lines_follow_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "s1engine")
    llm = LLM(progress=False, dtype="float32", max_num_seqs=2)
    request = llm.engine.make_request(
        "a=3 b=", SamplingParams(temperature=0, max_tokens=20, grammar=DIGITS), request_id="r7"
    )
    (output,) = llm.generate_requests([request], progress=False)
    lines = [record.getMessage() for record in caplog.records]
    own = [line for line in lines if line.startswith("request r7 ")]
    assert [line.split()[2] for line in own] == ["compiled:", "scheduled", "has", "finished"]
    assert f"{output.usage.completion_tokens} tokens" in own[-1]
    assert any(line.startswith("grammar of 19 characters compiled") for line in lines)


def test_by_default_there_are_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(progress=False, dtype="float32", max_num_seqs=2)
    llm.generate("a=3 b=", SamplingParams(max_tokens=3), progress=False)
    assert not [record for record in caplog.records if record.name.startswith("s1engine")]


# --- output that cannot be written ---


class Pipe:
    """A pipe of one page, written by a BackgroundStream."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self.stream = BackgroundStream(os.fdopen(writer, "w"))

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += os.read(self.reader, size - len(data))
        return data


@given(st.lists(st.text(max_size=300).map(lambda text: text * 20), max_size=6))
@settings(max_examples=15)
def test_a_background_stream_keeps_every_character(texts: list[str]) -> None:
    pipe = Pipe()
    for text in texts:
        pipe.stream.write(text)
        pipe.stream.flush()
    wanted = "".join(texts).encode(errors="backslashreplace")
    assert pipe.read(len(wanted)) == wanted
    pipe.stream.drain()
    assert pipe.stream.dropped == 0
    os.close(pipe.reader)


def test_a_pipe_that_is_not_read_costs_lines_and_no_time() -> None:
    pipe, line = Pipe(), "x" * 99 + "\n"
    handler = logging.StreamHandler(pipe.stream)  # type: ignore[type-var]
    num_lines = 4 * MAX_PENDING_BYTES // len(line)
    for _ in range(num_lines):
        handler.emit(logging.makeLogRecord({"msg": line[:-1]}))
    dropped = pipe.stream.dropped
    assert num_lines / 2 < dropped < num_lines
    notice = f"s1engine: {dropped} lines of output were dropped\n"
    written = pipe.read((num_lines - dropped) * len(line) + len(notice)).decode()
    assert sorted(written.splitlines(keepends=True)) == sorted(
        [notice, *[line] * (num_lines - dropped)]
    )
    pipe.stream.write(line)
    assert pipe.read(len(line)).decode() == line
    os.close(pipe.reader)


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_full_disk_or_a_closed_pipe_costs_lines_only(kind: str) -> None:
    if kind == "full":
        stream = BackgroundStream(os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    else:
        pipe = Pipe()
        os.close(pipe.reader)
        stream = pipe.stream
    for i in range(1, 4):
        stream.write("a line\n")
        stream.drain()
        assert stream.dropped == i


def test_closed_descriptors_are_not_given_to_others() -> None:
    """Else a socket gets the number of stderr, and its client the messages."""
    code = (
        "import os, sys; from s1engine.logs import *; open_standard_descriptors(); detach_output();"
        "print('x'); print('y', file=sys.stderr); assert os.open('/dev/null', 0) > 2"
    )
    closing = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", closing], check=False).returncode == 0


def test_detached_output_is_written_before_the_end() -> None:
    code = (
        "import sys; from s1engine.logs import *; configure_logging(); detach_output();"
        "print('out'); logging.getLogger('s1engine').error('log'); 1 / 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "out\n"
    assert "s1engine: log\n" in done.stderr and "ZeroDivisionError" in done.stderr
