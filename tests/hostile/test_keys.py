"""API keys: none is empty, none opens the server by accident, and each has its own prefixes."""

import argparse
from pathlib import Path

import httpx
import pytest

from s1engine.cli import api_keys, serve
from s1engine.errors import RequestError
from tests.server.conftest import start_server

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


def test_no_key_sees_what_another_has_cached(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    process, url, _ = start_server("--api-key-file", str(keys), "--dtype", "float32")

    def cached(key: str) -> int:
        body = {"prompt": "a=1 b=2 " * 16, "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    try:
        assert cached("one") == 0
        assert cached("two") == 0
        assert cached("one") > 0 and cached("two") > 0
    finally:
        process.terminate()
        assert process.wait(30) == 0
