"""Who owns which page of the K/V cache, and the prefix cache that shares full pages by content.

A page (block) is, at any time, exactly one of: the dummy page 0, *owned* (held by at least one request), *cached* (held
by nobody, its content kept for whoever brings the same prefix), or *free*. `check_integrity` proves it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

DUMMY_BLOCK = 0
"""Padding rows write here; nobody owns it, nobody reads it."""

_ROOT_DIGEST = b"manyheads"


def prefix_digest(parent: bytes, tokens: list[int]) -> bytes:
    """Names the content of a page: its own tokens and, through `parent`, everything before them."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


@dataclass
class BlockTable:
    """The pages of one request, in order, and how many of them the prefix cache knows."""

    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Digest of each leading full page that was registered or shared."""
    num_synced: int = 0
    """Leading pages that the device's table holds already."""


class BlockManager:
    """Hands out pages, shares prefixes, takes pages back.

    Args:
        num_blocks: pages in the cache, the dummy page included.
        block_size: tokens in a page.
        prefix_caching: whether pages are shared by content.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"a K/V cache needs at least 2 pages (one is the dummy page), not {num_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free: deque[int] = deque(range(1, num_blocks))
        self._holders = [0] * num_blocks
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest first

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now: free, or only kept by the prefix cache."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block

    def share_prefix(self, table: BlockTable, tokens: list[int]) -> int:
        """Give an empty table the cached pages of the longest known prefix of `tokens`.

        At least one token is left out, since a forward pass has to compute something.

        Returns:
            How many tokens the shared pages hold.
        """
        assert not table.blocks
        if not self.prefix_caching:
            return 0
        parent = _ROOT_DIGEST
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            parent = prefix_digest(parent, tokens[start : start + self.block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            self._cached.pop(block, None)
            self._holders[block] += 1
            table.blocks.append(block)
            table.digests.append(parent)
        return len(table.blocks) * self.block_size

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Extend the table to hold `num_tokens`; False, and nothing done, where there are too few pages."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            block = self._take()
            self._holders[block] = 1
            table.blocks.append(block)
        return True

    def trim(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the pages past `num_tokens`: what a tree reserved for its worst case and did not use."""
        keep = max(self.blocks_for(num_tokens), len(table.digests))
        while len(table.blocks) > keep:
            self._release(table.blocks.pop())
        table.num_synced = min(table.num_synced, keep)

    def register(self, table: BlockTable, tokens: list[int], num_computed: int) -> None:
        """Make the full pages among the first `num_computed` tokens known to the prefix cache.

        Where the content is known already under another page, this table's page stays private.
        """
        if not self.prefix_caching:
            return
        for i in range(len(table.digests), num_computed // self.block_size):
            parent = table.digests[-1] if table.digests else _ROOT_DIGEST
            digest = prefix_digest(parent, tokens[i * self.block_size : (i + 1) * self.block_size])
            table.digests.append(digest)
            if digest not in self._block_of:
                self._block_of[digest] = table.blocks[i]
                self._digest_of[table.blocks[i]] = digest

    def free(self, table: BlockTable) -> None:
        """Take all pages back; known ones stay in the prefix cache, last pages first to be evicted."""
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks.clear()
        table.digests.clear()
        table.num_synced = 0

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._digest_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def check_integrity(self, tables: list[BlockTable]) -> None:
        """Every page is free, cached or owned, exactly once.

        Args:
            tables: the tables of all requests that hold pages.

        Raises:
            RuntimeError: saying which page is wrong, and how.
        """
        holders = [0] * self.num_blocks
        for table in tables:
            if len(set(table.blocks)) != len(table.blocks):
                raise RuntimeError(f"a request holds a page twice: {table.blocks}")
            for block in table.blocks:
                holders[block] += 1
        if holders != self._holders:
            wrong = [b for b in range(self.num_blocks) if holders[b] != self._holders[b]]
            raise RuntimeError(f"pages {wrong}: held by {[holders[b] for b in wrong]} requests, "
                               f"counted {[self._holders[b] for b in wrong]}")  # fmt: skip
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise RuntimeError("a page is free twice")
        for block in range(self.num_blocks):
            states = (block in free) + (block in cached) + (holders[block] > 0) + (block == DUMMY_BLOCK)
            if states != 1:
                raise RuntimeError(f"page {block} is in {states} states instead of one")
        for digest, block in self._block_of.items():
            if self._digest_of.get(block) != digest:
                raise RuntimeError(f"page {block}: the prefix cache's two directions disagree")
        if len(self._block_of) != len(self._digest_of) or not cached <= self._digest_of.keys():
            raise RuntimeError("the prefix cache keeps a page that it has no content for")
