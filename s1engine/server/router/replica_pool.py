"""Replicas of the engine on Ray Serve.

Ray Serve places the replicas, watches and replaces them and scales their number. Requests do not
pass through it: each replica has a door, Ray says where, and a line leads there from the front's
process. A call of Ray takes milliseconds, an item of its streams as long as several tokens; its
HTTP proxies could not see a request's body, hence no affinity by prefix, and SIGTERM, keys, health
and errors would not be the single server's.

Where Ray is started here, all that listens does so on this machine's own address, but for a port of
Serve in each replica, which answers only those who have the cluster's token. In a cluster, Ray's
ports are as its nodes were started, and a replica's door listens on the address of its node: what
is said there is not secret unless RAY_USE_TLS is set, but nobody is let in without the door's key.
"""

import asyncio
import contextlib
import logging
import re
import uuid
import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from s1engine.config import check_int
from s1engine.engine.ray_cluster import check_syntax, connect, resources
from s1engine.errors import EngineDeadError, RequestError
from s1engine.server.line import Line, Place, ReplicaLostError
from s1engine.server.router.affinity import PrefixHashes, PrefixMap
from s1engine.server.router.replica import Replica, ReplicaOptions
from s1engine.server.wire import Message

POLL_S = 1.0
FIND_S = 30.0  # for the first of replicas that run
GONE_POLLS = 10  # without an answer from Ray, after which it is taken to be gone
STARTS = 2  # tries of a replica to load the model
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
ASK_ALL_S = 10.0  # for all replicas to say something
DRAIN_S = 3600.0  # for a replica that is scaled away to finish its requests
# When their number follows the load: Ray's own figures are 10, 30 and 30 s, so that a queue had to
# last for most of a minute.
METRICS_S = 1.0  # between two reports of a replica on what is under way
LOOK_BACK_S = 4.0  # over which reports are averaged
UPSCALE_S = 2.0  # that more replicas must be wanted without a break
DOWNSCALE_S = 300.0  # the same for fewer: loading a model anew costs more than keeping it
NAME = "Replica"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPoolOptions:
    """How many replicas, and where."""

    min_replicas: int = 1
    max_replicas: int = 1
    """Above ``min_replicas``, their number follows the requests under way."""
    target: int | None = None
    """Requests under way for each replica; None: as many as one runs at once."""
    address: str | None = None
    """Of a Ray cluster that runs; None: one is started here, and ended with the fleet."""

    def __post_init__(self) -> None:
        check_int("min_replicas", self.min_replicas, 1, 4096)
        check_int("max_replicas", self.max_replicas, 1, 4096)
        if self.max_replicas < self.min_replicas:
            raise RequestError("max_replicas is below min_replicas", param="max_replicas")
        if self.target is not None:
            check_int("target_ongoing_requests", self.target, 1, 2**20)
        check_syntax(self.address)


class RayReplicaPool:
    """A fleet (see ``front``). The constructor starts the replicas and waits until the first
    ``min_replicas`` have loaded the model; ``on_failure`` is called when Ray itself is gone.

    Raises RequestError if Ray is missing, EngineDeadError if the replicas cannot start.
    """

    def __init__(self, options: ReplicaPoolOptions, replica: ReplicaOptions) -> None:
        ray = connect(options.address, options.max_replicas)
        from ray import serve

        self.on_failure: Callable[[], None] = lambda: None
        self.failure: EngineDeadError | None = None
        self.wanted = options.min_replicas
        self._local = options.address is None
        self._name = f"s1engine-{uuid.uuid4().hex[:8]}"
        try:
            serve.start(proxy_location="Disabled", logging_config=_quiet())
            needs = resources(ray, options.address, options.max_replicas, replica.config)
            deployment = _deployment(options, replica, needs)
            handle = serve.run(deployment.bind(replica), name=self._name, route_prefix=None)
        except BaseException as error:
            why = self._why(error) if isinstance(error, RuntimeError) else None
            ray.shutdown()
            if why is not None:
                raise EngineDeadError(f"the replicas could not start: {why}") from error
            raise
        self._handle = handle
        self._lines: dict[str, Line] = {}  # by name of the replica
        self._prefixes = PrefixMap()

    def _why(self, error: RuntimeError) -> str:
        """What a replica said when it could not start, if it was an error of ours."""
        from ray import serve

        application = serve.status().applications.get(self._name)
        deployment = application and application.deployments.get(NAME)
        said = re.findall(r"s1engine\.errors\.\w+: (.+)", deployment.message if deployment else "")
        return str(said[-1] if said else error)

    @property
    def up(self) -> int:
        """Replicas that take requests."""
        return sum(not line.closing for line in self._lines.values())

    async def start(self) -> None:
        """Finds the replicas, and begins to watch. Raises EngineDeadError if none is found."""
        try:
            async with asyncio.timeout(FIND_S):
                while not self._lines:  # Ray's handle hears of them a moment after they run
                    await asyncio.sleep(0.1)
                    await self._refresh()
        except TimeoutError as error:
            raise EngineDeadError("the replicas cannot be reached") from error
        self._watcher = asyncio.ensure_future(self._watch())

    async def shutdown(self) -> None:
        """Ends the replicas, and Ray if it was started for them."""
        self._watcher.cancel()
        for line in list(self._lines.values()):
            line.close()
        self._end()  # Ray wants its signals back, so in the main thread

    def _end(self) -> None:
        import ray
        from ray import serve

        if not self._local:
            serve.delete(self._name)
        ray.shutdown()

    async def _watch(self) -> None:
        failures = 0
        while failures < GONE_POLLS:
            await asyncio.sleep(POLL_S)
            try:
                await self._refresh()
                failures = 0
            except Exception as error:
                logger.warning("Ray does not say how the replicas are: %s", error)
                failures += 1
        self.failure = EngineDeadError("Ray is gone")
        self.on_failure()

    async def _refresh(self) -> None:
        """Asks Ray how many replicas there should be, and those that run where they are."""
        self.wanted = await asyncio.to_thread(self._count)
        places = await self._handle.broadcast("place").results_async(
            timeout_s=ASK_ALL_S, return_exceptions=True
        )
        new = [
            place for place in places if isinstance(place, Place) and place.name not in self._lines
        ]
        await asyncio.gather(*map(self._connect, new))

    def _count(self) -> int:
        from ray import serve

        application = serve.status().applications[self._name]
        return sum(application.deployments[NAME].replica_states.values())

    async def _connect(self, place: Place) -> None:
        line = Line(place, lambda: self._lines.pop(place.name, None))
        try:
            await line.connect()
        except OSError as error:
            logger.warning("a replica cannot be reached: %s", error)
        else:
            self._lines[place.name] = line

    # --- what the front asks ---

    async def answer(
        self, scope: Message, body: bytes, way: PrefixHashes, avoid: Sequence[str]
    ) -> AsyncGenerator[list[Message], None]:
        """Messages of the answer, from the replica that the prefix map chooses; one to avoid only
        if there is no other. Raises ReplicaLostError."""
        lines = [line for line in self._lines.values() if not line.closing]
        wanted = [line for line in lines if line.name not in avoid] or lines
        if not wanted:
            raise ReplicaLostError
        loads = {line.name: line.under_way for line in wanted}
        line = self._lines[self._prefixes.place(way, loads)[0]]
        async with contextlib.aclosing(line.answer(scope, body)) as answer:
            async for messages in answer:
                yield messages

    async def metrics(self) -> list[tuple[str, bytes]]:
        """Name and metrics of each replica that answers."""
        lines = list(self._lines.values())
        found = await self._ask_all(lines, "GET", "/metrics")
        return [(line.name, body) for line, (_, body) in zip(lines, found, strict=True) if body]

    async def end_thinking(self, name: str) -> bool:
        """Asks all of them."""
        path = f"/v1/requests/{name}/end_thinking"
        found = await self._ask_all(list(self._lines.values()), "POST", path)
        return any(status == HTTPStatus.OK for status, _ in found)

    async def _ask_all(
        self, lines: Sequence[Line], method: str, path: str
    ) -> list[tuple[int, bytes]]:
        """Status and body from each line, (0, nothing) where none came."""

        async def one(line: Line) -> tuple[int, bytes]:
            with contextlib.suppress(ReplicaLostError, TimeoutError):
                async with asyncio.timeout(ASK_ALL_S):
                    return await line.ask(method, path)
            return 0, b""

        return await asyncio.gather(*map(one, lines))


def _quiet() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _deployment(options: ReplicaPoolOptions, replica: ReplicaOptions, needs: dict[str, int]) -> Any:
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": options.min_replicas}
    if options.max_replicas > options.min_replicas:
        scale = {"autoscaling_config": _autoscaling(options, replica.config.max_num_seqs)}
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options=needs,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=_quiet(),
        max_constructor_retry_count=STARTS,
        **scale,
    )


def _autoscaling(options: ReplicaPoolOptions, target: int) -> Any:
    """Ray's configuration of ``scaling``."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    policy: Any = AutoscalingPolicy
    with warnings.catch_warnings():
        # The variables that it is to give way to are not read for handles yet.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target or target,
            metrics_interval_s=METRICS_S,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=UPSCALE_S,
            downscale_delay_s=DOWNSCALE_S,
            policy=policy(policy_function="s1engine.server.router.autoscaling:scale_by_queue"),
        )
