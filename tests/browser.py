"""A headless Chromium for tests, controlled through its debugging pipe; without one, tests skip.

Commands are JSON objects that end in a zero byte, written to the browser's file descriptor 3 and
read from its 4.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_S = 60


class Browser:
    """One page in one browser."""

    def __init__(self, command: list[str]) -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # The shell gives the two ends the numbers that the browser expects.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command, "--remote-debugging-pipe"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._ids = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def _call(self, method: str, **params: Any) -> Any:
        message: dict[str, Any] = {"id": next(self._ids), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._buffer:
            data = os.read(self._from, 2**16)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def open(self, url: str) -> None:
        """Opens a page and waits until it is loaded."""
        self._call("Page.navigate", url="about:blank")  # a new fragment alone loads nothing
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression in the page."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + WAIT_S
        while not self.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def screenshot(self) -> bytes:
        """The page as a PNG file."""
        data: bytes = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
        return data

    @contextmanager
    def emulating(self, width: int, scheme: str) -> Iterator[None]:
        """Shows pages on a screen of this width, ``light`` or ``dark``."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("Emulation.setDeviceMetricsOverride", **screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=features)
        try:
            yield
        finally:
            self._call("Emulation.clearDeviceMetricsOverride")
            self._call("Emulation.setEmulatedMedia", features=[])

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(10)
        os.close(self._to)
        os.close(self._from)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, or a skipped test."""
    command = next(filter(None, map(shutil.which, NAMES)), None)
    if command is None:
        pytest.skip("no Chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000")
    browser = Browser([command, *flags])
    try:
        yield browser
    finally:
        browser.close()
