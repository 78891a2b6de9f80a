"""Ray Serve's request router that follows `routing.Chooser`; it lives wherever there is a handle to the replicas."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from manyheads.scale import heard
from manyheads.scale.routing import Chooser, Route
from manyheads.stats import EngineStats

T = TypeVar("T")
STATS, MENDED = "stats", "mended"
"""Keys of what a replica says of itself (`Replica.record_routing_stats`)."""


class PrefixRouter(RequestRouter):
    """Serve asks it for each request, and tells it where that has gone."""

    def initialize_state(self, **settings: Any) -> None:
        """Settings: those of `Chooser`."""
        self._chooser = Chooser(**settings)
        self._open: dict[ReplicaID, int] = {}  # requests that went from here and have not ended

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred ones first."""
        there = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {replica_id: self._load(replica_id) for replica_id in there}
        route = _route(pending_request) or Route.of([])
        return [[there[replica_id] for replica_id in rank] for rank in self._chooser.ranked(route, loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A request has gone to a replica."""
        self._open[replica_id] = self._open.get(replica_id, 0) + 1
        if (route := _route(pending_request)) is not None:
            self._chooser.sent(route, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended."""
        self._open[replica_id] = max(0, self._open.get(replica_id, 0) - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas have come, gone, or said something."""
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        if gone := self._open.keys() - there:
            self._chooser.prefixes.keep(set(there))
            for replica_id in gone:
                del self._open[replica_id]
        # NOTE: Serve copies this file's names into other processes; what they share with others there stands in modules
        said = {replica.replica_id.unique_id: replica.routing_stats for replica in replicas}
        heard.by_replica = {name: _read(stats.get(STATS), EngineStats) for name, stats in said.items()}
        mended = {name: _read(stats[MENDED], heard.Mended) for name, stats in said.items() if MENDED in stats}
        heard.mended = heard.mended | mended

    def _load(self, replica_id: ReplicaID) -> float:
        """Requests of a replica: what it said lately, or what went there from here if that is more."""
        return max(self.replica_queue_len_cache.get(replica_id) or 0, self._open.get(replica_id, 0))


def _read(said: bytes | None, kind: type[T]) -> T:
    return kind() if said is None else msgspec.msgpack.decode(said, type=kind)


def _route(pending: PendingRequest | None) -> Route | None:
    """What a request says of itself; None for calls that are not requests for text."""
    if pending is None or len(pending.args) < 2 or not isinstance(pending.args[1], Route):
        return None
    return pending.args[1]
