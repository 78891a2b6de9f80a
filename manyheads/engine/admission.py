"""Whether a request that arrives now would start in time, by what was measured while others waited."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from manyheads.engine.fair_queue import FairQueue
from manyheads.engine.step import Request
from manyheads.errors import QueueFull

MEMORY_SECONDS = 10.0
"""The rate is that of about so many seconds in which somebody waited."""
LEAST_SECONDS, LEAST_STEPS = 0.5, 16
"""With less than this to go by, nothing is known, and nobody is refused for it: a new engine's first steps can take
seconds, while kernels are compiled."""
CLOSES, OPENS = 0.7, 0.3
"""Nobody is let in who would wait longer than the first share of the limit (an estimate may be wrong by the rest).
After a refusal, only who would wait less than the second share: so it is known when the door opens again."""

Clock = Callable[[], float]


class Admission:
    """Measures how much work is done a second, and turns those away who would wait too long.

    Args:
        max_wait: longest time from arrival to start, in seconds; None lets everyone wait.
        clock: gives seconds, as `time.monotonic` does.
    """

    def __init__(self, max_wait: float | None = None, clock: Clock = time.monotonic) -> None:
        self.max_wait = math.inf if max_wait is None else max_wait
        self.clock = clock
        self._pending = 0.0  # work since the last tick
        self._ticked_at: float | None = None  # None while nobody waits
        self._work = self._seconds = 0.0
        self._steps = 0  # in which somebody waited
        self._closed_until = -math.inf

    def count(self, work: float) -> None:
        """Take note of work that was done."""
        self._pending += work

    def tick(self, somebody_waits: bool) -> None:
        """A step has been planned: what was done since the one before counts if somebody who can start waited all the
        while."""
        now = self.clock()
        if self._ticked_at is not None:
            seconds = now - self._ticked_at
            self._steps += 1
            kept = math.exp(-seconds / MEMORY_SECONDS)
            self._work = kept * self._work + self._pending
            self._seconds = kept * self._seconds + seconds
        self._pending = 0.0
        self._ticked_at = now if somebody_waits else None

    def expected_wait(
        self, waiting: FairQueue, running: Sequence[Request], num_free_rows: int, client: str, priority: int
    ) -> float:
        """How many seconds a request would wait that a client sent now; 0 while that cannot be told."""
        is_known = self._seconds >= LEAST_SECONDS and self._steps >= LEAST_STEPS and waiting.output_share.is_known
        if not is_known or self._work == 0:
            return 0.0
        num_rows = len(running) + (0 if waiting.has_ready else num_free_rows)  # where these are of no use
        clients = {request.client for request in running} | waiting.clients() | {client}
        num_own = sum(request.client == client for request in running) + waiting.num_waiting(client)
        if num_own < num_rows // len(clients):
            return 0.0  # it gets one of its client's share
        work = waiting.work_before(client, priority, waiting.levels(running))
        if num_free_rows == 0:
            # On average those who run are half through: what they are behind that comes first, then until one ends.
            prompts = sum(request.prompt_len for request in running)
            rooms = sum(request.max_len - request.prompt_len for request in running)
            rest = sum(request.room for request in running)
            work += waiting.expected(0, rest) - waiting.expected(0, rooms) / 2
            work += waiting.expected(prompts, rooms) / len(running)
        return max(0.0, work) * self._seconds / self._work

    def deadline(self, wait: float, timeout: float | None) -> float:
        """By when a request has to start that arrives now.

        Args:
            wait: how long it is expected to wait, in seconds.
            timeout: how long it can wait itself.

        Raises:
            QueueFull: it would wait too long.
        """
        now, limit = self.clock(), self._limit(timeout)
        retry_after = self._retry_after(wait, limit)
        if retry_after == 0:
            return now + limit
        if limit == self.max_wait and now >= self._closed_until:
            self._closed_until = now + retry_after
        raise QueueFull(f"it would start in about {wait:.1f} s; the limit is {limit:g} s", retry_after)

    def refusal(self, wait: float, timeout: float | None) -> QueueFull:
        """For a request that was let in and did not start in time.

        Args:
            wait: how long another one would wait, in seconds.
        """
        limit = self._limit(timeout)
        retry_after = max(wait - OPENS * limit, self._retry_after(wait, limit))
        return QueueFull(f"it did not start within {limit:g} s, the limit", max(retry_after, 0.0))

    def _limit(self, timeout: float | None) -> float:
        return self.max_wait if timeout is None else min(timeout, self.max_wait)

    def _retry_after(self, wait: float, limit: float) -> float:
        """In how many seconds a request would be let in; 0 for now."""
        if wait > CLOSES * limit:
            return wait - OPENS * limit
        if limit == self.max_wait and wait > OPENS * limit:
            return max(0.0, self._closed_until - self.clock())
        return 0.0
