"""Who owns which page of the K/V cache, and the prefix cache that shares full pages by content.

A page is, at any time, exactly one of: the dummy page 0, *owned* (held by at least one request), *cached* (held
by nobody, its content kept for whoever brings the same prefix), or *free*. `check_integrity` proves it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

DUMMY_PAGE = 0
"""Padding rows write here; nobody owns it, nobody reads it."""

_ROOT_DIGEST = b"manyheads"


def prefix_digest(parent: bytes, tokens: list[int]) -> bytes:
    """Names the content of a page: its own tokens and, through `parent`, everything before them."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


def salted(salt: str, adapter: str = "") -> bytes:
    """Name the beginning of texts that are shared only where salt and adapter are the same; the empty salt is
    everybody's, the empty adapter the base."""
    root = prefix_digest(_ROOT_DIGEST + salt.encode(), []) if salt else _ROOT_DIGEST
    # what no page holds stands before the name, so that no salt and no text is called the same
    return prefix_digest(root, [-1, *adapter.encode()]) if adapter else root


@dataclass
class PageTable:
    """The pages of one request, in order, and how many of them the prefix cache knows."""

    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Digest of each leading full page that was registered or shared."""
    num_synced: int = 0
    """Leading pages that the device's table holds already."""
    num_dropped: int = 0
    """Leading pages that were given back, since no layer looks so far back; the dummy page stands for them."""
    root: bytes = _ROOT_DIGEST
    """Stands before the first page's content in its digest (`salted`)."""
    may_share: bool = True
    """Whether the request may take pages that others have computed."""

    @property
    def held(self) -> list[int]:
        """The pages that the request still has."""
        return self.pages[self.num_dropped :]


class PageManager:
    """Hands out pages, shares prefixes, takes pages back.

    Args:
        num_pages: pages in the cache, the dummy page included.
        page_size: tokens in a page.
        prefix_caching: whether pages are shared by content.
        window: how many tokens back all layers look at most, the token itself included; None: to the beginning.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True, window: int | None = None) -> None:
        if num_pages < 2:
            raise ValueError(f"a K/V cache needs at least 2 pages (one is the dummy page), not {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.window = window
        self._free: deque[int] = deque(range(1, num_pages))
        self._holders = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest first

    @property
    def num_usable(self) -> int:
        """Pages that requests may ever hold: all but the dummy page."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now: free, or only kept by the prefix cache."""
        return len(self._free) + len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page

    def share_prefix(self, table: PageTable, tokens: list[int]) -> int:
        """Give an empty table the cached pages of the longest known prefix of `tokens`.

        At least one token is left out, since a forward pass has to compute something.

        Returns:
            How many tokens the shared pages hold.
        """
        assert not table.pages
        for digest in self._known(table, tokens):
            page = self._page_of[digest]
            self._cached.pop(page, None)
            self._holders[page] += 1
            table.pages.append(page)
            table.digests.append(digest)
        return len(table.pages) * self.page_size

    def num_known(self, table: PageTable, tokens: list[int]) -> int:
        """How many tokens `share_prefix` would find pages for."""
        return sum(1 for _ in self._known(table, tokens)) * self.page_size

    def _known(self, table: PageTable, tokens: list[int]) -> Iterator[bytes]:
        """The digests of the pages of the longest known prefix that the table may share."""
        parent = table.root
        shares = self.prefix_caching and table.may_share
        for start in range(0, len(tokens) - self.page_size if shares else 0, self.page_size):
            parent = prefix_digest(parent, tokens[start : start + self.page_size])
            if parent not in self._page_of:
                return
            yield parent

    def reserve(self, table: PageTable, num_tokens: int) -> bool:
        """Extend the table to hold `num_tokens`; False, and nothing done, where there are too few pages."""
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            page = self._take()
            self._holders[page] = 1
            table.pages.append(page)
        return True

    def trim(self, table: PageTable, num_tokens: int) -> None:
        """Give back the pages past `num_tokens`: what a tree reserved for its worst case and did not use."""
        keep = max(self.pages_for(num_tokens), len(table.digests))
        while len(table.pages) > keep:
            self._release(table.pages.pop())
        table.num_synced = min(table.num_synced, keep)

    def num_seen(self, cached_len: int) -> int:
        """Of so many cached tokens, those that some layer looks at."""
        return cached_len if self.window is None else min(cached_len, self.window)

    def drop(self, table: PageTable, cached_len: int) -> None:
        """Give back the pages behind the window of the token at this position; known ones stay in the prefix cache.

        Steps that were launched before still read them, and write nothing there: the device works in order.
        """
        if self.window is None:
            return
        behind = max(0, cached_len + 1 - self.window) // self.page_size
        if self.prefix_caching:
            behind = min(behind, len(table.digests))
        for i in range(table.num_dropped, behind):
            self._release(table.pages[i])
            table.pages[i] = DUMMY_PAGE
            table.num_dropped = i + 1

    def register(self, table: PageTable, tokens: list[int], num_computed: int) -> None:
        """Make the full pages among the first `num_computed` tokens known to the prefix cache.

        Where the content is known already under another page, this table's page stays private.
        """
        if not self.prefix_caching:
            return
        for i in range(len(table.digests), num_computed // self.page_size):
            parent = table.digests[-1] if table.digests else table.root
            digest = prefix_digest(parent, tokens[i * self.page_size : (i + 1) * self.page_size])
            table.digests.append(digest)
            if digest not in self._page_of:
                self._page_of[digest] = table.pages[i]
                self._digest_of[table.pages[i]] = digest

    def forget(self, table: PageTable) -> None:
        """Share what a table's pages hold with nobody else from now on."""
        for page in table.pages:
            if (digest := self._digest_of.pop(page, None)) is not None:
                del self._page_of[digest]
        for digest in table.digests[: table.num_dropped]:
            if (known := self._page_of.pop(digest, None)) is not None:
                del self._digest_of[known]
                if known in self._cached:
                    del self._cached[known]
                    self._free.append(known)

    def free(self, table: PageTable) -> None:
        """Take all pages back; known ones stay in the prefix cache, last pages first to be evicted."""
        for page in reversed(table.held):
            self._release(page)
        table.pages.clear()
        table.digests.clear()
        table.num_synced = table.num_dropped = 0

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._digest_of:
            self._cached[page] = None
        else:
            self._free.append(page)

    def check_integrity(self, tables: list[PageTable]) -> None:
        """Every page is free, cached or owned, exactly once.

        Args:
            tables: the tables of all requests that hold pages.

        Raises:
            RuntimeError: saying which page is wrong, and how.
        """
        holders = [0] * self.num_pages
        for table in tables:
            if len(set(table.held)) != len(table.held):
                raise RuntimeError(f"a request holds a page twice: {table.held}")
            for page in table.held:
                holders[page] += 1
        if holders != self._holders:
            wrong = [b for b in range(self.num_pages) if holders[b] != self._holders[b]]
            raise RuntimeError(f"pages {wrong}: held by {[holders[b] for b in wrong]} requests, "
                               f"counted {[self._holders[b] for b in wrong]}")  # fmt: skip
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise RuntimeError("a page is free twice")
        for page in range(self.num_pages):
            states = (page in free) + (page in cached) + (holders[page] > 0) + (page == DUMMY_PAGE)
            if states != 1:
                raise RuntimeError(f"page {page} is in {states} states instead of one")
        for digest, page in self._page_of.items():
            if self._digest_of.get(page) != digest:
                raise RuntimeError(f"page {page}: the prefix cache's two directions disagree")
        if len(self._page_of) != len(self._digest_of) or not cached <= self._digest_of.keys():
            raise RuntimeError("the prefix cache keeps a page that it has no content for")
