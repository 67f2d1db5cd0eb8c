"""The sync face: any thread generates, streams and cancels; each caller gets the events of its own
requests, and no way of leaving harms another."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine.llm import LLM
from s1engine.engine.request_stream import RequestStream
from s1engine.errors import EngineDeadError, RequestError
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput
from s1engine.sampling_params import SamplingParams

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": text}] for text in ("a=3 b=a+4 c=b*2 c?", "x=2 y=x*x y?", "z=1 z?")
]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
ENDLESS = SamplingParams(temperature=1, max_tokens=1500, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def own() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(own: LLM) -> list[CompletionOutput]:
    return [own.chat(chat, GREEDY)[0].outputs[0] for chat in CHATS]


def check_idle(llm: LLM) -> None:
    """No request is left once those that were cancelled are gone."""
    assert not llm.call(lambda engine: engine.has_unfinished)
    assert llm.stats().num_free_blocks == llm.stats().num_blocks
    llm.call(lambda engine: engine.scheduler.check_integrity())


class Reader:
    """One stream, and what it has given."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.events: list[Any] = []

    def pull(self) -> bool:
        event = next(self.stream, None)
        if event is not None:
            self.events.append(event)
        return event is not None

    def check(self, wanted: CompletionOutput) -> None:
        while self.pull():
            pass
        *chunks, output = self.events
        assert isinstance(output, RequestOutput) and output.outputs == [wanted]
        assert all(isinstance(chunk, Chunk) for chunk in chunks)
        assert [t for chunk in chunks for t in chunk.token_ids] == wanted.token_ids
        assert "".join(chunk.text for chunk in chunks) == wanted.text


@settings(max_examples=15, deadline=None)
@given(
    asked=st.lists(st.integers(0, 2), min_size=2, max_size=4),
    turns=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("pppppgad")), max_size=60),
)
def test_streams_by_turns_give_what_each_gives_alone(
    own: LLM, alone: list[CompletionOutput], asked: list[int], turns: list[tuple[int, str]]
) -> None:
    """Pulled in any order, with generate() between, and others that are closed or dropped."""
    readers = {i: Reader(own.stream_chat(CHATS[chat], GREEDY)) for i, chat in enumerate(asked)}
    for number, action in turns:
        reader = readers.get(number % len(asked))
        if action == "g":
            assert own.chat(CHATS[number % 3], GREEDY)[0].outputs == [alone[number % 3]]
        elif reader is not None and action == "p":
            reader.pull()
        elif reader is not None and action == "a":
            readers.pop(number % len(asked)).stream.close()
        elif reader is not None:
            del readers[number % len(asked)], reader  # dropped without a word
    for i, reader in readers.items():
        reader.check(alone[asked[i]])
    reader = None
    gc.collect()
    check_idle(own)


def test_many_threads_at_once(own: LLM, alone: list[CompletionOutput]) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(6)

    def work(number: int) -> None:
        try:
            start.wait(60)
            for turn in range(6):
                chat = (number + turn) % 3
                match (number + turn) % 4:
                    case 0:
                        assert own.chat(CHATS[chat], GREEDY)[0].outputs == [alone[chat]]
                    case 1:
                        Reader(own.stream_chat(CHATS[chat], GREEDY)).check(alone[chat])
                    case 2:
                        with own.stream_chat(CHATS[chat], ENDLESS) as stream:
                            next(stream)
                    case 3:
                        with own.stream_chat(CHATS[chat], ENDLESS) as stream:
                            next(stream)
                            assert own.cancel(stream.request_id)
                            *_, last = stream
                            assert isinstance(last, RequestOutput)
                            assert last.outputs[0].finish_reason == "abort"
                            assert not own.cancel(stream.request_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads)
    check_idle(own)


def test_another_thread_cancels_and_ends_thinking(own: LLM) -> None:
    """A cancelled call returns what it has so far."""
    request = own.make_request(CHATS[0], ENDLESS, stream=True)
    seen = threading.Event()
    cancelled: list[bool] = []

    def cancel() -> None:
        seen.wait(60)
        own.end_thinking(request.request_id)
        cancelled.append(own.cancel(request.request_id))

    thread = threading.Thread(target=cancel)
    thread.start()
    (output,) = own.generate_requests([request], on_chunk=lambda *_: seen.set())
    thread.join()
    assert cancelled == [True] and output.outputs[0].finish_reason == "abort"
    assert not own.cancel("no such request") and not own.end_thinking("no such request")
    check_idle(own)


def test_callbacks_run_in_the_callers_thread_and_may_raise(
    own: LLM, alone: list[CompletionOutput]
) -> None:
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    threads = set()

    def note(index: int, chunk: Any) -> None:
        threads.add(threading.current_thread())
        tokens[index] += chunk.token_ids

    outputs = own.chat(CHATS, GREEDY, on_chunk=note)
    assert [output.outputs[0] for output in outputs] == alone
    assert [tokens[i] for i in range(3)] == [output.token_ids for output in alone]
    assert threads == {threading.current_thread()}

    def fail(index: int, chunk: Any) -> None:
        raise KeyError("of the user")

    other = own.stream_chat(CHATS[1], GREEDY)
    with pytest.raises(KeyError, match="of the user"):
        own.chat(CHATS, ENDLESS, on_chunk=fail)
    Reader(other).check(alone[1])
    check_idle(own)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need it"
)
@pytest.mark.parametrize("how", ["generate", "stream", "call"])
def test_an_interrupt_ends_the_wait_and_its_requests(
    own: LLM, alone: list[CompletionOutput], how: str
) -> None:
    other = own.stream_chat(CHATS[2], GREEDY)
    release = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(_: Any) -> None:
        signal.pthread_kill(main, signal.SIGINT)  # while the main thread waits
        if how == "call":
            release.wait(60)

    with pytest.raises(KeyboardInterrupt):
        if how == "generate":
            own.thread.call_async(interrupt)
            own.chat(CHATS, ENDLESS)
        elif how == "stream":
            with own.stream_chat(CHATS[0], ENDLESS) as stream:
                own.thread.call_async(interrupt)
                for _ in stream:
                    pass
        else:
            own.call(interrupt)
    release.set()
    Reader(other).check(alone[2])
    check_idle(own)


def test_a_live_id_is_refused_and_the_first_goes_on(
    own: LLM, alone: list[CompletionOutput]
) -> None:
    first = own.stream_chat(CHATS[0], GREEDY, request_id="same")
    for call in (
        lambda: own.chat(CHATS[1], GREEDY, request_id="same"),
        lambda: next(own.stream_chat(CHATS[1], GREEDY, request_id="same")),
        lambda: own.chat(CHATS[:2], GREEDY, request_id="twice"),
    ):
        with pytest.raises(RequestError, match="taken") as error:
            call()
        assert error.value.param == "request_id"
    Reader(first).check(alone[0])
    assert own.chat(CHATS[1], GREEDY, request_id="same")[0].outputs == [alone[1]]
    check_idle(own)


def test_a_mailbox_that_fails_loses_its_requests_alone(
    own: LLM, alone: list[CompletionOutput]
) -> None:
    from s1engine.engine.engine_thread import Submission

    def fail(mail: Any) -> None:
        raise RuntimeError("of the reader")

    own.thread.submit([Submission(own.make_request(CHATS[0], ENDLESS, stream=True), fail)])
    assert own.chat(CHATS[1], GREEDY)[0].outputs == [alone[1]]
    check_idle(own)


# --- its life ---


def step_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "s1engine-step"}


def test_close_frees_refuses_and_restarts() -> None:
    before = step_threads()
    with LLM(**OPTIONS) as llm:
        llm.start()  # runs already
        wanted = llm.chat(CHATS[0], GREEDY)[0].outputs
        waiting = llm.stream_chat(CHATS[0], ENDLESS)
        freed = weakref.ref(llm.engine)
    assert step_threads() == before
    with pytest.raises(EngineDeadError, match="closed"):
        for _ in waiting:
            pass
    gc.collect()
    assert freed() is None
    llm.close()
    for refused in (
        lambda: llm.chat(CHATS[0], GREEDY),
        lambda: llm.stream_chat(CHATS[0], GREEDY),
        lambda: llm.cancel("x"),
        lambda: llm.end_thinking("x"),
        lambda: llm.stats(),
        lambda: llm.engine,
        lambda: llm.call(lambda engine: None),
    ):
        with pytest.raises(EngineDeadError, match=r"start\(\)"):
            refused()
    with llm:
        assert llm.chat(CHATS[0], GREEDY)[0].outputs == wanted
        llm.engine.runner.execute = None  # type: ignore[method-assign, assignment]
        with pytest.raises(EngineDeadError, match="not callable"):
            llm.chat(CHATS[0], GREEDY)
        with pytest.raises(EngineDeadError, match="not callable"):
            llm.chat(CHATS[0], GREEDY)
        assert not llm.healthy and isinstance(llm.failure, TypeError)
        llm.start()
        assert llm.healthy and llm.chat(CHATS[0], GREEDY)[0].outputs == wanted


def test_the_garbage_collection_ends_its_thread() -> None:
    before = step_threads()
    llm = LLM(**OPTIONS)
    stream = llm.stream_chat(CHATS[0], ENDLESS)
    (thread,) = step_threads() - before
    del llm
    gc.collect()
    next(stream)  # keeps the engine alive
    assert thread.is_alive()
    del stream
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_forked_child_is_told(own: LLM) -> None:
    own.chat(CHATS[0], GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                own.chat(CHATS[0], GREEDY)
            except EngineDeadError as error:
                own.close()
                status = 0 if "fork" in str(error) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert own.chat(CHATS[0], GREEDY)


def test_the_interpreter_ends_cleanly_while_it_computes() -> None:
    program = (
        "from s1engine import LLM, SamplingParams\n"
        "llm = LLM(dtype='float32', device='cpu')\n"
        "stream = llm.stream('a=3', SamplingParams(max_tokens=1500, ignore_eos=True))\n"
        "print(len(next(stream).token_ids) > 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")
