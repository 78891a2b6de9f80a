"""To which replica a request goes: the rules that are compared.

A router knows of a replica the requests that it had a while ago (`sync_seconds`) and those that went there from this
router since; and the beginnings of prompts that went there from any router.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from cluster.traffic import Request
from manyheads.scale.routing import Chooser

MARGIN, SHARE, WORTH = Chooser.margin, Chooser.share, Chooser.worth
"""A replica that has a beginning may have so many requests more than the least busy one, or that share more; and a
beginning counts if it is this share of the prompt."""


class Router:
    """A router chooses by one of `RULES`.

    Args:
        beginnings: which replicas have the longest beginning, shared by all routers.
    """

    def __init__(self, rule: str, beginnings: Beginnings, chance: random.Random) -> None:
        if rule not in RULES:
            raise ValueError(f"a routing is one of {', '.join(RULES)}, not {rule!r}")
        self._rule, self._beginnings, self._chance = rule, beginnings, chance
        self.loads = np.zeros(0)
        """Requests of each replica, as far as is known."""
        self._there = np.zeros(0, dtype=int)

    def look(self, there: Sequence[int], loads: np.ndarray) -> None:
        """Learn which replicas take requests, and how many each has, by number."""
        self._there, self.loads = np.asarray(there), loads

    def choose(self, request: Request) -> int:
        """Return the number of a replica."""
        number = RULES[self._rule](self, request)
        if "prefix" in self._rule:
            self._beginnings.add(request, number)
        return number

    def _random(self, _: Request) -> int:
        return int(self._there[self._chance.randrange(len(self._there))])

    def _least(self, _: Request) -> int:
        loads = self.loads[self._there]
        least = self._there[loads == loads.min()]
        return int(least[self._chance.randrange(len(least))])

    def _two(self, _: Request) -> int:
        return self._better_of_two(self._there)

    def _prefix(self, request: Request) -> int:
        """The longest beginning, however busy."""
        have, _ = self._beginnings.longest(request)
        return self._better_of_two(have if len(have) else self._there)

    def _prefix_unless_busy(self, request: Request) -> int:
        have = self._not_busy(request)
        if have is self._there:
            return self._better_of_two(have)
        loads = self.loads[have]
        return int(have[int(loads.argmin())])

    def _prefix_better_of_two(self, request: Request) -> int:
        return self._better_of_two(self._not_busy(request))

    def _not_busy(self, request: Request) -> np.ndarray:
        """The replicas with the longest beginning, unless too much busier than the least busy; all if none is left."""
        least = float(self.loads[self._there].min())
        have, tokens = self._beginnings.longest(request, self.loads, least + max(MARGIN, SHARE * least))
        return have if len(have) and tokens >= WORTH * request.prompt else self._there

    def _better_of_two(self, numbers: np.ndarray) -> int:
        """The less busy of two random ones (Mitzenmacher 2001)."""
        if len(numbers) == 1:
            return int(numbers[0])
        i, j = self._chance.randrange(len(numbers)), self._chance.randrange(len(numbers) - 1)
        a, b = int(numbers[i]), int(numbers[j + (j >= i)])
        return a if self.loads[a] <= self.loads[b] else b


RULES = {
    "random": Router._random,
    "least busy": Router._least,
    "two choices": Router._two,
    "prefix": Router._prefix,
    "prefix unless busy": Router._prefix_unless_busy,
    "prefix unless busy, two": Router._prefix_better_of_two,
}
"""Of those that have the longest beginning, the last two take the least busy one, and the better of two random ones."""


class Beginnings:
    """Remembers which beginnings went to which replicas."""

    def __init__(self) -> None:
        self._have: dict[str, np.ndarray] = {}

    def add(self, request: Request, number: int) -> None:
        """A request has gone to a replica."""
        for key, _ in request.prefixes:
            have = self._have.get(key)
            if have is None:
                self._have[key] = np.array([number])
            elif not (have == number).any():
                self._have[key] = np.append(have, number)

    def longest(self, request: Request, loads: np.ndarray | None = None, most: float = 0.0) -> tuple[np.ndarray, int]:
        """Return the replicas that have the longest beginning, and its tokens; only those with loads up to `most`."""
        for key, tokens in reversed(request.prefixes):
            have = self._have.get(key, _NOBODY)
            if loads is not None:
                have = have[loads[have] <= most]
            if len(have):
                return have, tokens
        return _NOBODY, 0

    def forget(self, number: int) -> None:
        """A replica has gone, and its cache with it."""
        for key, have in list(self._have.items()):
            if (have == number).any():
                self._have[key] = have[have != number]


_NOBODY = np.zeros(0, dtype=int)
