"""The playground in a real browser: it asks, streams, marks injected text, stops, keeps a
conversation, and says in words what fails."""

import functools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from s1engine.server.app import PLAYGROUND
from tests.browser import Browser, chromium
from tests.server.conftest import KEY, Served

DONE = "document.querySelectorAll('article[data-done]').length"
KNOWN = "document.getElementById('model').textContent.includes('s1-nano')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)"
    )
    return found


def open_page(browser: Browser, url: str, **fields: Any) -> None:
    link = "&".join(f"{name}={value}" for name, value in fields.items())
    browser.open(f"{url}/#{link}")


def test_the_page_asks_at_several_budgets_side_by_side(served: Served, browser: Browser) -> None:
    open_page(
        browser,
        served.url,
        budgets="6,24",
        waits=1,
        checkpoints="0,4",
        temperature=0,
        key=KEY,
        go=1,
    )
    browser.until(f"{DONE} === 2")
    first, second = texts(browser, ".facts")
    assert "thought 6 of 6 tokens" in first and "of 24 tokens" in second
    assert all(answer.startswith("Final Answer:") for answer in texts(browser, ".answer"))
    assert "Final Answer:" in texts(browser, "article mark")
    assert browser.screenshot().startswith(b"\x89PNG")

    flags = texts(browser, "article .checkpoint")
    assert [re.search(r"\d+", flag)[0] for flag in flags] == ["0", "4"] * 2  # type: ignore[index]
    # A flag stands behind the thinking that its answer saw.
    alone = served.client.chat.completions.create(
        model="s1-nano",
        messages=[{"role": "user", "content": "a=3 b=a+4 c=b*2 d=c-5 e=d*3 e?"}],
        temperature=0,
        extra_body={"thinking_token_budget": 4},
    )
    thinking = texts(browser, ".thinking")[1]
    assert thinking.split(flags[-1])[0].replace(flags[0], "") == alone.choices[0].message.reasoning  # type: ignore[attr-defined]

    # The next turn follows the answer that the user keeps.
    browser.evaluate("document.querySelectorAll('.keep input')[0].click()")
    browser.evaluate("document.getElementById('budgets').value = '8'")
    browser.evaluate("document.getElementById('question').value = 'f=e+1 f?'")
    browser.evaluate(
        "document.getElementById('question').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', ctrlKey: true, bubbles: true, cancelable: true}))"
    )
    browser.until(f"{DONE} === 3")
    browser.evaluate("[...document.querySelectorAll('[data-code=curl]')].at(-1).click()")
    command = texts(browser, "#code pre")[0]
    body = json.loads(command[command.index("-d '") + 4 : -1].replace("'\\''", "'"))
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == texts(browser, ".answer")[0]
    assert KEY not in command


def test_a_click_asks_and_another_ends_the_thinking(served: Served, browser: Browser) -> None:
    open_page(browser, served.url, key=KEY, budgets="", waits=20, waitText="")
    browser.until(KNOWN)
    assert browser.evaluate("document.getElementById('maxTokens').max") == "2048"
    browser.evaluate("document.getElementById('ask').click()")
    browser.until(f"document.querySelector('article button')?.hidden === false || {DONE}")
    browser.evaluate("document.querySelector('article button').click()")
    browser.until(f"{DONE} === 1")
    assert re.search(r"ended: (client|natural|budget)", texts(browser, ".facts")[0])


def test_stop_aborts_the_requests(served: Served, browser: Browser) -> None:
    endless = {"budgets": "1900", "waits": 20, "temperature": 1, "question": "think long"}
    open_page(browser, served.url, key=KEY, **endless)
    browser.until(KNOWN)
    browser.evaluate("document.getElementById('ask').click()")
    browser.evaluate("document.getElementById('stop').click()")
    browser.until(f"{DONE} === 1 && document.getElementById('stop').hidden")
    assert texts(browser, ".facts")[0].startswith("stopped")


def test_the_slider_reaches_the_context_and_bad_numbers_are_refused(
    served: Served, browser: Browser
) -> None:
    open_page(browser, served.url, key=KEY, budgets="8, some")
    browser.until(KNOWN)
    browser.evaluate("document.getElementById('ask').click()")
    assert '"some" is not a number of tokens from 0 to 2048' in texts(browser, "#problem")[0]
    assert browser.evaluate("document.getElementById('budgets').ariaInvalid") == "true"
    assert browser.evaluate(DONE) == 0
    browser.evaluate(
        "const bar = document.getElementById('slider'); bar.value = 1000;"
        "bar.dispatchEvent(new Event('input'))"
    )
    assert browser.evaluate("document.getElementById('budgets').value") == "2048"
    assert texts(browser, "#slid") == ["2048 tokens"]


def test_a_missing_key_is_asked_for(served: Served, browser: Browser) -> None:
    open_page(browser, served.url, budgets=5, go=1)
    browser.until(f"{DONE} === 1")
    assert "API key" in texts(browser, ".facts.error")[0]
    assert browser.evaluate("document.activeElement.id") == "key"


def test_a_model_without_thinking_and_a_server_that_ends(browser: Browser) -> None:
    with plain_server() as (server, url):
        open_page(browser, url)
        browser.until("document.getElementById('model').textContent.includes('no thinking')")
        shown = "document.getElementById('%s').closest('label').checkVisibility()"
        assert not browser.evaluate(shown % "budgets")
        assert browser.evaluate(shown % "temperature")
        server.shutdown()
        server.server_close()
        browser.evaluate("document.getElementById('ask').click()")
        browser.until(f"{DONE} === 1")
        assert texts(browser, ".facts")[0].startswith("The server does not answer.")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(served: Served, browser: Browser, width: int, scheme: str) -> None:
    with browser.emulating(width, scheme):
        open_page(browser, served.url, key=KEY)
        browser.until(KNOWN)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("document.getElementById('settings').open") == (width > 700)
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(map(int, re.findall(r"\d+", ground))) / 3
        assert (bright > 128) == (scheme == "light")


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    page = served.http.get("/", headers={"Authorization": ""})
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    linked = set(re.findall(r'(?:src|href)="([^"]*)"', page.text))
    files = {f"playground/{path.name}" for path in PLAYGROUND.iterdir()}
    assert linked < files
    for name in files:
        answer = served.http.get(f"/{name}", headers={"Authorization": ""})
        assert answer.status_code == 200, name
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|@import", text), name


@contextmanager
def plain_server() -> Iterator[tuple[ThreadingHTTPServer, str]]:
    """Serve the page and the description of a model without thinking, nothing else."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(PlainHandler, directory=str(PLAYGROUND))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


PLAIN_MODEL = {"id": "plain", "max_model_len": 64, "reasoning_format": None}


class PlainHandler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path != "/v1/models":
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [PLAIN_MODEL]}).encode())

    def translate_path(self, path: str) -> str:
        return str(Path(self.directory) / path.rpartition("/")[2].partition("#")[0])

    def log_message(self, format: str, *args: Any) -> None:
        pass
