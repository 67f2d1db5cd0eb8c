"""The process that owns the model: ``python -m s1engine.engine.engine_process FD``.

FD is its end of a socket pair, so no other process can speak to it. It steps, and between steps it
takes requests from the socket and puts each step's tokens there in one frame; it makes no text and
waits for nobody. It ends when the other end does.
"""

import contextlib
import logging
import select
import signal
import socket
import sys
import time

from s1engine.config import EngineConfig
from s1engine.engine import messages
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import EngineDeadError, ModelError, RequestError

BEAT_S = 1.0
MAX_UNSENT_BYTES = 2**26  # beyond, whoever should read has stopped reading, and steps pause
READ_BYTES = 2**18

logger = logging.getLogger(__name__)


class Channel:
    """The engine's end of the socket. Sending never blocks; ConnectionError: the other end left."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._reader = messages.FrameReader()
        self._unsent = bytearray()

    @property
    def congested(self) -> bool:
        """Is too much left to be sent?"""
        return len(self._unsent) > MAX_UNSENT_BYTES

    def send(self, message: messages.FromEngine) -> None:
        """Sends now what the socket takes, the rest with the next calls."""
        self._unsent += messages.encode_frame(message)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass

    def receive(self, timeout: float) -> list[messages.ToEngine]:
        """What has come in; waits up to ``timeout`` seconds for something to do."""
        wanted = [self._socket] if self._unsent else []
        readable, writable, _ = select.select([self._socket], wanted, [], timeout)
        if writable:
            self._flush()
        if not readable:
            return []
        data = self._socket.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the other end has left")
        return [messages.to_engine_decoder.decode(body) for body in self._reader.feed(data)]

    def finish(self, message: messages.FromEngine) -> None:
        """Sends a last message, and waits until it is out."""
        self._socket.setblocking(True)
        self._unsent += messages.encode_frame(message)
        self._socket.sendall(self._unsent)


def run(channel: Channel) -> None:
    """Loads what the first message says, then answers until the other end leaves."""
    waiting: list[messages.ToEngine] = []
    while not waiting:
        waiting = channel.receive(timeout=BEAT_S)
    start, *waiting = waiting
    assert isinstance(start, messages.Start)
    engine = _load(channel, start.config, start.progress)
    if engine is None:
        return
    channel.send(messages.Ready(engine.max_model_len, engine.config.device, engine.stats()))
    try:
        _serve(channel, engine, waiting)
    except ConnectionError:
        raise
    except EngineDeadError as error:
        logger.error("%s; no further request can be served", error)
        channel.finish(messages.EngineDied(str(error)))
        raise SystemExit(1) from error
    except Exception as error:
        logger.exception("the engine failed; no further request can be served")
        channel.finish(messages.EngineDied(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    finally:
        engine.close()


def _load(channel: Channel, config: EngineConfig, progress: bool) -> LLMEngine | None:
    try:
        return LLMEngine(config, progress=progress, detokenize=False)
    except (ModelError, RequestError) as error:
        param = error.param if isinstance(error, RequestError) else None
        channel.finish(messages.LoadFailed(str(error), param, isinstance(error, ModelError)))
        return None


def _serve(channel: Channel, engine: LLMEngine, waiting: list[messages.ToEngine]) -> None:
    next_beat, rests = time.monotonic(), True
    while True:
        for message in waiting:
            _obey(engine, message)
        step = None if channel.congested else engine.step_core()
        if step is not None:
            channel.send(messages.Outputs(step))
        for request, failure in engine.collect_failures():
            channel.send(messages.RequestFailed(request.number, str(failure)))
        now = time.monotonic()
        rested, rests = rests, not engine.has_unfinished
        if now >= next_beat or rests > rested:
            channel.send(messages.Heartbeat(engine.stats()))
            next_beat = now + BEAT_S
        busy = engine.has_unfinished and not channel.congested
        waiting = channel.receive(0 if busy else max(next_beat - now, 0))


def _obey(engine: LLMEngine, message: messages.ToEngine) -> None:
    match message:
        case messages.AddRequest(request):
            engine.add_request(request)
        case messages.AbortRequest(request_id):
            engine.abort(request_id)
        case messages.EndThinking(request_id):
            engine.end_thinking(request_id)


def main() -> None:
    """Serves on the file descriptor in the arguments; whoever started this decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    connection = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(ConnectionError):  # the server has left, and its requests with it
        run(Channel(connection))


if __name__ == "__main__":
    main()
