"""The replicas that the router can choose from.

Ray Serve places the replicas, watches and replaces them and scales their number. Requests do not
pass through it: the router asks Ray where each replica's HTTP server listens and connects to it. A
call of Ray takes milliseconds, and an item of its streams takes as long as several tokens. Ray's
own HTTP proxies cannot route by the prefix in a request's body, and with them SIGTERM, keys, health
and errors would differ from the single server's.

If Ray is started here, everything listens on this machine's loopback address, except for a port of
Ray Serve in each replica, which demands the cluster's token. In a cluster, Ray's ports are as its
nodes were started, and a replica listens on its node's address. A replica refuses requests without
the token of its pool; traffic is encrypted only with RAY_USE_TLS.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from http import HTTPStatus
from urllib.parse import quote

from starlette.types import Message

from s1engine.engine.ray_cluster import connect, resources
from s1engine.errors import EngineDeadError
from s1engine.server.router.affinity import PrefixHashes, PrefixMap
from s1engine.server.router.deployment import NAME, QUIET, ReplicaPoolOptions, create_deployment
from s1engine.server.router.proxy import (
    ForwardedRequest,
    ReplicaAddress,
    ReplicaClient,
    ReplicaLostError,
    open_session,
)
from s1engine.server.router.replica import ReplicaOptions
from s1engine.server.router.tls import tls_files
from s1engine.server.serving import raise_open_file_limit

POLL_S = 1.0
FIND_S = 30.0  # for the first running replica
GONE_POLLS = 10  # unanswered by Ray, after which Ray counts as gone
FETCH_S = 10.0  # for each replica to answer a request of the pool's own

logger = logging.getLogger(__name__)


class RayReplicaPool:
    """A ``ReplicaPool`` (see ``router``) on Ray Serve.

    The constructor starts the replicas and waits until the first ``min_replicas`` have loaded the
    model. ``on_failure`` is called when Ray itself is gone.

    Raises RequestError if Ray or a variable of TLS is missing, EngineDeadError if the replicas
    cannot start.
    """

    def __init__(self, options: ReplicaPoolOptions, replica: ReplicaOptions) -> None:
        self._tls = tls_files()
        ray = connect(options.address, options.max_replicas)
        from ray import serve

        self.on_failure: Callable[[], None] = lambda: None
        self.failure: EngineDeadError | None = None
        self.wanted = options.min_replicas
        self._local = options.address is None
        self._name = f"s1engine-{uuid.uuid4().hex[:8]}"
        self._token = secrets.token_hex(32)
        try:
            serve.start(proxy_location="Disabled", logging_config=QUIET)
            needs = resources(ray, options.address, options.max_replicas, replica.config)
            deployment = create_deployment(options, replica, needs)
            application = deployment.bind(replica, self._token)
            self._handle = serve.run(application, name=self._name, route_prefix=None)
        except BaseException as error:
            reason = self._start_failure(error) if isinstance(error, RuntimeError) else None
            ray.shutdown()
            if reason is not None:
                raise EngineDeadError(f"the replicas could not start: {reason}") from error
            raise
        self._replicas: dict[str, ReplicaClient] = {}  # by name
        self._prefixes = PrefixMap()

    def _start_failure(self, error: RuntimeError) -> str:
        """Return the error of ours that kept a replica from starting, or else Ray's."""
        from ray import serve

        application = serve.status().applications.get(self._name)
        deployment = application and application.deployments.get(NAME)
        message = deployment.message if deployment else ""
        own = re.findall(r"s1engine\.errors\.\w+: (.+)", message)
        return str(own[-1] if own else error)

    @property
    def up(self) -> int:
        """Replicas that take requests."""
        return len(self._open())

    def _open(self) -> list[ReplicaClient]:
        return [replica for replica in self._replicas.values() if not replica.closed]

    async def start(self) -> None:
        """Find the replicas and start to watch them. Raises EngineDeadError if there is none."""
        raise_open_file_limit()
        self._session = open_session(self._tls)
        try:
            async with asyncio.timeout(FIND_S):
                while not self.up:  # Ray's handle learns of them a moment after they run
                    await asyncio.sleep(0.1)
                    await self._refresh()
        except TimeoutError as error:
            raise EngineDeadError("the replicas cannot be reached") from error
        self._watcher = asyncio.ensure_future(self._watch())

    def end_requests(self) -> None:
        """Does nothing: replicas end their requests when they are stopped."""

    async def shutdown(self) -> None:
        """End the replicas, and Ray if it was started for them."""
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        await self._session.close()
        self._end_ray()  # in the main thread, where Ray restores its signal handlers

    def _end_ray(self) -> None:
        import ray
        from ray import serve

        if not self._local:
            serve.delete(self._name)
        ray.shutdown()

    # --- the list of replicas ---

    async def _watch(self) -> None:
        failures = 0
        while failures < GONE_POLLS:
            await asyncio.sleep(POLL_S)
            try:
                await self._refresh()
                failures = 0
            except Exception as error:
                logger.warning("Ray does not report on the replicas: %s", error)
                failures += 1
        self.failure = EngineDeadError("Ray is gone")
        self.on_failure()

    async def _refresh(self) -> None:
        """Ask Ray how many replicas there should be, and each running one for its address."""
        self.wanted = await asyncio.to_thread(self._count)
        results = await self._handle.broadcast("address").results_async(
            timeout_s=FETCH_S, return_exceptions=True
        )
        found = {result.name: result for result in results if isinstance(result, ReplicaAddress)}
        for name, address in found.items():
            if name not in self._replicas:
                logger.debug("replica %s listens on %s:%d", name, address.host, address.port)
                self._replicas[name] = ReplicaClient(
                    address, self._session, self._token, https=self._tls is not None
                )
            self._replicas[name].closed = False
        silent = [replica for replica in self._replicas.values() if replica.name not in found]
        await asyncio.gather(*map(self._check, silent))

    def _count(self) -> int:
        from ray import serve

        application = serve.status().applications[self._name]
        return sum(application.deployments[NAME].replica_states.values())

    async def _check(self, replica: ReplicaClient) -> None:
        """Close a replica unless it is healthy; Ray may only be slow. Drop it once it is idle."""
        status, _ = await _fetch(replica, "GET", "/health")
        replica.closed = status != HTTPStatus.OK
        if replica.closed and not replica.num_in_flight:
            logger.debug("replica %s is gone", replica.name)
            self._replicas.pop(replica.name, None)

    # --- requests ---

    async def forward(
        self, request: ForwardedRequest, hashes: PrefixHashes, avoid: Sequence[str]
    ) -> AsyncGenerator[Message, None]:
        """Yield the response of the replica that the prefix map ranks first.

        A replica to avoid is chosen only if there is no other. Raises ReplicaLostError.
        """
        replicas = self._open()
        candidates = [replica for replica in replicas if replica.name not in avoid] or replicas
        if not candidates:
            raise ReplicaLostError
        loads = {replica.name: replica.num_in_flight for replica in candidates}
        replica = self._replicas[self._prefixes.rank(hashes, loads)[0]]
        logger.debug("request %s goes to replica %s", request.request_id, replica.name)
        async with contextlib.aclosing(replica.forward(request)) as messages:
            async for message in messages:
                yield message

    async def metrics(self) -> list[tuple[str, bytes]]:
        """Return name and metrics of each replica that answers."""
        replicas = list(self._replicas.values())
        results = await self._fetch_all(replicas, "GET", "/metrics")
        return [
            (replica.name, body)
            for replica, (_, body) in zip(replicas, results, strict=True)
            if body
        ]

    async def end_thinking(self, request_id: str) -> bool:
        """Ask every replica to end a request's thinking; True if one of them runs it."""
        target = f"/v1/requests/{quote(request_id, safe='')}/end_thinking"
        results = await self._fetch_all(list(self._replicas.values()), "POST", target)
        return any(status == HTTPStatus.OK for status, _ in results)

    async def _fetch_all(
        self, replicas: Sequence[ReplicaClient], method: str, target: str
    ) -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(_fetch(replica, method, target) for replica in replicas))


async def _fetch(replica: ReplicaClient, method: str, target: str) -> tuple[int, bytes]:
    """Return status and body, (0, nothing) if the replica does not answer in time."""
    with contextlib.suppress(ReplicaLostError, TimeoutError):
        async with asyncio.timeout(FETCH_S):
            return await replica.fetch(method, target)
    return 0, b""
