"""One replica: the server's whole application over an engine of its own, on an HTTP port.

Ray Serve starts it, checks its health and ends it; requests come from the router over HTTP, not
through Ray. Knows nothing of Ray but the name and the address that it has there.
"""

import asyncio
import contextlib
import gc
import ssl
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from s1engine.config import EngineConfig
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.engine.request import Request
from s1engine.engine.request_output import StreamEvent
from s1engine.engine.supervision import Supervision
from s1engine.errors import EngineDeadError
from s1engine.logs import configure_logging
from s1engine.server.admission import Admission, ClientLimits
from s1engine.server.app import create_app
from s1engine.server.buffer_budget import MAX_BUFFERED_BYTES
from s1engine.server.http_protocol import BoundedProtocol
from s1engine.server.middleware import MAX_BODY_BYTES
from s1engine.server.router.autoscaling import REQUESTS, RUNNING, WAITING
from s1engine.server.router.proxy import IDLE_CONNECTION_S, ReplicaAddress
from s1engine.server.router.replica_gate import ReplicaGate, current_response
from s1engine.server.router.tls import tls_files
from s1engine.server.serving import raise_open_file_limit
from s1engine.server.tracing import tracing_to

POLL_S = 0.1
CLOSE_S = 1  # that open connections get at the end


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """What every replica is started with."""

    config: EngineConfig
    supervision: Supervision
    limits: ClientLimits
    efforts: dict[str, int | None]
    timeout: float | None
    traces_endpoint: str | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    max_buffered_bytes: int = MAX_BUFFERED_BYTES
    private_prefixes: bool = False
    strict_fields: bool = False


class ReplicaEngine(ProcessEngineClient):
    """An engine that lets a response go once it has output for it."""

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        response = current_response.get()
        async with contextlib.aclosing(super().generate_request(request)) as events:
            async for event in events:
                if response is not None:
                    response.begun = True
                yield event


def create_server(app: ASGIApp, host: str) -> uvicorn.Server:
    """Return the HTTP server of a replica, on a free port of this address."""
    tls = tls_files()
    encryption: dict[str, Any] = {}
    if tls is not None:
        files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
        encryption = {**files, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    config = uvicorn.Config(
        app,
        host=host,
        port=0,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=int(2 * IDLE_CONNECTION_S),
        timeout_graceful_shutdown=CLOSE_S,
        **encryption,
    )
    return uvicorn.Server(config)


class Replica:
    """The deployment: Ray Serve calls its methods on an event loop of its own.

    The HTTP server and the engine's client have another loop, uvloop's, in a thread.
    """

    async def __init__(self, options: ReplicaOptions, token: str) -> None:  # type: ignore[misc]
        import ray
        from ray import serve

        configure_logging()
        raise_open_file_limit()
        name = serve.get_replica_context().replica_id.unique_id
        self._engine = await asyncio.to_thread(
            ReplicaEngine, options.config, supervision=options.supervision
        )
        endpoint = options.traces_endpoint
        app = create_app(
            self._engine,
            admission=Admission(options.limits),
            efforts=options.efforts,
            timeout=options.timeout,
            max_body_bytes=options.max_body_bytes,
            max_buffered_bytes=options.max_buffered_bytes,
            private_prefixes=options.private_prefixes,
            strict_fields=options.strict_fields,
            max_stored_bytes=0,  # another replica may get what refers to it
            tracing=None if endpoint is None else tracing_to(endpoint),
        )
        self._gate = ReplicaGate(app, token, lambda: self._engine.failure is not None)
        host = str(vars(ray.util)["get_node_ip_address"]())
        self._server = create_server(self._gate, host)
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise EngineDeadError("the replica's HTTP server could not start")
            await asyncio.sleep(POLL_S)
        gc.freeze()  # as DrainingServer
        port = int(self._server.servers[0].sockets[0].getsockname()[1])
        self._address = ReplicaAddress(name, host, port)

    async def __del__(self) -> None:
        """Finish the requests in flight and refuse new ones. Ray waits for it when it scales
        down."""
        self._gate.draining = True
        while self._gate.num_in_flight:
            await asyncio.sleep(POLL_S)
        self._server.should_exit = True
        await asyncio.to_thread(self._thread.join)

    async def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if not self._engine.healthy:
            raise RuntimeError("the engine is not running")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``autoscaling``; the name is Ray's."""
        stats = self._engine.stats()
        requests = self._gate.num_in_flight
        return {REQUESTS: requests, RUNNING: stats.num_running, WAITING: stats.num_waiting}

    async def address(self) -> ReplicaAddress | None:
        """Where routers reach it; None if it takes no requests."""
        return self._address if self._engine.healthy and not self._gate.draining else None
