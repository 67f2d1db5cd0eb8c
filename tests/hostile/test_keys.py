"""API keys: none is empty, none opens the server by accident, and each has its own prefixes."""

import argparse
from pathlib import Path

import pytest

from s1engine.cli import api_keys, serve
from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from tests.hostile.conftest import Target

VARIABLE = api_keys.API_KEY_VARIABLE


def test_keys_come_from_flags_files_or_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "from-variable")
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    assert api_keys.api_keys(["flag"], None) == ["flag"]
    assert api_keys.api_keys(None, str(file)) == ["one", "two"]
    assert api_keys.api_keys(["flag"], str(file)) == ["flag", "one", "two"]
    assert api_keys.api_keys(None, None) == []  # the first call has removed the variable
    monkeypatch.setenv(VARIABLE, "from-variable")
    assert api_keys.api_keys(None, None) == ["from-variable"]


@pytest.mark.parametrize(
    ("given", "text", "variable", "param"),
    [
        ([""], None, None, "api_key"),
        (["good", " "], None, None, "api_key"),
        (["line\n"], None, None, "api_key"),
        (["ä"], None, None, "api_key"),
        (None, "", None, "api_key_file"),
        (None, "one\n\ntwo\n", None, "api_key_file"),
        (None, None, "", VARIABLE),
    ],
)
def test_an_empty_key_is_refused(
    given: list[str] | None,
    text: str | None,
    variable: str | None,
    param: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    file = None if text is None else tmp_path / "keys"
    if file is not None and text is not None:
        file.write_text(text)
    with pytest.raises(RequestError) as caught:
        api_keys.api_keys(given, None if file is None else str(file))
    assert caught.value.param == param


def test_a_key_is_given_once_and_priority_keys_are_keys_too(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\n")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = ["--priority-key-file", str(tmp_path / "keys"), "--api-key"]
    with pytest.raises(RequestError, match="equal"):
        serve.run(parser.parse_args([*flags, "first"]))
    limits = api_keys.client_limits(parser.parse_args([*flags, "a"]), EngineConfig(), ["a"], ["b"])
    assert limits.num_clients == 2 and limits.priority_clients == {"1"}


@pytest.mark.parametrize("num_keys", [0, 1])
def test_one_client_may_order_its_own_requests(num_keys: int) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    keys = ["a", "b"][:num_keys]
    limits = api_keys.client_limits(parser.parse_args([]), EngineConfig(), keys, [])
    assert limits.num_clients == 1 and limits.priority_clients is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_machines_need_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(RequestError, match="allow-no-api-key") as caught:
        serve.run(parser.parse_args(["--host", host]))
    assert caught.value.param == "host"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert api_keys.is_loopback(host)


def test_no_key_sees_what_another_has_cached(shared: Target) -> None:
    def cached(key: str) -> int:
        body = {"prompt": "d=7 e=8 " * 16, "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        answer = shared.http.post("/v1/completions", json=body, headers=headers)
        count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached("one") == 0
    assert cached("two") == 0
    assert cached("one") > 0 and cached("two") > 0
