"""Locust's users ask here: an `AskingUser` one question after another, an `ArrivalUser` whenever a request is due."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent.pool
import locust
import msgspec
from locust.user.task import LOCUST_STATE_STOPPING

from manyheads.bench.client import Client
from manyheads.bench.plan import Question, Run, part_of
from manyheads.bench.record import UNFINISHED, Record

PAUSE_AFTER_FAILURE = 1.0
"""A user pauses so many seconds, for a server that refuses at once is not to be asked a thousand times a second."""


class Traffic:
    """The users of one process share this: questions in turn, the client, and where records go."""

    def __init__(self, run: Run, questions: list[Question], environment: Any, share: tuple[int, int] = (0, 1)) -> None:
        self.run = run
        self.environment = environment
        self.part, self.parts = share
        self.questions = part_of(questions, run.timed, share)
        self.bodies = [msgspec.json.encode(q.body) for q in self.questions]
        self._turn = itertools.cycle(self.bodies)
        self.client = Client(
            run.url,
            run.path,
            timeout=run.timeout,
            max_tokens=run.max_tokens,
            api_key=os.environ.get("MANYHEADS_API_KEY"),
        )
        self.listeners: list[Callable[[Record], None]] = []

    def ask(self, body: bytes | None = None, due: float | None = None) -> Record:
        """Send the next request, or this one, and fire Locust's events."""
        record = Record(sent=0.0, due=due, chunks=[], reason=UNFINISHED)
        try:
            self.client.ask(next(self._turn) if body is None else body, record)
        finally:  # a user that is killed in the middle tells of its request, too
            for listen in self.listeners:
                listen(record)
            fire(self.environment, self.run.path, record)
        return record

    def arrivals(self) -> Iterator[tuple[float, bytes]]:
        """Yield this process's part of an open-loop run: seconds from the start, and the request that is due then."""
        stage = self.run.stages[0]
        length = stage.settle + stage.seconds
        if self.run.timed:
            speed = stage.load if self.run.kind == "trace" else 1.0
            for question, body in zip(self.questions, self.bodies, strict=True):
                yield (question.at or 0.0) / speed, body
            return
        # parts of a Poisson process are Poisson processes
        chance = random.Random(f"{self.run.seed} {stage.load} {self.part}")
        at = 0.0
        while (at := at + chance.expovariate(stage.load / self.parts)) < length:
            yield at, next(self._turn)


def fire(environment: Any, path: str, record: Record) -> None:
    """Fill rows of Locust's tables: the request, its time to first token, its time per output token (all in ms)."""
    fire_event = environment.events.request.fire
    error = None if record.ok else RuntimeError(f"{record.reason} {record.detail}".strip())
    common: dict[str, Any] = {"context": {}, "exception": None, "response_length": 0}
    tokens = {"exception": error, "response_length": record.tokens or 0}
    fire_event(request_type="POST", name=path, response_time=record.seconds * 1e3, **common | tokens)
    if record.ok and record.ttft is not None:
        fire_event(request_type="TTFT", name="time to first token", response_time=record.ttft * 1e3, **common)
    if record.ok and record.tpot is not None:
        fire_event(request_type="TPOT", name="time per output token", response_time=record.tpot * 1e3, **common)


class AskingUser(locust.User):
    """A user of a closed loop asks, reads the answer to its end, and asks the next question."""

    abstract = True
    wait_time = locust.constant(0)

    @locust.task
    def ask_all(self) -> None:
        """Ask until Locust tells the user to stop.

        NOTE: one task for all questions. Between two tasks Locust kills a user in place of telling it, and a user that
        does not pause has begun its next question by the time that the kill arrives: it would be cut off.
        """
        while self._state != LOCUST_STATE_STOPPING:
            record = self.environment.traffic.ask()
            gevent.sleep(PAUSE_AFTER_FAILURE if record.failed else 0)


class ArrivalUser(locust.User):
    """In an open loop each process has one user, which sends at the times of `Traffic.arrivals`, answered or not."""

    abstract = True
    wait_time = locust.constant(0)

    @locust.task
    def send_all(self) -> None:
        """Send the requests of the whole run, and wait for the answers."""
        traffic: Traffic = self.environment.traffic
        group = gevent.pool.Group()
        start = time.perf_counter()
        try:
            for at, body in traffic.arrivals():
                delay = start + at - time.perf_counter()
                if delay > 0:
                    gevent.sleep(delay)
                group.spawn(traffic.ask, body, start + at)
            group.join()
        finally:
            group.kill()
        while True:  # until the runner stops us
            gevent.sleep(0.1)
            if self._state == LOCUST_STATE_STOPPING:
                return
