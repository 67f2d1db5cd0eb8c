"""An exception at any point of a call of LLMEngine leaves an engine that goes on as if the call had
only been late: the same tokens, no event lost or repeated, nothing leaked. At most one request
fails: the one whose output was being processed."""

import dis
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import s1engine
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.recovery import Call
from s1engine.errors import RequestFailedError
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

FOLDER = str(Path(s1engine.__file__).parent)
CHAT = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
OTHER = [{"role": "user", "content": "x=2 y=x*x y?"}]
GRAMMAR = '{"grammars":[{"lark_grammar":"start: /[0-9]{1,3}/"}]}'
BRANCHING = ThinkingBudget(max_tokens=9, checkpoints=(0, 3), num_waits=1)
ASKED: dict[str, tuple[Any, SamplingParams, bool]] = {
    "plain": (CHAT, SamplingParams(temperature=0, max_tokens=12), True),
    "samples": (
        OTHER,
        SamplingParams(temperature=1, seed=5, n=2, max_tokens=9, logprobs=2, presence_penalty=1.5),
        True,
    ),
    "branches": (CHAT, SamplingParams(temperature=0, max_tokens=30, thinking=BRANCHING), True),
    "stopped": (OTHER, SamplingParams(temperature=0, max_tokens=20, stop=("y", "\n")), False),
    "grammar": (
        OTHER,
        SamplingParams(
            temperature=1, seed=2, max_tokens=14, grammar=GRAMMAR,
            thinking=ThinkingBudget(max_tokens=2),
        ),
        False,
    ),
}  # fmt: skip


class Interrupter:
    """Raises KeyboardInterrupt in the package at the ``at``-th point where Python would: after a
    call, at the beginning of a function, at the end of a loop's body. Counts the points."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._last: dict[FrameType, int] = {}
        self.count = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            code, last = frame.f_code.co_code, self._last.get(frame)
            self._last[frame] = frame.f_lasti
            before = "RESUME" if last is None else dis.opname[code[last]]
            if before.startswith(("CALL", "RESUME", "JUMP_BACKWARD")):
                self.count += 1
                if self.count == self._at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
        elif event == "return":
            self._last.pop(frame, None)
        return self

    def during(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Calls. Returns whether it was interrupted, else the result."""
        sys.settrace(self)
        try:
            return False, call()
        except KeyboardInterrupt:
            return True, None
        finally:
            sys.settrace(None)


class Session:
    """Requests of one engine, and the events that arrive."""

    def __init__(self, engine: LLMEngine, names: list[str]) -> None:
        self.engine = engine
        self.events: dict[str, list[Any]] = {name: [] for name in names}
        self.requests = {
            name: engine.make_request(
                ASKED[name][0], ASKED[name][1], request_id=name, stream=ASKED[name][2]
            )
            for name in names
        }

    def add(self, name: str) -> None:
        self.engine.add_request(self.requests[name])

    def keep(self, events: Any) -> None:
        for name, event in events or ():
            self.events[name].append(event)

    def run(self) -> None:
        while self.engine.has_unfinished:
            self.keep(self.engine.step())

    def check(self, wanted: dict[str, Any], *, may_fail: bool) -> None:
        failed = 0
        for name, events in self.events.items():
            *before, last = events
            assert not any(isinstance(e, RequestOutput | Exception) for e in before), name
            if isinstance(last, RequestFailedError):
                failed += 1
                continue
            assert summary(last) == wanted[name], name
            chunks = [e for e in before if isinstance(e, Chunk)]
            for sample in last.outputs if ASKED[name][2] else ():
                own = [chunk for chunk in chunks if chunk.index == sample.index]
                assert [t for chunk in own for t in chunk.token_ids] == sample.token_ids
                assert "".join(chunk.text for chunk in own) == sample.text
            seen = [e.budget for e in before if isinstance(e, CheckpointOutput)]
            assert not ASKED[name][2] or sorted(seen) == [c.budget for c in last.checkpoints]
        assert failed <= may_fail
        check_empty(self.engine)


def check_empty(engine: LLMEngine) -> None:
    engine.scheduler.check_integrity()
    assert engine.scheduler.stats().num_free_blocks == engine.runner.num_blocks
    assert not engine.scheduler.has_unfinished()
    assert not engine._live_requests and not engine._sequences
    assert not engine._output_processor._builders and not engine._output_processor._with_grammar
    assert not engine._pending_grammars and not engine._failures.failing


def summary(output: RequestOutput) -> Any:
    return output.outputs, output.checkpoints


@pytest.fixture(scope="module", params=[1, 4], ids=["single-step", "multi-step"])
def engine(request: pytest.FixtureRequest) -> LLMEngine:
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 6, "device": "cpu"}
    return LLMEngine(
        EngineConfig(
            **options, max_num_batched_tokens=24, run_ahead=request.param, max_model_len=256
        )
    )


@pytest.fixture(scope="module")
def wanted(engine: LLMEngine) -> dict[str, Any]:
    session = Session(engine, list(ASKED))
    for name in ASKED:
        session.add(name)
    session.run()
    return {name: summary(events[-1]) for name, events in session.events.items()}


def step_interrupted(
    engine: LLMEngine, wanted: dict[str, Any], names: list[str], step: int, at: int
) -> bool:
    """Interrupts one step. False if it has fewer points."""
    session = Session(engine, names)
    for name in names:
        session.add(name)
    for _ in range(step):
        session.keep(engine.step())
    interrupted, events = Interrupter(at).during(engine.step)
    session.keep(events)
    session.run()
    session.check(wanted, may_fail=interrupted)
    return interrupted


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(list(ASKED)), min_size=1, unique=True),
    step=st.integers(0, 24),
    at=st.integers(1, 400),
)
def test_an_interrupted_step(
    engine: LLMEngine, wanted: dict[str, Any], names: list[str], step: int, at: int
) -> None:
    step_interrupted(engine, wanted, names, step, at)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(ASKED)), st.integers(0, 9), st.integers(1, 200))
def test_an_interrupted_add_adds_nothing(
    engine: LLMEngine, wanted: dict[str, Any], name: str, step: int, at: int
) -> None:
    """And the same id may be added again."""
    session = Session(engine, list(ASKED))
    for other in ASKED:
        if other != name:
            session.add(other)
    for _ in range(step):
        session.keep(engine.step())
    if Interrupter(at).during(lambda: session.add(name))[0]:
        if engine._call is Call.NONE:  # before its first statement, or after its last one
            engine.abort(name)
        session.keep(engine.step())
        assert not session.events[name]
        session.add(name)
    session.run()
    session.check(wanted, may_fail=False)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(ASKED)), st.integers(0, 9), st.integers(1, 400))
def test_an_interrupted_abort_may_be_repeated(
    engine: LLMEngine, wanted: dict[str, Any], name: str, step: int, at: int
) -> None:
    session = Session(engine, list(ASKED))
    for other in ASKED:
        session.add(other)
    for _ in range(step):
        session.keep(engine.step())
    if Interrupter(at).during(lambda: engine.abort(name))[0]:
        engine.abort(name)  # if the first had not begun
    ended = bool(session.events[name]) and isinstance(session.events[name][-1], RequestOutput)
    session.run()
    if not ended:
        assert not any(isinstance(e, RequestOutput | Exception) for e in session.events.pop(name))
    session.check(wanted, may_fail=False)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=4))
def test_a_recovery_may_be_interrupted_too(
    engine: LLMEngine, wanted: dict[str, Any], points: list[int]
) -> None:
    names = ["plain", "branches", "grammar"]
    session = Session(engine, names)
    for name in names:
        session.add(name)
    session.keep(engine.step())
    for at in points:
        session.keep(Interrupter(at).during(engine.step)[1])
    session.run()
    failed = [e for events in session.events.values() for e in events if isinstance(e, Exception)]
    assert len(failed) <= len(points)
    check_empty(engine)
    for name, events in session.events.items():
        if not isinstance(events[-1], Exception):
            assert summary(events[-1]) == wanted[name]


def test_an_error_of_the_device_costs_a_step(
    engine: LLMEngine, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any exception is as an interrupt: here, memory that lacks for some steps."""
    session = Session(engine, list(ASKED))
    for name in ASKED:
        session.add(name)
    for _ in range(4):
        session.keep(engine.step())
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> Any:
            raise MemoryError

        patch.setattr(engine.runner, "execute", fail)
        patch.setattr(engine.runner, "decode_loop", None)
        patch.setattr(engine.runner, "collect", fail)
        for _ in range(3):
            with pytest.raises(MemoryError):
                engine.step()
    session.run()
    session.check(wanted, may_fail=False)
