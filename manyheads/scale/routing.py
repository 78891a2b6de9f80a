"""To which replica a request goes: no matter of Ray's, so that it is tested without."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from manyheads.scale.prefixes import BLOCK, Prefixes, digests_of

R = TypeVar("R", bound=Hashable)
REMEMBERED = 1_000_000
"""Blocks of prompts that a router remembers, some 100 MB at most."""


class Route(msgspec.Struct, array_like=True, frozen=True):
    """What a router needs to know of a request."""

    digests: list[bytes]
    """Of its text's whole blocks (`prefixes.digests_of`), made once: they are looked up and then remembered."""
    num_tokens: int
    session: str = ""
    """Requests with the same one go to the same replica; "" is no session."""

    @classmethod
    def of(cls, tokens: list[int], session: str = "", salt: str = "", lora: str = "") -> Route:
        """That of a text, with the session, the salt and the adapter of its request."""
        return cls(digests_of(tokens, salt, lora), len(tokens), session)


@dataclass
class Chooser:
    """The replica that has the longest beginning of a prompt, unless it is too much busier than the least busy.

    Beneath it are the better of two random ones (Mitzenmacher 2001, "The Power of Two Choices in Randomized Load
    Balancing"): with what every router knows of the load being late, all would send to the least busy one at once.

    Args:
        margin: requests that a replica with a longer beginning may have more than the least busy one has,
        share: and as a share of what that has.
        worth: a beginning counts if it is at least this share of the prompt.
    """

    margin: float = 4.0
    share: float = 0.25
    worth: float = 0.1
    random: random.Random = field(default_factory=random.Random)
    prefixes: Prefixes = field(default_factory=lambda: Prefixes(REMEMBERED))

    def ranked(self, route: Route, loads: Mapping[R, float]) -> list[list[R]]:
        """Replicas by preference; those of one rank are equally good, but for their load.

        Args:
            loads: requests that each replica has.
        """
        two = self._two(list(loads))
        if not loads:
            return []
        if route.session:
            first = max(loads, key=lambda replica: _weight(route.session, replica))
            return [[first], two]
        known = self.prefixes.longest(route.digests)
        least = min(loads.values())
        most = least + max(self.margin, self.share * least)
        at_least = max(BLOCK, self.worth * route.num_tokens)
        fit = [r for r in loads if known.get(r, 0) >= at_least and loads[r] <= most]
        if not fit:
            return [two]
        longest = max(known[replica] for replica in fit)
        return [[replica for replica in fit if known[replica] == longest], two]

    def sent(self, route: Route, replica: Hashable) -> None:
        """A request has gone there."""
        self.prefixes.add(route.digests, replica)

    def _two(self, replicas: Sequence[R]) -> list[R]:
        return self.random.sample(replicas, min(2, len(replicas)))


def _weight(session: str, replica: Hashable) -> bytes:
    """Rendezvous hashing (Thaler and Ravishankar 1998): a session moves only when its own replica goes."""
    return hashlib.blake2b(f"{session} {replica}".encode(), digest_size=8).digest()
