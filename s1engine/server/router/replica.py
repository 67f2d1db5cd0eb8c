"""One replica: the server's whole application over an engine of its own, behind a door for fronts.

Ray Serve makes it, asks how it is, and ends it; requests come through the door, not through Ray.
Knows nothing of Ray but the name and the address that it has there.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from s1engine.config import EngineConfig
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.engine.request import Request
from s1engine.engine.request_output import StreamEvent
from s1engine.server.admission import Admission
from s1engine.server.app import create_app
from s1engine.server.door import Door, outbox
from s1engine.server.line import Place
from s1engine.server.router.autoscaling import REQUESTS, RUNNING, WAITING
from s1engine.server.tracing import tracing_to


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """What every replica is started with."""

    config: EngineConfig
    max_queued: int
    efforts: dict[str, int | None]
    timeout: float | None
    traces_endpoint: str | None = None


class ReplicaEngine(ProcessEngineClient):
    """An engine that tells a request's outbox when it has begun."""

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        said = outbox.get()
        async with contextlib.aclosing(super().generate_request(request)) as events:
            async for event in events:
                if said is not None:
                    said.begin()
                yield event


class Replica:
    """The deployment: Ray Serve calls its methods on one event loop."""

    async def __init__(self, options: ReplicaOptions) -> None:  # type: ignore[misc]
        import ray
        from ray import serve

        name = serve.get_replica_context().replica_id.unique_id
        self._engine = await asyncio.to_thread(ReplicaEngine, options.config)
        endpoint = options.traces_endpoint
        app = create_app(
            self._engine,
            admission=Admission(options.config.max_num_seqs + options.max_queued),
            efforts=options.efforts,
            timeout=options.timeout,
            tracing=None if endpoint is None else tracing_to(endpoint),
        )
        await self._engine.start()
        self._door = Door(app, lambda: self._engine.failure is not None, name)
        host = str(vars(ray.util)["get_node_ip_address"]())
        self._place = Place(name, host, await self._door.open(host), self._door.secret)

    async def __del__(self) -> None:
        """Ray waits for it when it scales down."""
        await self._door.close()

    async def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if not self._engine.healthy:
            raise RuntimeError("the engine is not running")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``scaling``; the name is Ray's."""
        stats = self._engine.stats()
        requests = self._door.under_way
        return {REQUESTS: requests, RUNNING: stats.num_running, WAITING: stats.num_waiting}

    async def place(self) -> Place:
        """For fronts."""
        return self._place
