"""Ray Serve's request router, told by the prefix map where to send what.

It lives in the process that holds the deployment's handle, so it sees each call's arguments and
counts exactly what is under way. Ray pickles this module by value: it holds nothing else.
"""

import asyncio
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from s1engine.server.affinity import SLACK, PrefixMap


class PrefixRouter(RequestRouter):
    """Sends a call with arguments ``way`` (a trail) and ``avoid`` (names of replicas)."""

    def initialize_state(self, slack: int = SLACK) -> None:  # type: ignore[override]
        """Ray's constructor of what is ours; ``slack`` is the prefix map's."""
        self._prefixes = PrefixMap(slack=slack)
        self._under_way: Counter[str] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Every candidate, best first. Those to avoid come last."""
        await asyncio.sleep(0)  # lets what was chosen for others be sent, and so counted
        wanted: dict[str, Any] = pending_request.kwargs if pending_request else {}
        avoid = wanted.get("avoid", ())
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._under_way[name] for name in named if name not in avoid}
        ranked = self._prefixes.place(wanted.get("way", []), loads) if loads else []
        return [[named[name]] for name in (*ranked, *(name for name in named if name in avoid))]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Ray sends a request now."""
        super().on_send_request(replica_id)
        self._under_way[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request has ended, in whatever way."""
        super().on_request_completed(replica_id, internal_request_id)
        self._under_way[replica_id.unique_id] = max(self._under_way[replica_id.unique_id] - 1, 0)
