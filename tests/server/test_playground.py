"""The playground in a real browser: it sends, streams, marks injected text, ends the thinking."""

import re

from tests.browser import chromium
from tests.server.conftest import KEY, Served

DONE = "document.querySelectorAll('article[data-done]').length"
FACTS = "[...document.querySelectorAll('.facts')].map(node => node.textContent)"


def test_the_page_asks_at_several_budgets_side_by_side(served: Served) -> None:
    fields = f"budgets=6,24&waits=1&checkpoints=0,4&key={KEY}&go=1"
    with chromium() as browser:
        browser.open(f"{served.url}/?{fields}")
        browser.until(f"{DONE} === 2")
        first, second = browser.evaluate(FACTS)
        assert "thought 6 of 6 tokens" in first and "of 24 tokens" in second
        answers = browser.evaluate(
            "[...document.querySelectorAll('.answer')].map(node => node.textContent)"
        )
        assert all(answer.startswith("Final Answer:") for answer in answers)
        forced = browser.evaluate(
            "[...document.querySelectorAll('article mark')].map(node => node.textContent)"
        )
        assert "Final Answer:" in forced
        flags = browser.evaluate(
            "[...document.querySelectorAll('article .checkpoint')].map(node => node.textContent)"
        )
        assert [re.search(r"\d+", flag)[0] for flag in flags] == ["0", "4"] * 2  # type: ignore[index]
        assert browser.screenshot().startswith(b"\x89PNG")


def test_a_click_asks_and_another_ends_the_thinking(served: Served) -> None:
    with chromium() as browser:
        browser.open(f"{served.url}/?key={KEY}&budgets=&waits=20&waitText=")
        browser.until("document.getElementById('model').textContent.includes('s1-nano')")
        browser.evaluate("document.getElementById('slider').value = 400")
        browser.evaluate("document.getElementById('ask').click()")
        browser.until("document.querySelector('article button')?.disabled === false")
        browser.evaluate("document.querySelector('article button').click()")
        browser.until(f"{DONE} === 1")
        (facts,) = browser.evaluate(FACTS)
        assert re.search(r"ended: (client|natural|budget)", facts)


def test_a_refusal_is_shown(served: Served) -> None:
    with chromium() as browser:
        browser.open(f"{served.url}/?budgets=5&go=1")
        browser.until(f"{DONE} === 1")
        assert "API key" in browser.evaluate(FACTS)[0]
        assert browser.evaluate("document.querySelector('.facts').className") == "facts error"


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    page = served.http.get("/", headers={"Authorization": ""})
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert not re.findall(r"(?:src|href)\s*=|https?://|@import", page.text)
