"""Who waits, and whose turn it is: clients are served in turn by tokens, whatever number of requests each one brings.

This is the Virtual Token Counter (Sheng et al. 2024, "Fairness in Serving Large Language Models", OSDI 2024,
Algorithm 2), in its form with predicted lengths: from its start on a request counts with all that it is expected to
get.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from manyheads.engine.step import Request

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""A token of the output counts as much as two of the prompt, as in the paper's evaluation."""
MEMORY_REQUESTS = 100
"""What requests are going to take is learnt from about so many."""
MIN_SHARE = 0.01
FIRST_TOKENS = 16
"""With so many tokens a prompt begins that has to leave the rest of a step to others."""
STRANGER = "\n"
"""The name of a client that has asked for nothing yet; nobody has it."""
MAX_IDLE_CLIENTS = 4096
"""The counters of so many clients are kept that wait for nothing; those that have had least are forgotten."""


class Share:
    """What part of something turns out to be taken, by recent cases."""

    def __init__(self) -> None:
        self._part = self._whole = 0.0

    def learn(self, part: int, whole: int) -> None:
        """Take note of a case."""
        kept = 1 - 1 / MEMORY_REQUESTS
        self._part = kept * self._part + part
        self._whole = kept * self._whole + whole

    @property
    def is_known(self) -> bool:
        """Whether there was a case."""
        return self._whole > 0

    @property
    def value(self) -> float:
        """The part, from just above 0 to 1; all of it while nothing is known."""
        return max(self._part / self._whole, MIN_SHARE) if self.is_known else 1.0


@dataclass
class _Line:
    """Requests of one client and one priority that wait, first come, first served; and what they ask for, in tokens."""

    requests: deque[Request] = field(default_factory=deque)
    unpaid: int = 0
    room: int = 0

    def count(self, request: Request, sign: int) -> None:
        self.unpaid += sign * request.unpaid
        self.room += sign * request.room


class FairQueue:
    """The requests that wait. A lower priority goes first; among equal ones, the client with the least.

    `served` counts for each client the tokens that it was given, weighted; its *level* is that and what its running
    requests are expected to get yet. Who comes back to the queue is lifted to the least served of those who wait, so
    that nobody saves up a claim while asking for nothing.
    """

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._lines: dict[tuple[int, str], _Line] = {}
        self._last_to_leave = ""
        self._num_arrivals = 0
        self._next_deadline = math.inf
        self.prompt_share = Share()
        """Of prompts, what the prefix cache does not have."""
        self.output_share = Share()
        """Of what outputs might take, what they do."""

    def __len__(self) -> int:
        return sum(len(line.requests) for line in self._lines.values())

    def __iter__(self) -> Iterator[Request]:
        """Every request; those of one client and priority as they came."""
        for line in self._lines.values():
            yield from line.requests

    @property
    def has_ready(self) -> bool:
        """Whether somebody waits who can start, and for nothing but its turn."""
        return any(not request.is_held for request in self)

    def add(self, request: Request) -> None:
        """Take a new request."""
        self.served[request.client] = self.counter_of(request.client)
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self._line(request).requests.append(request)
        self._next_deadline = min(self._next_deadline, request.start_by)
        if len(self.served) > len(self._lines) + MAX_IDLE_CLIENTS:
            self._forget_idle()

    def put_back(self, request: Request) -> None:
        """Take a request that ran, before all others of its client and priority: it came before them."""
        if request.client not in self.served:
            self.served[request.client] = self.counter_of(request.client)
        self._line(request).requests.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forget a request: it runs now, or has ended."""
        key = (request.priority, request.client)
        line = self._lines[key]
        line.requests.remove(request)
        line.count(request, -1)
        request.start_by = math.inf
        if not line.requests:
            del self._lines[key]
            self._last_to_leave = request.client

    def late(self, now: float) -> list[Request]:
        """Those who were to start before now."""
        if now < self._next_deadline:
            return []
        self._next_deadline = min((r.start_by for r in self if r.start_by > now), default=math.inf)
        return [request for request in self if request.start_by <= now]

    def charge(self, request: Request, prompt_tokens: int, output_tokens: int) -> float:
        """Count what a request was given as its client's; returns it, weighted."""
        work = PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
        self.served[request.client] = self.served.get(request.client, 0.0) + work
        return work

    def expected(self, unpaid: int, room: int) -> float:
        """What requests are yet to get, weighted.

        Args:
            unpaid: tokens of their prompts, as far as they have not started.
            room: tokens that their outputs may grow by.
        """
        return PROMPT_WEIGHT * self.prompt_share.value * unpaid + OUTPUT_WEIGHT * self.output_share.value * room

    def levels(self, running: Iterable[Request]) -> dict[str, float]:
        """What each client was served and is expected to be, by what it runs."""
        rooms: Counter[str] = Counter()
        for request in running:
            rooms[request.client] += request.room
        levels = dict(self.served)
        for client, room in rooms.items():
            levels[client] = levels.get(client, 0.0) + self.expected(0, room)
        return levels

    def counter_of(self, client: str) -> float:
        """What a client was served, as it counts if it joins the queue now (lines 5 to 13 of Algorithm 2)."""
        counter = self.served.get(client, 0.0)
        clients = self.clients()
        if client in clients:
            return counter
        if clients:
            return max(counter, min(self.served[name] for name in clients))
        return max(counter, self.served.get(self._last_to_leave, 0.0))

    def in_turn(self, levels: Mapping[str, float]) -> Iterator[Request]:
        """The requests that can start, in the order in which they are to, each adding to its client's level on the
        way."""
        for priority in sorted({priority for priority, _ in self._lines}):
            lines = [(client, line.requests) for (p, client), line in self._lines.items() if p == priority]
            heap = [(levels.get(client, 0.0), line[0].arrival, 0, list(line)) for client, line in lines]
            heapq.heapify(heap)
            while heap:
                level, _, i, line = heapq.heappop(heap)
                if not line[i].is_held:
                    yield line[i]
                    level += self.expected(line[i].unpaid, line[i].room)
                if i + 1 < len(line):
                    heapq.heappush(heap, (level, line[i + 1].arrival, i + 1, line))

    def work_before(self, client: str, priority: int, levels: Mapping[str, float]) -> float:
        """What starts before a request that a client brings now: its own that wait, and of each other client what that
        one may have until its level is as high."""
        mine = self._lines.get((priority, client), _Line())
        work = self.expected(mine.unpaid, mine.room)
        level = levels.get(client, 0.0) - self.served.get(client, 0.0) + self.counter_of(client) + work
        for (other_priority, other), line in self._lines.items():
            if other_priority < priority:
                work += self.expected(line.unpaid, line.room)
            elif other_priority == priority and other != client and (lag := level - levels[other]) >= 0:
                first = line.requests[0]
                most = max(lag, self.expected(first.unpaid, first.room))
                work += min(most, self.expected(line.unpaid, line.room))
        return work

    def clients(self) -> set[str]:
        """Everyone who waits."""
        return {client for _, client in self._lines}

    def num_waiting(self, client: str) -> int:
        """Requests of a client that wait."""
        return sum(len(line.requests) for (_, name), line in self._lines.items() if name == client)

    def _line(self, request: Request) -> _Line:
        line = self._lines.setdefault((request.priority, request.client), _Line())
        line.count(request, 1)
        return line

    def _forget_idle(self) -> None:
        """Who is forgotten and comes back is lifted as anyone is, mostly to no less than it had."""
        waiting = self.clients()
        idle = sorted((c for c in self.served if c not in waiting), key=self.served.__getitem__)
        for client in idle[: -MAX_IDLE_CLIENTS // 2]:
            del self.served[client]


def max_min_shares(wanted: Mapping[str, int], amount: int) -> Counter[str]:
    """Divide an amount: everyone gets what it wants, or as much as the others; at least 1, whatever there is."""
    shares = Counter[str]()
    for i, (client, most) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        shares[client] = min(most, max(1, -(-amount // (len(wanted) - i))))
        amount = max(0, amount - shares[client])
    return shares


def divide(wanted: Sequence[tuple[str, int]], amount: int) -> list[int]:
    """Divide the prompt tokens of a step.

    Clients have max-min shares. Of its client's, the first prompt that does not end in this step leaves up to half to
    those behind it, as far as they end in it; of the others each begins with a few tokens, so as not to be in the way.
    So short prompts do not wait for long ones, which get on all the same, and everybody starts in turn.

    Args:
        wanted: client and tokens of each prompt, in the order in which they began.

    Returns:
        how many tokens each one gets.
    """
    totals = Counter[str]()
    for client, tokens in wanted:
        totals[client] += tokens
    left = max_min_shares(totals, amount)
    given = []
    cut: dict[str, int] = {}  # of each client, the first prompt that does not end
    for i, (client, tokens) in enumerate(wanted):
        share = min(left[client], amount)
        if tokens > share:
            tokens = min(share, FIRST_TOKENS) if client in cut else -(-share // 2)
            cut.setdefault(client, i)
        given.append(tokens)
        left[client] -= tokens
        amount -= tokens
    for client, i in cut.items():
        more = min(left[client], amount)
        given[i] += more
        amount -= more
    return given


def by_seniority(running: Iterable[Request]) -> list[Request]:
    """Sort by who keeps what it has: by priority, then each client's first row, each one's second, and so on."""
    ranks: Counter[tuple[int, str]] = Counter()
    ranked = []
    for request in sorted(running, key=lambda request: request.admission):
        whose = (request.priority, request.client)
        ranked.append((request.priority, ranks[whose], request))
        ranks[whose] += 1
    return [request for *_, request in sorted(ranked, key=lambda item: item[:2])]
