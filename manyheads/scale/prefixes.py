"""Which replica has computed which beginnings of texts lately, as far as a router knows: what it has sent there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from manyheads.engine.page_manager import prefix_digest, salted

BLOCK = 32
"""Tokens that are looked up at a time."""


class Prefixes:
    """Beginnings of texts by the replicas that have computed them; the least recently used are forgotten.

    Args:
        capacity: blocks of BLOCK tokens that are remembered.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[bytes, dict[Hashable, None]] = OrderedDict()

    def longest(self, digests: Sequence[bytes]) -> dict[Hashable, int]:
        """How many of a text's first tokens each replica has; those that have none are left out."""
        found: dict[Hashable, int] = {}
        for n, digest in enumerate(digests, 1):
            holders = self._holders.get(digest)
            if holders is None:
                break
            for replica in holders:
                if found.get(replica, 0) == (n - 1) * BLOCK:  # it has all that comes before
                    found[replica] = n * BLOCK
        return found

    def add(self, digests: Sequence[bytes], replica: Hashable) -> None:
        """A text is computed there."""
        for digest in digests:
            self._holders.setdefault(digest, {})[replica] = None
            self._holders.move_to_end(digest)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def keep(self, replicas: set[Hashable]) -> None:
        """Only these replicas are still there."""
        for digest in list(self._holders):
            holders = self._holders[digest]
            for gone in holders.keys() - replicas:
                del holders[gone]
            if not holders:
                del self._holders[digest]


def digests_of(tokens: list[int], salt: str = "", adapter: str = "") -> list[bytes]:
    """Names of a text's whole blocks, each with all that comes before it, as `page_manager.salted` has them."""
    digest, found = salted(salt, adapter), list[bytes]()
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digest = prefix_digest(digest, tokens[end - BLOCK : end])
        found.append(digest)
    return found
