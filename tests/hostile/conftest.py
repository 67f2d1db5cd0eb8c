"""A server of its own, watched by a canary while it is attacked."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import KEY, start_server

MAX_DELAY_S = 1.0  # of the canary
MAX_GROWTH_MIB = 256.0  # of the server's peak memory, during one attack


def is_healthy(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200


@dataclass(frozen=True)
class Target:
    """The server's process and a client with its key."""

    pid: int
    url: str
    http: httpx.Client

    def peak_mib(self) -> float:
        """Peak resident memory so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

    @contextmanager
    def watched(
        self,
        sing_once: Callable[[httpx.Client], None] = is_healthy,
        max_delay_s: float = MAX_DELAY_S,
    ) -> Iterator[None]:
        """Within it, the canary must be answered in time, and memory must not grow much."""
        delays: list[float] = []
        sings, ended = threading.Event(), threading.Event()

        def sing() -> None:
            with httpx.Client(base_url=self.url, timeout=60) as http:
                while not ended.is_set():
                    begin = time.monotonic()
                    sing_once(http)
                    delays.append(time.monotonic() - begin)
                    sings.set()

        thread = threading.Thread(target=sing)
        thread.start()
        assert sings.wait(60)
        delays.clear()
        before = self.peak_mib()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        assert max(delays, default=0.0) < max_delay_s
        assert self.peak_mib() - before < MAX_GROWTH_MIB


@contextmanager
def serve(*flags: str, key: str = KEY, **env: str) -> Iterator[Target]:
    """A server, and a client with a key."""
    process, url, _ = start_server("--dtype", "float32", *flags, **env)
    headers = {"Authorization": f"Bearer {key}", "content-type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        yield Target(process.pid, url, http)
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with serve("--max-buffered-mb", "100", S1ENGINE_API_KEY=KEY) as served:
        yield served


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A small server with the keys "one" and "two", and "first", which may set any priority; the
    client has "one"."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text("one\ntwo\n")
    (folder / "first").write_text("first\n")
    flags = ["--api-key-file", str(folder / "keys"), "--priority-key-file", str(folder / "first")]
    with serve(*flags, "--max-num-seqs", "4", "--max-queued-requests", "60", key="one") as served:
        yield served
