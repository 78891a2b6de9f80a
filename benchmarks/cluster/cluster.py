"""The clock of the simulation: arrivals, steps, deaths and replicas that come and go, in the order of time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from cluster.costs import StepCosts
from cluster.replica import Replica
from cluster.routing import Beginnings, Router
from cluster.traffic import Request


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Replicas are added and taken away by open requests, as Ray Serve does."""

    target: float
    """Open requests that a replica should have."""
    least: int
    most: int
    every: float = 10.0
    """Seconds between decisions."""
    up_after: float = 20.0
    down_after: float = 300.0
    """A decision must have been the same for so many seconds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is simulated."""

    replicas: int
    routing: str = "prefix unless busy"
    routers: int = 1
    sync_seconds: float = 0.0
    """Routers hear so often how many requests replicas have; 0 is always."""
    scaling: Scaling | None = None
    deaths: Sequence[float] = ()
    """At these times a replica that has requests dies; another starts at once."""
    notice_seconds: float = 1.0
    """So long after a death, its requests go elsewhere; until then, more are sent there."""
    seed: int = 0


@dataclass
class Outcome:
    """What came of it."""

    requests: list[Request]
    seconds: float
    """When the last request ended."""
    replica_seconds: float = 0.0
    """Of all replicas, from when they were asked for until they were gone."""
    busy_seconds: float = 0.0
    row_steps: int = 0
    """Rows, summed over steps."""
    most_replicas: int = 0
    moved: int = 0
    """Requests that went on elsewhere, each time counted."""
    open_seconds: float = 0.0
    """Integral of the open requests over time."""
    uneven: list[float] = field(default_factory=list)
    """At times, the open requests of the busiest replica against the mean."""


class Cluster:
    """A cluster runs requests through replicas to their ends."""

    def __init__(self, costs: StepCosts, plan: Plan, requests: list[Request]) -> None:
        self._costs, self._plan = costs, plan
        self._requests = requests
        self._chance = random.Random(plan.seed)
        self._beginnings = Beginnings()
        self._routers = [Router(plan.routing, self._beginnings, self._chance) for _ in range(plan.routers)]
        self._replicas = [Replica(costs, 0.0, 0.0) for _ in range(plan.replicas)]
        self._loads = np.zeros(plan.replicas)
        self._events: list[tuple[float, int, str, int, int]] = []
        self._numbers = count()
        self._open = 0
        self._now = 0.0
        self._heard = -1.0
        self._waiting: list[Request] = []
        """They find no replica that takes requests."""
        self._unnoticed: dict[int, list[Request]] = {}
        self._wish, self._wish_since = plan.replicas, 0.0
        self._outcome = Outcome(requests, 0.0, most_replicas=plan.replicas)

    def run(self) -> Outcome:
        """Simulate until every request has ended."""
        plan, outcome = self._plan, self._outcome
        for i, request in enumerate(self._requests):
            self._push(request.at + self._costs.overhead / 2, "arrival", i)
        for at in plan.deaths:
            self._push(at, "death")
        self._push(1.0, "look")
        if plan.scaling is not None:
            self._push(plan.scaling.every, "scale")
        left = len(self._requests)
        while left:
            at, _, kind, number, version = heapq.heappop(self._events)
            if kind == "step" and self._replicas[number].version != version:
                continue
            outcome.open_seconds += self._open * (at - self._now)
            self._now = at
            if kind == "arrival":
                self._open += 1
                self._send(self._requests[number])
            elif kind == "step":
                left -= self._step(number)
            else:
                getattr(self, f"_{kind}")(number)
        outcome.seconds = self._now
        for replica in self._replicas:
            if replica.alive:
                self._gone(replica)
        return outcome

    def _push(self, at: float, kind: str, number: int = 0, version: int = 0) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, number, version))

    def _there(self) -> list[int]:
        """Replicas that routers think take requests."""
        return [
            i
            for i, replica in enumerate(self._replicas)
            if (replica.alive or i in self._unnoticed) and not replica.draining and replica.ready <= self._now
        ]

    def _tell(self) -> None:
        """Routers hear how things are."""
        there, late = self._there(), self._plan.sync_seconds > 0
        for router in self._routers:
            router.look(there, self._loads.copy() if late else self._loads)
        self._heard = self._now if there else -1.0

    def _send(self, request: Request) -> None:
        if self._heard < 0 or self._now - self._heard >= self._plan.sync_seconds > 0:
            self._tell()
        if self._heard < 0:
            self._waiting.append(request)
            return
        router = self._chance.choice(self._routers)
        number = router.choose(request)
        self._loads[number] += 1
        if self._plan.sync_seconds:
            router.loads[number] += 1
        if number in self._unnoticed:
            self._unnoticed[number].append(request)
            return
        replica = self._replicas[number]
        self._expect(number, replica.add(request, self._now))

    def _expect(self, number: int, at: float | None) -> None:
        if at is not None:
            self._push(at, "step", number, self._replicas[number].version)

    def _step(self, number: int) -> int:
        replica = self._replicas[number]
        ended, at = replica.step(self._now)
        self._expect(number, at)
        self._open -= len(ended)
        self._loads[number] -= len(ended)
        if replica.draining and not replica.open:
            self._gone(replica)
        return len(ended)

    def _gone(self, replica: Replica) -> None:
        replica.alive = False
        self._outcome.replica_seconds += self._now - replica.started
        self._outcome.busy_seconds += replica.busy
        self._outcome.row_steps += replica.row_steps

    def _death(self, _: int) -> None:
        """A random replica with requests dies, and another is started."""
        able = [i for i, replica in enumerate(self._replicas) if replica.alive and replica.open]
        if not able:
            return
        number = self._chance.choice(able)
        lost = self._replicas[number].lose(self._now)
        self._gone(self._replicas[number])
        self._unnoticed[number] = lost
        self._push(self._now + self._plan.notice_seconds, "notice", number)
        self._start()

    def _notice(self, number: int) -> None:
        lost = self._unnoticed.pop(number)
        self._beginnings.forget(number)
        self._loads[number] = 0
        self._tell()
        self._outcome.moved += len(lost)
        for request in lost:
            request.moves += 1
            self._send(request)

    def _start(self) -> None:
        ready = self._now + self._costs.start_seconds
        self._replicas.append(Replica(self._costs, self._now, ready))
        self._loads = np.append(self._loads, 0.0)
        self._push(ready, "ready", len(self._replicas) - 1)
        self._tell()
        there = sum(replica.alive for replica in self._replicas)
        self._outcome.most_replicas = max(self._outcome.most_replicas, there)

    def _ready(self, _: int) -> None:
        self._tell()
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._send(request)

    def _look(self, _: int) -> None:
        """Note how even the load is, once a second."""
        loads = self._loads[self._there()]
        if len(loads) and loads.mean() >= 1:
            self._outcome.uneven.append(float(loads.max() / loads.mean()))
        self._push(self._now + 1.0, "look")

    def _scale(self, _: int) -> None:
        """Start replicas, or let some finish what they have, once the wish for it has lasted."""
        scaling = self._plan.scaling
        assert scaling is not None
        serving = [i for i, replica in enumerate(self._replicas) if replica.alive and not replica.draining]
        wish = min(scaling.most, max(scaling.least, int(np.ceil(self._open / scaling.target))))
        if np.sign(wish - len(serving)) != np.sign(self._wish - len(serving)):
            self._wish_since = self._now
        self._wish = wish
        lasted = self._now - self._wish_since
        if wish > len(serving) and lasted >= scaling.up_after:
            for _ in range(wish - len(serving)):
                self._start()
        elif wish < len(serving) and lasted >= scaling.down_after:
            for number in sorted(serving, key=lambda i: self._replicas[i].open)[: len(serving) - wish]:
                self._replicas[number].draining = True
                self._beginnings.forget(number)
                if not self._replicas[number].open:
                    self._gone(self._replicas[number])
            self._tell()
        self._push(self._now + scaling.every, "scale")
