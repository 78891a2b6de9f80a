"""Who owns which page of the K/V cache, and the prefix cache that shares full pages by content.

A page is, at any time, exactly one of: the dummy page 0, *owned* (held by at least one request), *cached* (held
by nobody, its content kept for whoever brings the same prefix), a *companion* of an owned or cached one
(`kv_cache.py`), or *free*. `check_integrity` proves it. When no request looks back so far, a page's companions are
*spare* if others may come with the same prefix, and else free.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
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


def longest_text(num_pages: int, page_size: int, window: int | None, num_companions: int) -> int:
    """Tokens of the longest text that so many pages hold, the dummy page among them."""
    usable = num_pages - 1
    if not num_companions:
        return usable * page_size
    assert window is not None
    # the window may begin and end within a page, and the next tokens take another
    near = -(-window // page_size) + 2
    short = usable // (1 + num_companions)
    return (short if short <= near else usable - num_companions * near) * page_size


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
    num_passed: int = 0
    """Leading pages whose companions the request needs no more."""
    root: bytes = _ROOT_DIGEST
    """Stands before the first page's content in its digest (`salted`)."""
    may_share: bool = True
    """Whether the request may take pages that others have computed."""

    @property
    def held(self) -> list[int]:
        """The pages that the request still has."""
        return self.pages[self.num_dropped :]

    @property
    def looked_at(self) -> list[int]:
        """The pages whose companions the request looks at, where pages have such."""
        return self.pages[self.num_passed :]


class PageManager:
    """Hands out pages, shares prefixes, takes pages back.

    Args:
        num_pages: pages in the cache, the dummy page included.
        page_size: tokens in a page.
        prefix_caching: whether pages are shared by content.
        window, num_companions: as `KVShape` has them.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefix_caching: bool = True,
        window: int | None = None,
        num_companions: int = 0,
    ) -> None:
        if num_pages < 2 + num_companions:
            least = f"{2 + num_companions} pages (one is the dummy page)"
            raise ValueError(f"a K/V cache needs at least {least}, not {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.window = window
        self.num_companions = num_companions
        self._free: deque[int] = deque(range(1, num_pages))
        self._holders = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        # held by nobody, oldest first; since when, by the clock of `_keep`
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._companions: dict[int, list[int]] = {}
        self._lookers = [0] * num_pages  # requests that hold a page and look at its companions
        self._spare: OrderedDict[int, int] = OrderedDict()  # pages whose companions nobody looks at; the same
        self._num_kept = 0
        self._news: dict[int, list[int]] = {}

    @property
    def num_usable(self) -> int:
        """Pages that requests may hold at once, if all of these have companions."""
        return (self.num_pages - 1) // (1 + self.num_companions)

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now, with companions: of what is free, or only kept by the prefix cache."""
        return (self.num_pages - 1 - self.num_needed) // (1 + self.num_companions)

    @property
    def num_needed(self) -> int:
        """Pages that are neither free nor only kept by the prefix cache, companions counted."""
        kept = len(self._cached) + self.num_companions * len(self._spare)
        return self.num_pages - 1 - len(self._free) - kept

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that there is room for."""
        return longest_text(self.num_pages, self.page_size, self.window, self.num_companions)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    def news(self) -> list[tuple[int, list[int]]]:
        """Pages that got companions since this was last asked, and these."""
        news = list(self._news.items())
        self._news.clear()
        return news

    def _take(self) -> int:
        while len(self._free) < 1 + self.num_companions:
            self._evict()
        page = self._free.popleft()
        if self.num_companions:
            self._companions[page] = self._news[page] = [self._free.popleft() for _ in range(self.num_companions)]
        return page

    def _evict(self) -> None:
        """Free what the prefix cache has kept longest: a page's companions, or a page."""
        spare, cached = next(iter(self._spare), None), next(iter(self._cached), None)
        if spare is not None and (cached is None or self._spare[spare] < self._cached[cached]):
            self._free_companions(spare)
        else:
            assert cached is not None
            self._forget_page(cached)

    def _forget_page(self, page: int) -> None:
        """The prefix cache knows a page no more, and keeps nothing of it."""
        del self._page_of[self._digest_of.pop(page)]
        if page in self._spare:
            self._free_companions(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def _free_companions(self, page: int) -> None:
        self._spare.pop(page, None)
        self._free += self._companions.pop(page, [])

    def _look_away(self, page: int) -> None:
        """A request looks at a page's companions no more."""
        self._lookers[page] -= 1
        if self._lookers[page]:
            return
        if page in self._digest_of:
            self._keep(page, self._spare)
        else:
            self._free_companions(page)

    def _keep(self, page: int, kept: OrderedDict[int, int]) -> None:
        """The prefix cache keeps a page, or its companions, from now on."""
        self._num_kept += 1
        kept[page] = self._num_kept

    def share_prefix(self, table: PageTable, tokens: list[int]) -> int:
        """Give an empty table the cached pages of the longest known prefix of `tokens`.

        At least one token is left out, since a forward pass has to compute something.

        Returns:
            How many tokens the shared pages hold.
        """
        assert not table.pages
        table.digests = self._known(table, tokens)
        table.pages = [self._page_of[digest] for digest in table.digests]
        cached_len = len(table.pages) * self.page_size
        if self.num_companions:
            table.num_passed = self._num_behind(cached_len)
        for page in table.pages:
            self._cached.pop(page, None)
            self._holders[page] += 1
        for page in table.looked_at if self.num_companions else ():
            self._spare.pop(page, None)
            self._lookers[page] += 1
        return cached_len

    def num_known(self, table: PageTable, tokens: list[int]) -> int:
        """How many tokens `share_prefix` would find pages for."""
        return len(self._known(table, tokens)) * self.page_size

    def _known(self, table: PageTable, tokens: list[int]) -> list[bytes]:
        """The digests of the pages of the longest known prefix that the table may share."""
        known: list[bytes] = []
        parent, longest, lacking = table.root, 0, -1
        shares = self.prefix_caching and table.may_share
        for start in range(0, len(tokens) - self.page_size if shares else 0, self.page_size):
            parent = prefix_digest(parent, tokens[start : start + self.page_size])
            if parent not in self._page_of:
                break
            if self.num_companions and self._page_of[parent] not in self._companions:
                lacking = len(known)
            known.append(parent)
            # what comes behind a prefix looks at companions as far as the window reaches
            if lacking < 0 or lacking < self._num_behind(len(known) * self.page_size):
                longest = len(known)
        return known[:longest]

    def reserve(self, table: PageTable, num_tokens: int) -> bool:
        """Extend the table to hold `num_tokens`; False, and nothing done, where there are too few pages."""
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing <= 0:  # as for most rows in most steps
            return True
        if missing > self.num_available:
            return False
        for _ in range(missing):
            page = self._take()
            self._holders[page] = self._lookers[page] = 1
            table.pages.append(page)
        return True

    def trim(self, table: PageTable, num_tokens: int) -> None:
        """Give back the pages past `num_tokens`: what a tree reserved for its worst case and did not use."""
        keep = max(self.pages_for(num_tokens), len(table.digests))
        while len(table.pages) > keep:
            self._release(table.pages.pop(), looks=True)
        table.num_synced = min(table.num_synced, keep)

    def num_seen(self, cached_len: int) -> int:
        """Of so many cached tokens, those that some layer looks at."""
        return cached_len if self.window is None or self.num_companions else min(cached_len, self.window)

    def _num_behind(self, cached_len: int) -> int:
        """Leading pages that the window of the token at this position does not reach."""
        assert self.window is not None
        return max(0, cached_len + 1 - self.window) // self.page_size

    def drop(self, table: PageTable, cached_len: int) -> None:
        """Give back what lies behind the window of the token at this position: companions of pages, where they have
        such, else pages; what is known stays in the prefix cache.

        Steps that were launched before still read them, and write nothing there: the device works in order.
        """
        if self.window is None:
            return
        behind = self._num_behind(cached_len)
        if self.prefix_caching:
            behind = min(behind, len(table.digests))
        if self.num_companions:
            for page in table.pages[table.num_passed : behind]:
                self._look_away(page)
            table.num_passed = max(table.num_passed, behind)
            return
        for i in range(table.num_dropped, behind):
            self._release(table.pages[i], looks=True)
            table.pages[i] = DUMMY_PAGE
            table.num_dropped = i + 1

    def register(self, table: PageTable, tokens: list[int], num_computed: int) -> None:
        """Make the full pages among the first `num_computed` tokens known to the prefix cache.

        Where the content is known already under another page, this table's page stays private, unless the other one
        has lost its companions.
        """
        if not self.prefix_caching:
            return
        for i in range(len(table.digests), num_computed // self.page_size):
            parent = table.digests[-1] if table.digests else table.root
            digest = prefix_digest(parent, tokens[i * self.page_size : (i + 1) * self.page_size])
            table.digests.append(digest)
            known, page = self._page_of.get(digest), table.pages[i]
            if known is not None and known not in self._companions and page in self._companions:
                self._forget_page(known)
                known = None
            if known is None:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def forget(self, table: PageTable) -> None:
        """Share what a table's pages hold with nobody else from now on."""
        dropped = [self._page_of.get(digest) for digest in table.digests[: table.num_dropped]]
        for page in (*table.held, *dropped):
            if page in self._digest_of:
                self._forget_page(page)

    def free(self, table: PageTable) -> None:
        """Take all pages back; known ones stay in the prefix cache, last pages first to be evicted."""
        for i in range(len(table.pages) - 1, table.num_dropped - 1, -1):
            self._release(table.pages[i], looks=i >= table.num_passed)
        table.pages.clear()
        table.digests.clear()
        table.num_synced = table.num_dropped = table.num_passed = 0

    def _release(self, page: int, looks: bool) -> None:
        """A request holds a page no more, at whose companions it may have looked."""
        if looks and self.num_companions:
            self._look_away(page)
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._digest_of:
            self._keep(page, self._cached)
        else:
            self._free.append(page)

    def check_integrity(self, tables: list[PageTable]) -> None:
        """Every page is free, cached or owned, exactly once.

        Args:
            tables: the tables of all requests that hold pages.

        Raises:
            RuntimeError: saying which page is wrong, and how.
        """
        holders, lookers = [0] * self.num_pages, [0] * self.num_pages
        for table in tables:
            if len(set(table.held)) != len(table.held):
                raise RuntimeError(f"a request holds a page twice: {table.held}")
            for page in table.held:
                holders[page] += 1
            for page in table.looked_at if self.num_companions else ():
                lookers[page] += 1
        if holders != self._holders:
            wrong = [b for b in range(self.num_pages) if holders[b] != self._holders[b]]
            raise RuntimeError(f"pages {wrong}: held by {[holders[b] for b in wrong]} requests, "
                               f"counted {[self._holders[b] for b in wrong]}")  # fmt: skip
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise RuntimeError("a page is free twice")
        companions = Counter(page for pages in self._companions.values() for page in pages)
        for page in range(self.num_pages):
            states = (page in free) + (page in cached) + (holders[page] > 0) + (page == DUMMY_PAGE) + companions[page]
            if states != 1:
                raise RuntimeError(f"page {page} is in {states} states instead of one")
        for digest, page in self._page_of.items():
            if self._digest_of.get(page) != digest:
                raise RuntimeError(f"page {page}: the prefix cache's two directions disagree")
        if len(self._page_of) != len(self._digest_of) or not cached <= self._digest_of.keys():
            raise RuntimeError("the prefix cache keeps a page that it has no content for")
        if self.num_companions:
            self._check_companions(lookers)

    def _check_companions(self, lookers: list[int]) -> None:
        """Pages have companions where a request looks at them, and else only to spare.

        Args:
            lookers: of each page, as the requests' tables have it.
        """
        if lookers != self._lookers:
            wrong = [page for page in range(self.num_pages) if lookers[page] != self._lookers[page]]
            raise RuntimeError(f"companions of pages {wrong}: the requests that look at them are counted wrong")
        looked_at = {page for page in range(self.num_pages) if lookers[page]}
        if looked_at & self._spare.keys() or looked_at | self._spare.keys() != self._companions.keys():
            raise RuntimeError("companions are kept that nobody looks at, or somebody looks at some that are gone")
        if not self._spare.keys() <= self._digest_of.keys():
            raise RuntimeError("companions are spare of a page that the prefix cache does not know")
