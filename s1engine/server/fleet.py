"""Replicas of the engine on Ray Serve.

Ray Serve places the replicas, watches and replaces them, scales their number, and routes calls; the
front makes those calls over a deployment handle in its own process, so Ray's HTTP proxies are not
started. The proxies' router cannot see a request's body, hence no affinity by prefix; a stream
would pass one process more; and SIGTERM, keys, health and errors would not be the single server's.

Answers travel by gRPC, by value (``_by_reference=False``), not through the object store: measured
on two cores, 16 streams at once, 126 us an item instead of 478 us. Ray's end reads a call without
waiting for the client, so a slow one holds at most its own answer here.
"""

import asyncio
import logging
import uuid
import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from s1engine.config import check_int
from s1engine.engine.ray_address import check_syntax
from s1engine.engine.ray_cluster import connect, resources
from s1engine.errors import EngineDeadError, RequestError
from s1engine.server.affinity import Trail
from s1engine.server.replica import Message, Replica, ReplicaLostError, ReplicaOptions

POLL_S = 1.0
GONE_POLLS = 10  # without an answer from Ray, after which it is taken to be gone
STARTS = 2  # tries of a replica to load the model
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
BROADCAST_S = 10.0  # for all replicas to say something
DRAIN_S = 3600.0  # for a replica that is scaled away to finish its requests
# When their number follows the load: Ray's own figures are 10, 30 and 30 s, so that a queue had to
# last for most of a minute.
METRICS_S = 1.0  # between two reports of what is under way, by the front and by each replica
LOOK_BACK_S = 4.0  # over which reports are averaged
UPSCALE_S = 2.0  # that more replicas must be wanted without a break
DOWNSCALE_S = 300.0  # the same for fewer: loading a model anew costs more than keeping it
NAME = "Replica"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetOptions:
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


class RayFleet:
    """A fleet (see ``front``). The constructor starts the replicas and waits until the first
    ``min_replicas`` have loaded the model; ``on_failure`` is called when Ray itself is gone.

    Raises RequestError if Ray is missing, EngineDeadError if the replicas cannot start.
    """

    def __init__(self, options: FleetOptions, replica: ReplicaOptions) -> None:
        ray = connect(options.address, options.max_replicas)
        from ray import serve

        self.on_failure: Callable[[], None] = lambda: None
        self.failure: EngineDeadError | None = None
        self.up = 0
        self.wanted = options.min_replicas
        self._local = options.address is None
        self._name = f"s1engine-{uuid.uuid4().hex[:8]}"
        try:
            serve.start(proxy_location="Disabled", logging_config=_quiet())
            needs = resources(ray, options.address, options.max_replicas, replica.config)
            deployment = _deployment(options, replica, needs)
            handle = serve.run(deployment.bind(replica), name=self._name, route_prefix=None)
        except BaseException as error:
            ray.shutdown()
            if isinstance(error, RuntimeError):
                raise EngineDeadError(f"the replicas could not start: {error}") from error
            raise
        self._handle = handle.options(_by_reference=False)
        self._refresh()

    async def start(self) -> None:
        """Begins to watch."""
        self._watcher = asyncio.ensure_future(self._watch())

    async def shutdown(self) -> None:
        """Ends the replicas, and Ray if it was started for them."""
        self._watcher.cancel()
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
                await asyncio.to_thread(self._refresh)
                failures = 0
            except Exception as error:
                logger.warning("Ray does not say how the replicas are: %s", error)
                self.up = 0
                failures += 1
        self.failure = EngineDeadError("Ray is gone")
        self.on_failure()

    def _refresh(self) -> None:
        """Counts the replicas, as Ray sees them."""
        from ray import serve

        application = serve.status().applications[self._name]
        deployment = application.deployments[NAME]
        states = {str(getattr(k, "value", k)): n for k, n in deployment.replica_states.items()}
        self.up = states.get("RUNNING", 0)
        self.wanted = sum(states.values())

    # --- what the front asks ---

    async def answer(
        self, scope: Message, body: bytes, way: Trail, avoid: Sequence[str]
    ) -> AsyncGenerator[list[Message], None]:
        """Messages of the answer, from whichever replica the router sends it to."""
        from ray.exceptions import RayError

        call: Any = self._handle.options(stream=True).answer.remote(
            scope, body, way=way, avoid=list(avoid)
        )
        try:
            async for messages in call:
                yield messages
        except ReplicaLostError:
            raise
        except RayError as error:
            logger.warning("a replica was lost: %s", error)
            raise ReplicaLostError from error
        finally:
            call.cancel()

    async def metrics(self) -> list[tuple[str, bytes]]:
        """Of each replica that answers."""
        return await self._broadcast("metrics")

    async def end_thinking(self, name: str) -> bool:
        """Asks all of them."""
        return any(await self._broadcast("end_thinking", name))

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        found = await self._handle.broadcast(method, *args).results_async(
            timeout_s=BROADCAST_S, return_exceptions=True
        )
        return [result for result in found if not isinstance(result, BaseException)]


def _quiet() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _deployment(options: FleetOptions, replica: ReplicaOptions, needs: dict[str, int]) -> Any:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    scale: dict[str, Any] = {"num_replicas": options.min_replicas}
    if options.max_replicas > options.min_replicas:
        scale = {"autoscaling_config": _autoscaling(options, replica.config.max_num_seqs)}
    named: dict[str, Any] = {"request_router_class": "s1engine.server.prefix_router.PrefixRouter"}
    router = RequestRouterConfig(**named)
    inside = replica.config.max_num_seqs + replica.max_queued
    return serve.deployment(
        Replica,
        name=NAME,
        max_ongoing_requests=inside + 64,  # the replica itself refuses what is too much
        request_router_config=router,
        ray_actor_options=needs,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=_quiet(),
        max_constructor_retry_count=STARTS,
        **scale,
    )


def _autoscaling(options: FleetOptions, target: int) -> Any:
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
            policy=policy(policy_function="s1engine.server.scaling:by_queue"),
        )
