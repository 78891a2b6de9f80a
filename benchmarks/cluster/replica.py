"""A replica in the simulation: continuous batching by step costs, and a prefix cache.

All rows of a step gain alike, so a request of n more tokens ends when the row's progress has grown by n: rows are a
heap of such ends, and as many steps as change nothing are one event. So a request costs a few events, however long.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from itertools import count

from cluster.costs import StepCosts
from cluster.traffic import Request


class PrefixCache:
    """Texts whose K/V a replica has, the least recently used one first to go."""

    def __init__(self, tokens: int) -> None:
        self.room = tokens
        self._held: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """Tokens up to the end of the text, and those of them that are its own."""

    def find(self, request: Request) -> int:
        """Return how many tokens of a prompt are here; the last token is always computed."""
        found = 0
        for key, length in request.prefixes:
            if key in self._held:
                self._held.move_to_end(key)
                found = max(found, min(self._held[key][0], length))
        return min(found, request.prompt - 1)

    def keep(self, request: Request) -> None:
        """Take in the texts of a request, its own with the tokens that it has."""
        before = 0
        for key, length in request.prefixes:
            if key == request.prefixes[-1][0]:
                length += int(request.done)
            own = length - before
            self.room += self._held.pop(key, (0, 0))[1] - own
            self._held[key] = (length, own)
            before = length
        while self.room < 0 and self._held:
            self.room += self._held.popitem(last=False)[1][1]


class Replica:
    """A replica computes step after step while it has requests; the cluster asks it when its next step ends.

    Args:
        started: when it was asked for; it serves from `ready` on.
    """

    def __init__(self, costs: StepCosts, started: float, ready: float) -> None:
        self.costs, self.started, self.ready = costs, started, ready
        self.alive = True
        self.draining = False
        self.cache = PrefixCache(costs.cache_tokens)
        self.queue: deque[Request] = deque()
        """They wait for a row."""
        self.prompts: deque[tuple[Request, float]] = deque()
        """They have a row, and so many prompt tokens yet to be computed."""
        self.rows: list[tuple[float, int, Request, float]] = []
        """A heap: progress at which a row ends, a number, the row, and the progress at which it began."""
        self.progress = 0.0
        """Tokens that a row has gained since the replica began."""
        self.busy = 0.0
        """Seconds of steps."""
        self.row_steps = 0
        """Rows, summed over steps."""
        self.version = 0
        """Counts plans of steps: an event of an older one is void."""
        self._numbers = count()
        self._at = 0.0  # when the planned steps begin,
        self._steps, self._each, self._chunk = 0, 0.0, 0.0  # how many, seconds of each, prompt tokens of it

    @property
    def open(self) -> int:
        """Count its requests."""
        return len(self.queue) + len(self.prompts) + len(self.rows)

    def add(self, request: Request, now: float) -> float | None:
        """Take a request, and return when the next step ends if that is news."""
        self.queue.append(request)
        if not self._steps:
            return self._plan(now)
        if self._steps == 1 or self._full():
            return None
        # steps that were one event end at the next border, where the request joins
        self._steps = min(self._steps, max(1, math.ceil((now - self._at) / self._each)))
        self.version += 1
        return self._at + self._steps * self._each

    def step(self, now: float) -> tuple[list[Request], float | None]:
        """End the planned steps; return the requests that have ended, and when the next step ends, if there is one."""
        costs, ended = self.costs, []
        self.busy += self._steps * self._each
        self.row_steps += self._steps * len(self.rows)
        self.progress += self._steps * costs.tokens_per_step(len(self.rows)) if self.rows else 0.0
        while self.rows and self.rows[0][0] <= self.progress + 1e-9:
            _, _, request, _ = heapq.heappop(self.rows)
            request.done = request.output
            request.last = now + costs.overhead / 2
            self.cache.keep(request)
            ended.append(request)
        left = self._chunk
        while self.prompts and left > 0:
            request, tokens = self.prompts.popleft()
            took = min(tokens, left)
            left -= took
            if took < tokens:
                self.prompts.appendleft((request, tokens - took))
            else:
                ended += self._begin(request, now)
        return ended, self._plan(now)

    def lose(self, now: float) -> list[Request]:
        """Die: return what was open, with the tokens that each has; those of an unfinished step are lost."""
        if self.rows and self._steps:
            whole = int((now - self._at) / self._each)
            self.progress += whole * self.costs.tokens_per_step(len(self.rows))
        for _, _, request, began in self.rows:
            request.done = min(request.output - 1.0, request.done + (self.progress - began) * request.pace)
        lost = [*(row[2] for row in self.rows), *(request for request, _ in self.prompts), *self.queue]
        self.alive = False
        self.version += 1
        self.rows, self._steps = [], 0
        self.prompts.clear()
        self.queue.clear()
        return lost

    def _begin(self, request: Request, now: float) -> list[Request]:
        """Give a request whose prompt is computed its next token, and a row unless that is all."""
        if request.first < 0:
            request.first = now + self.costs.overhead / 2
        request.done += 1
        self.cache.keep(request)
        if request.done >= request.output:
            request.last = now + self.costs.overhead / 2
            return [request]
        end = self.progress + (request.output - request.done) / request.pace
        heapq.heappush(self.rows, (end, next(self._numbers), request, self.progress))
        return []

    def _full(self) -> bool:
        return len(self.rows) + len(self.prompts) >= self.costs.max_rows

    def _plan(self, now: float) -> float | None:
        """Admit who waits and plan the next step, or as many as change nothing; return when they end."""
        while self.queue and not self._full():
            request = self.queue.popleft()
            known = request.prompt + int(request.done)
            found = self.cache.find(request)
            request.hits += found
            request.computed += known - found
            self.prompts.append((request, float(known - found)))
        self.version += 1
        self._at, self._steps, self._chunk, rows = now, 0, 0.0, len(self.rows)
        if self.prompts:
            wanted = sum(tokens for _, tokens in self.prompts)
            self._chunk = min(wanted, self.costs.most_prompt_tokens(rows))
            self._steps = 1
        elif rows:
            gain = self.costs.tokens_per_step(rows)
            self._steps = max(1, math.ceil((self.rows[0][0] - self.progress) / gain - 1e-9))
        else:
            return None
        self._each = self.costs.seconds(rows, self._chunk)
        return now + self._steps * self._each
