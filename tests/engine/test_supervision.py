"""An engine that dies, freezes, hangs or sends noise: its streams end with the cause, another one
follows while the limits allow, and a request that was live at two deaths is not run again."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.config import EngineConfig
from s1engine.engine import (
    client_connection,
    engine_process,
    messages,
    process_client,
    spawning,
    supervision,
)
from s1engine.engine.client_connection import ClientConnection, Heart
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.engine.supervision import EngineWatchdog, RestartBudget, Supervision
from s1engine.errors import EngineDeadError, ModelError, RequestError, RequestFailedError
from s1engine.sampling_params import SamplingParams
from tests.engine import stand_in_engine as stand_in

ROOT = Path(__file__).resolve().parents[2]

# --- the watchdog ---


@given(st.lists(st.sampled_from(["tick", "sign", "works", "hangs"]), max_size=60))
def test_the_watchdog_counts_its_own_ticks(events: list[str]) -> None:
    """Whatever time has passed between them: who stops both processes ends neither."""
    limits = Supervision(engine_silence_timeout=5, engine_step_timeout=600)
    watchdog, silence, stalled = EngineWatchdog(limits), 0, 0.0
    for event in events:
        if event == "tick":
            silence += 1
            assert (watchdog.tick() is not None) == (silence > 5 or stalled > 600)
        else:
            silence = 0
            watchdog.record_sign()
        if event in ("works", "hangs"):
            stalled = {"works": 599.0, "hangs": 601.0}[event]
            watchdog.record_stalled(stalled)


def test_restarts_are_counted_within_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now)
    budget = RestartBudget(3)
    assert [budget.next_pause() for _ in range(4)] == [1, 2, 4, None]
    now += 3599
    assert budget.next_pause() is None
    now += 2
    assert budget.next_pause() == 1
    assert RestartBudget(0).next_pause() is None


@pytest.mark.parametrize("name", ["engine_silence_timeout", "engine_step_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "x"])
def test_wrong_limits_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        Supervision(**{name: value})
    assert error.value.param == name


# --- the heart ---


class Pulse:
    """The other end of an engine process's connection."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(60)
        self._frames = messages.FrameReader()
        self._messages: list[Any] = []
        self.client = ClientConnection(theirs)

    def until(self, wanted: Callable[[Any], bool]) -> None:
        """Reads messages until ``wanted`` says True."""
        while True:
            while self._messages:
                if wanted(messages.from_engine_decoder.decode(self._messages.pop(0))):
                    return
            self._messages = self._frames.feed(self._socket.recv(2**16))

    def until_stalled(self, low: float, high: float = 1e9) -> None:
        self.until(lambda m: isinstance(m, messages.Heartbeat) and low <= m.stalled <= high)

    def send(self, message: messages.ToEngine) -> None:
        self._socket.sendall(messages.encode_frame(message))

    def close(self) -> None:
        self._socket.close()


class HangingEngine:
    """Steps that hang until they are released, return nothing, or compute."""

    def __init__(self) -> None:
        self.has_unfinished = False
        self.steps = "computes"
        self.released = threading.Event()

    def step_core(self) -> Any:
        if not self.has_unfinished:
            return None
        if self.steps == "hangs":
            assert self.released.wait(60)
        return None if self.steps == "spins" else SimpleNamespace()

    def end_thinking(self, _: str) -> None:
        self.has_unfinished = True

    def abort(self, _: str) -> None:
        self.has_unfinished = False

    def collect_failures(self) -> list[Any]:
        return []

    def stats(self) -> Any:
        return {name: 1 for name in stand_in.STATS.split()}


@pytest.fixture
def pulse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pulse]:
    monkeypatch.setattr(client_connection, "HEARTBEAT_S", 0.01)
    pulse = Pulse()
    yield pulse
    pulse.close()


@pytest.mark.parametrize("steps", ["hangs", "spins"])
def test_heartbeats_go_on_while_a_step_hangs_and_count_it(
    pulse: Pulse, monkeypatch: pytest.MonkeyPatch, steps: str
) -> None:
    """Also of steps that return at once and never compute anything."""
    monkeypatch.setattr(messages, "Outputs", lambda _: messages.Heartbeat(-1.0))
    engine, heart = HangingEngine(), Heart(pulse.client, lambda: None)
    step = engine_process._step_until_closed

    def run() -> None:
        with contextlib.suppress(ConnectionError):
            step(pulse.client, engine, [], heart)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        pulse.until_stalled(0, 0)  # idle
    engine.steps = steps
    pulse.send(messages.EndThinking("begin"))
    pulse.until_stalled(0.05)
    engine.steps = "computes"
    engine.released.set()
    pulse.until_stalled(-1, -1)  # an output
    for _ in range(3):
        pulse.until_stalled(0, 0.05)
    engine.released.clear()
    engine.steps = steps
    pulse.until_stalled(0.05)
    engine.released.set()
    pulse.send(messages.AbortRequest("end"))
    pulse.until_stalled(0, 0)
    pulse.close()
    thread.join(60)
    assert not thread.is_alive()


def test_the_collector_leaves_a_loaded_engine_alone(
    pulse: Pulse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was loaded is out of its reach as soon as the client hears of it."""
    engine = SimpleNamespace(max_model_len=1, config=SimpleNamespace(device="cpu"))
    engine.stats = HangingEngine().stats
    loaded: list[Any] = []

    def load(*_: Any) -> Any:
        loaded.append([])
        return engine

    def reach(*_: Any) -> None:
        reachable.append(any(found is loaded[0] for found in gc.get_objects()))

    reachable: list[bool] = []
    monkeypatch.setattr(engine_process, "Heart", lambda *_, **__: None)
    monkeypatch.setattr(engine_process, "_load", load)
    monkeypatch.setattr(engine_process, "_step_until_closed", reach)
    monkeypatch.setattr(engine, "close", lambda: None, raising=False)
    pulse.send(messages.Start(EngineConfig(), False))
    try:
        engine_process.serve(pulse.client)
    finally:
        gc.unfreeze()
    assert reachable == [False]


def test_an_orphan_ends_itself(pulse: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()
    monkeypatch.setattr(client_connection, "ORPHAN_S", 0.05)
    Heart(pulse.client, gone.set)
    pulse.until_stalled(0, 0)
    assert not gone.is_set()
    pulse.close()
    assert gone.wait(60)


# --- the client ---


class Trial:
    """A client of stand-in engines."""

    def __init__(self, client: ProcessEngineClient) -> None:
        self.client = client
        self.failed = asyncio.Event()
        client.on_failure = self.failed.set

    async def ask(self, priority: int, text: str = "x?") -> None:
        params = SamplingParams(max_tokens=5)
        request = self.client.compiler.compile(text, params, priority=priority)
        async for _ in self.client.generate_request(request):
            pass

    async def answers(self, text: str = "x?") -> None:
        with pytest.raises(RequestFailedError, match=r"^answered$"):
            await self.ask(stand_in.ANSWER, text)

    async def dies(self, priority: int, match: str, text: str = "x?") -> None:
        with pytest.raises(EngineDeadError) as error:
            await self.ask(priority, text)
        assert match in str(error.value.__cause__)
        assert not self.client.healthy

    async def restarted(self) -> None:
        while not self.client.healthy:
            await asyncio.sleep(0.005)
            assert self.client.failure is None


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Trial], Awaitable[None]], Supervision, str], None]:
    monkeypatch.setattr(spawning, "PROCESS", "tests.engine.stand_in_engine")
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    monkeypatch.chdir(ROOT)
    loads = tmp_path / "loads"
    monkeypatch.setenv(stand_in.LOADS, str(loads))

    def run(test: Callable[[Trial], Awaitable[None]], limits: Supervision, text: str = "") -> None:
        loads.write_text(text)

        async def main() -> None:
            client = ProcessEngineClient(EngineConfig(), supervision=limits)
            await client.start()
            try:
                await asyncio.wait_for(test(Trial(client)), 120)
            finally:
                await client.shutdown()
            with pytest.raises(ProcessLookupError):
                os.kill(client.pid, 0)
            assert not client._streams and not client._numbers

        asyncio.run(main())

    return run


Run = Callable[..., None]


def test_another_engine_follows_a_dead_one(run: Run) -> None:
    async def test(trial: Trial) -> None:
        client = trial.client
        other = asyncio.ensure_future(trial.ask(stand_in.ENDLESS, "other?"))
        deaths = [
            (stand_in.KILLED, "SIGKILL (out of memory?"),
            (stand_in.FAILED, "the engine failed: Bug"),
            (stand_in.GARBAGE, "MessagePack data is malformed"),
        ]
        for i, (priority, cause) in enumerate(deaths):
            await trial.answers()
            pid = client.pid
            await trial.dies(priority, cause, f"{i}?")
            with pytest.raises(EngineDeadError, match="not running"):
                await trial.ask(stand_in.ANSWER)
            await trial.restarted()
            assert client.stats().num_restarts == i + 1 and client.pid != pid
        with pytest.raises(EngineDeadError):  # begun before the first death, and not sent again
            await other
        await trial.answers()
        with pytest.raises(RequestFailedError, match=r"^answered$"):  # live at one death only
            await trial.ask(stand_in.ANSWER, "other?")
        assert not trial.failed.is_set()

    run(test, Supervision(engine_restarts=3))


def test_a_request_that_was_live_at_two_deaths_is_not_run_again(run: Run) -> None:
    async def test(trial: Trial) -> None:
        for _ in range(2):
            await trial.dies(stand_in.KILLED, "SIGKILL", "poison?")
            await trial.restarted()
        with pytest.raises(RequestFailedError, match="two engines have died"):
            await trial.ask(stand_in.KILLED, "poison?")
        await trial.answers()
        assert trial.client.stats().num_restarts == 2

    run(test, Supervision(engine_restarts=5))


def test_restarts_are_limited(run: Run) -> None:
    async def test(trial: Trial) -> None:
        await trial.dies(stand_in.KILLED, "SIGKILL")
        await trial.failed.wait()
        assert not trial.client.healthy and "SIGKILL" in str(trial.client.failure)

    run(test, Supervision(engine_restarts=0))


def test_loads_that_fail_count_as_restarts(run: Run) -> None:
    async def test(trial: Trial) -> None:
        await trial.dies(stand_in.KILLED, "SIGKILL")
        await trial.restarted()
        assert trial.client.stats().num_restarts == 1
        await trial.dies(stand_in.KILLED, "SIGKILL", "another?")
        await trial.failed.wait()
        assert trial.client.failure is not None

    run(test, Supervision(engine_restarts=3), "works fails fails works")


def test_shutdown_ends_an_engine_that_loads(run: Run) -> None:
    async def test(trial: Trial) -> None:
        pid = trial.client.pid
        await trial.dies(stand_in.KILLED, "SIGKILL")
        while trial.client.pid == pid:
            await asyncio.sleep(0.005)

    run(test, Supervision(engine_restarts=1), "works hangs")


def test_a_frozen_engine_ends_its_streams(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(trial: Trial) -> None:
        await trial.answers()
        os.kill(trial.client.pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(trial.dies(stand_in.ENDLESS, "frozen: no heartbeat for 30"))
        monkeypatch.setattr(process_client, "TICK_S", 0.001)
        await asking
        monkeypatch.undo()
        await trial.failed.wait()

    run(test, Supervision(engine_restarts=0))


def test_a_step_that_hangs_ends_its_streams(run: Run) -> None:
    async def test(trial: Trial) -> None:
        await trial.dies(stand_in.STALLED, "hangs: no step was completed for 10000 s")
        await trial.failed.wait()

    run(test, Supervision(engine_restarts=0))


def test_a_first_load_that_fails_is_an_error(run: Run) -> None:
    async def test(_: Trial) -> None:
        raise AssertionError

    with pytest.raises(ModelError, match="no such model"):
        run(test, Supervision(engine_restarts=3), "fails")
