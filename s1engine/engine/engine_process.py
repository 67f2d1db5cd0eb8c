"""The process that owns the model: ``python -m s1engine.engine.engine_process FD``.

FD is its end of a socket pair, so no other process can talk to it. It steps; between steps it
receives requests and sends each step's output in one frame. It makes no text, waits for no reader,
and ends when the other end closes. A thread of its own sends heartbeats, so that a frozen process
and a step that hangs are told apart.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time

from s1engine.config import EngineConfig
from s1engine.engine import messages
from s1engine.engine.client_connection import ClientConnection, Heart
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import EngineDeadError, ModelError, RequestError
from s1engine.logs import configure_logging, detach_output

STATS_S = 1.0

logger = logging.getLogger(__name__)


def serve(client: ClientConnection) -> None:
    """Loads the model of the first message, then serves requests until the client closes."""
    heart = Heart(client, on_orphaned=lambda: os._exit(1))  # in the midst of a step or a load
    pending: list[messages.ToEngine] = []
    while not pending:
        pending = client.receive(timeout=STATS_S)
    start, *pending = pending
    assert isinstance(start, messages.Start)
    engine = _load(client, start.config, start.progress)
    if engine is None:
        return
    gc.freeze()  # a full collection would visit all modules and the model, in the midst of steps
    client.send(messages.Ready(engine.max_model_len, engine.config.device, engine.stats()))
    logger.debug("engine ready on %s", engine.config.device)
    try:
        _step_until_closed(client, engine, pending, heart)
    except ConnectionError:
        raise
    except EngineDeadError as error:
        logger.error("%s; no further request can be served", error)
        client.send_last(messages.EngineDied(str(error)))
        raise SystemExit(1) from error
    except Exception as error:
        logger.exception("the engine failed; no further request can be served")
        client.send_last(messages.EngineDied(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    finally:
        engine.close()


def _load(client: ClientConnection, config: EngineConfig, progress: bool) -> LLMEngine | None:
    try:
        configure_logging()
        return LLMEngine(config, progress=progress, detokenize=False)
    except (ModelError, RequestError) as error:
        param = error.param if isinstance(error, RequestError) else None
        client.send_last(messages.LoadFailed(str(error), param, isinstance(error, ModelError)))
        return None
    except Exception as error:
        logger.exception("the engine could not be loaded")
        client.send_last(messages.EngineDied(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error


def _step_until_closed(
    client: ClientConnection, engine: LLMEngine, pending: list[messages.ToEngine], heart: Heart
) -> None:
    next_stats, idle = time.monotonic(), True
    while True:
        heart.working = True
        for message in pending:
            _apply(client, engine, message)
        outputs = None if client.congested else engine.step_core()
        if outputs is not None:
            heart.completed += 1
            client.send(messages.Outputs(outputs))
        for request, failure in engine.collect_failures():
            client.send(messages.RequestFailed(request.number, str(failure)))
        now = time.monotonic()
        was_idle, idle = idle, not engine.has_unfinished
        if now >= next_stats or idle > was_idle:
            client.send(messages.StatsReport(engine.stats()))
            next_stats = now + STATS_S
        heart.working = engine.has_unfinished and not client.congested
        pending = client.receive(0 if heart.working else max(next_stats - now, 0))


def _apply(client: ClientConnection, engine: LLMEngine, message: messages.ToEngine) -> None:
    match message:
        case messages.AddRequest(request):
            try:
                engine.add_request(request)
            except EngineDeadError:
                raise
            except Exception as error:  # it has added nothing, and harms no other request
                logger.exception("request %s cannot be added", request.request_id)
                reason = f"the engine could not add this request: {error!r}"
                client.send(messages.RequestFailed(request.number, reason))
        case messages.AbortRequest(request_id):
            engine.abort(request_id)
        case messages.EndThinking(request_id):
            engine.end_thinking(request_id)


def main() -> None:
    """Serves on the file descriptor in the arguments, until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    detach_output()
    connection = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(ConnectionError):  # the client and its requests are gone
        serve(ClientConnection(connection))
    logger.debug("engine process ends")


if __name__ == "__main__":
    main()
