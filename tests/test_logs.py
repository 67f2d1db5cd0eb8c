"""Logging: the variable's levels, one error for a wrong one, and what debug lines say."""

import logging
from collections.abc import Iterator

import pytest

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.logs import LEVEL_VARIABLE, configure_logging
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
