from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from manyheads.engine.page_manager import DUMMY_PAGE, PageManager, PageTable, prefix_digest

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # two tokens only: prefixes meet often


@dataclass(eq=False)
class Sequence:
    tokens: list[int]
    table: PageTable = field(default_factory=PageTable)
    computed: int = 0
    registered: int = 0
    """Leading pages that were registered or shared."""


class Pages(RuleBasedStateMachine):
    """The page manager beside a naive model of it, which names a page's content by the tokens themselves."""

    sequences: Bundle[Sequence] = Bundle("sequences")

    @initialize(num_pages=st.integers(2, 12), page_size=st.integers(1, 3), caching=st.booleans())
    def begin(self, num_pages: int, page_size: int, caching: bool) -> None:
        self.manager = PageManager(num_pages, page_size, caching)
        self.size, self.caching = page_size, caching
        self.alive: list[Sequence] = []
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, offset) → the text up to this token
        self.known: dict[tuple[int, ...], int] = {}  # text up to the end of a page → that page
        self.cached: list[int] = []  # known pages that nobody holds, next to be evicted first

    def holders(self) -> Counter[int]:
        return Counter(page for sequence in self.alive for page in sequence.table.pages)

    def give_back(self, before: list[int], after: list[int]) -> None:
        """The model's side of a sequence's table that got shorter."""
        assert after == before[: len(after)]
        held = self.holders()
        self.cached += [p for p in reversed(before[len(after) :]) if not held[p] and p in self.known.values()]

    @rule(target=sequences, tokens=TOKENS)
    def start(self, tokens: list[int]) -> Sequence:
        pages: list[int] = []
        while (end := (len(pages) + 1) * self.size) < len(tokens) and tuple(tokens[:end]) in self.known:
            pages.append(self.known[tuple(tokens[:end])])
        sequence = Sequence(tokens)
        sequence.computed = self.manager.share_prefix(sequence.table, tokens)
        assert (sequence.table.pages, sequence.computed) == (pages, len(pages) * self.size)
        for i in range(sequence.computed):
            assert self.content[pages[i // self.size], i % self.size] == tuple(tokens[: i + 1])
        sequence.registered = len(pages)
        self.cached = [page for page in self.cached if page not in pages]
        self.alive.append(sequence)
        return sequence

    @rule(sequence=sequences, num_tokens=st.integers(0, 12))
    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        self.reserved(sequence, num_tokens)

    def reserved(self, sequence: Sequence, num_tokens: int) -> bool:
        before, held = list(sequence.table.pages), self.holders()
        available = self.manager.num_usable - len(held)
        missing = -(-num_tokens // self.size) - len(before)
        ok = self.manager.reserve(sequence.table, num_tokens)
        taken = sequence.table.pages[len(before) :]
        assert ok == (missing <= available)
        assert sequence.table.pages == before + taken
        assert len(taken) == (max(missing, 0) if ok else 0)
        assert not held.keys() & set(taken)
        evicted = [page for page in taken if page in self.cached]
        assert evicted == self.cached[: len(evicted)], "least recently used first"
        assert len(evicted) == max(0, len(taken) - (available - len(self.cached))), "free pages before cached ones"
        self.cached = self.cached[len(evicted) :]
        self.known = {text: page for text, page in self.known.items() if page not in evicted}
        return ok

    @rule(sequence=sequences, num_tokens=st.integers(1, 6))
    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        end = min(sequence.computed + num_tokens, len(sequence.tokens))
        if not self.reserved(sequence, end):
            return
        held = self.holders()
        for i in range(sequence.computed, end):
            page = sequence.table.pages[i // self.size]
            assert held[page] == 1, "two requests could write this page"
            assert page not in self.known.values(), "what the prefix cache knows stays as it is"
            self.content[page, i % self.size] = tuple(sequence.tokens[: i + 1])
        sequence.computed = end

    @rule(sequence=sequences, tokens=TOKENS)
    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        sequence.tokens = [*sequence.tokens, *tokens][:12]

    @rule(sequence=sequences, behind=st.integers(0, 2))
    def register(self, sequence: Sequence, behind: int) -> None:
        num_computed = max(0, sequence.computed - behind)
        self.manager.register(sequence.table, sequence.tokens, num_computed)
        for i in range(sequence.registered, num_computed // self.size if self.caching else 0):
            self.known.setdefault(tuple(sequence.tokens[: (i + 1) * self.size]), sequence.table.pages[i])
            sequence.registered = i + 1

    @rule(sequence=sequences, spare=st.integers(0, 3))
    def trim(self, sequence: Sequence, spare: int) -> None:
        before, num_tokens = list(sequence.table.pages), sequence.computed + spare
        self.manager.trim(sequence.table, num_tokens)
        assert len(sequence.table.pages) == min(len(before), -(-num_tokens // self.size))
        self.give_back(before, sequence.table.pages)

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        before = list(sequence.table.pages)
        self.manager.free(sequence.table)
        self.alive.remove(sequence)
        self.give_back(before, sequence.table.pages)
        assert (sequence.table.pages, sequence.table.digests) == ([], [])

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        manager, held = self.manager, self.holders()
        manager.check_integrity([sequence.table for sequence in self.alive])
        assert manager._holders == [held[page] for page in range(manager.num_pages)]
        everywhere = [DUMMY_PAGE, *manager._free, *manager._cached, *held]
        assert sorted(everywhere) == list(range(manager.num_pages))
        assert list(manager._cached) == self.cached
        assert manager.num_available == manager.num_usable - len(held)

    @invariant()
    def pages_hold_what_their_hash_says(self) -> None:
        assert sorted(self.manager._page_of.values()) == sorted(self.known.values())
        for digest, page in self.manager._page_of.items():
            text = self.content[page, self.size - 1]
            assert self.known[text] == page
            expected = b"manyheads"
            for first in range(0, len(text), self.size):
                assert len(text) % self.size == 0
                expected = prefix_digest(expected, list(text[first : first + self.size]))
            assert digest == expected


Pages.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPages = Pages.TestCase


class Companions(RuleBasedStateMachine):
    """Pages with companions, beside what was written to every page: whoever looks back through the window finds his own
    text there, in the companions too."""

    sequences: Bundle[Sequence] = Bundle("sequences")

    @initialize(
        num_pages=st.integers(4, 30), size=st.integers(1, 3), count=st.integers(1, 2), window=st.integers(1, 7),
        caching=st.booleans(),
    )  # fmt: skip
    def begin(self, num_pages: int, size: int, count: int, window: int, caching: bool) -> None:
        self.manager = PageManager(num_pages, size, caching, window, count)
        self.size, self.window = size, window
        self.alive: list[Sequence] = []
        self.places: dict[int, list[int]] = {}  # what the device knows of companions
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, offset) → the text up to this token

    def at(self, sequence: Sequence, position: int) -> list[tuple[int, int]]:
        """Where the K/V of a token is to be found in each group of layers."""
        page, offset = sequence.table.pages[position // self.size], position % self.size
        return [(page, offset), *((companion, offset) for companion in self.places.get(page, []))]

    @rule(target=sequences, tokens=TOKENS)
    def start(self, tokens: list[int]) -> Sequence:
        sequence = Sequence(tokens)
        known = self.manager.num_known(sequence.table, tokens)
        sequence.computed = self.manager.share_prefix(sequence.table, tokens)
        assert sequence.computed == known < len(tokens)
        self.alive.append(sequence)
        return sequence

    @rule(sequence=sequences, num_tokens=st.integers(1, 6), ahead=st.integers(0, 3))
    def compute(self, sequence: Sequence, num_tokens: int, ahead: int) -> None:
        self.manager.drop(sequence.table, sequence.computed)
        end = min(sequence.computed + num_tokens, len(sequence.tokens))
        missing = self.manager.pages_for(end + ahead) - len(sequence.table.pages)
        available = self.manager.num_available
        assert self.manager.reserve(sequence.table, end + ahead) == (missing <= available)
        if missing > available:
            return
        self.places.update(self.manager.news())
        for position in range(sequence.computed, end):
            assert len(self.at(sequence, position)) == 1 + self.manager.num_companions
            for place in self.at(sequence, position):
                self.content[place] = tuple(sequence.tokens[: position + 1])
        sequence.computed = end
        self.manager.register(sequence.table, sequence.tokens, end)

    @rule(sequence=sequences, tokens=TOKENS)
    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        sequence.tokens = [*sequence.tokens, *tokens][:14]

    @rule(sequence=sequences)
    def trim(self, sequence: Sequence) -> None:
        self.manager.trim(sequence.table, sequence.computed)

    @rule(sequence=sequences)
    def forget(self, sequence: Sequence) -> None:
        self.manager.forget(sequence.table)
        assert self.manager.num_known(PageTable(), [*sequence.tokens[: sequence.computed], 0]) <= sequence.computed

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        self.manager.free(sequence.table)
        self.alive.remove(sequence)

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        self.manager.check_integrity([sequence.table for sequence in self.alive])

    @invariant()
    def who_looks_back_finds_his_text(self) -> None:
        for sequence in self.alive:
            for position in range(sequence.computed):
                places = self.at(sequence, position)
                is_seen = position > sequence.computed - self.window
                for place in places if is_seen else places[:1]:
                    assert self.content[place] == tuple(sequence.tokens[: position + 1])


Companions.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestCompanions = Companions.TestCase


def filled(manager: PageManager, tokens: list[int]) -> PageTable:
    """A table whose request has computed all of its tokens."""
    table = PageTable()
    manager.share_prefix(table, tokens)
    assert manager.reserve(table, len(tokens))
    manager.register(table, tokens, len(tokens))
    return table


def shared(manager: PageManager, tokens: list[int]) -> int:
    """How many tokens of a prompt the prefix cache holds; asking counts as use."""
    table = PageTable()
    count = manager.share_prefix(table, tokens)
    manager.free(table)
    return count


def test_a_prefix_hit_shares_pages() -> None:
    manager = PageManager(8, 4)
    first = filled(manager, list(range(10)))
    second = PageTable()
    assert manager.share_prefix(second, [*range(8), 50, 51]) == 8
    assert second.pages == first.pages[:2]
    assert manager.num_available == 4
    assert manager.reserve(second, 10)
    assert second.pages[2] not in first.pages
    manager.free(first)
    manager.check_integrity([second])
    assert manager.num_available == 4


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_a_hit_leaves_a_token_to_compute(length: int, hit: int) -> None:
    manager = PageManager(8, 4)
    manager.free(filled(manager, list(range(9))))
    assert shared(manager, list(range(length))) == hit


def test_a_page_is_known_by_all_that_stands_before_it() -> None:
    manager = PageManager(8, 2)
    filled(manager, [1, 2, 3, 4])
    assert shared(manager, [3, 4, 9]) == 0
    assert shared(manager, [1, 2, 3, 4, 9]) == 4
    assert shared(manager, [2, 1, 3, 4, 9]) == 0


def test_a_twin_stays_private() -> None:
    manager = PageManager(8, 2)
    first, second = PageTable(), PageTable()
    for table in (first, second):  # side by side, neither knew of the other
        assert manager.reserve(table, 4)
    for table in (first, second):
        manager.register(table, [1, 2, 3, 4], 4)
    manager.free(second)
    assert manager.num_available == 5
    third = PageTable()
    assert manager.share_prefix(third, [1, 2, 3, 4, 5]) == 4
    assert third.pages == first.pages
    manager.check_integrity([first, third])


def test_eviction_is_least_recently_used() -> None:
    manager = PageManager(7, 2)
    a, b, c = ([t] * 5 for t in (1, 2, 3))
    for tokens in (a[:4], b[:4], c[:4]):
        manager.free(filled(manager, tokens))
    assert shared(manager, a) == 4  # now b is the one unused for longest
    table = PageTable()
    assert manager.reserve(table, 4)
    assert [shared(manager, tokens) for tokens in (a, b, c)] == [4, 0, 4]


def test_eviction_starts_at_the_end_of_a_prompt() -> None:
    manager = PageManager(4, 2)
    tokens = list(range(6))
    manager.free(filled(manager, tokens))
    assert manager.reserve(PageTable(), 1)
    assert shared(manager, [*tokens, 9]) == 4


def test_free_pages_go_before_cached_ones() -> None:
    manager = PageManager(4, 2)
    manager.free(filled(manager, [1, 2]))
    assert manager.reserve(PageTable(), 4)
    assert shared(manager, [1, 2, 3]) == 2


def test_out_of_pages_refuses_and_takes_nothing() -> None:
    manager = PageManager(5, 2)
    first, second = PageTable(), PageTable()
    assert manager.reserve(first, 5)
    assert not manager.reserve(second, 3)
    assert second.pages == []
    assert manager.num_available == 1
    assert manager.reserve(second, 2)
    assert not manager.reserve(second, 3)
    manager.free(first)
    assert manager.reserve(second, 8)
    manager.check_integrity([second])


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = PageManager(4, 2, prefix_caching=False)
    manager.free(filled(manager, [1, 2, 3]))
    assert shared(manager, [1, 2, 3]) == 0


def test_a_cache_of_the_dummy_page_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageManager(1, 4)


CORRUPTIONS: dict[str, Callable[[PageManager, PageTable], object]] = {
    "holds a page twice": lambda m, t: t.pages.append(t.pages[0]),
    "held by": lambda m, t: t.pages.pop(),
    "free twice": lambda m, t: m._free.append(m._free[0]),
    "in 2 states": lambda m, t: m._free.append(t.pages[0]),
    "in 0 states": lambda m, t: m._free.pop(),
    "directions disagree": lambda m, t: m._digest_of.update({t.pages[0]: b"another"}),
    "no content": lambda m, t: m._page_of.clear(),
}


@pytest.mark.parametrize("message", CORRUPTIONS)
def test_check_integrity_finds(message: str) -> None:
    manager = PageManager(6, 2)
    manager.free(filled(manager, [7, 7]))
    table = filled(manager, [1, 2, 3])
    manager.check_integrity([table])
    CORRUPTIONS[message](manager, table)
    with pytest.raises(RuntimeError, match=message):
        manager.check_integrity([table])


@pytest.mark.parametrize("caching", [False, True])
def test_pages_behind_the_window_are_given_back(caching: bool) -> None:
    manager, table, tokens = PageManager(10, 4, caching, window=6), PageTable(), list(range(24))
    assert manager.reserve(table, 24)
    pages = list(table.pages)
    manager.register(table, tokens, 20)
    for cached_len, dropped in ((5, 0), (8, 0), (9, 1), (16, 2), (17, 3)):
        manager.drop(table, cached_len)
        assert table.pages == [DUMMY_PAGE] * dropped + pages[dropped:]
        assert manager.num_available == 3 + dropped
        manager.check_integrity([table])
    other = PageTable()
    assert manager.share_prefix(other, tokens) == (20 if caching else 0)
    manager.check_integrity([table, other])
    manager.free(other)
    manager.free(table)
    manager.check_integrity([])
    assert manager.num_available == 9
    assert manager.num_known(PageTable(), tokens) == (20 if caching else 0)


def test_what_was_given_back_is_forgotten_with_the_rest() -> None:
    manager, table, tokens = PageManager(10, 4, window=6), PageTable(), list(range(24))
    assert manager.reserve(table, 24)
    manager.register(table, tokens, 20)
    manager.drop(table, 17)
    manager.forget(table)
    manager.check_integrity([table])
    assert manager.num_known(PageTable(), tokens) == 0
    manager.free(table)
    manager.check_integrity([])


@pytest.mark.parametrize("caching", [False, True])
def test_companions_behind_the_window_make_room(caching: bool) -> None:
    manager, table, tokens = PageManager(21, 4, caching, window=6, num_companions=2), PageTable(), list(range(24))
    assert (manager.num_usable, manager.longest_text) == (6, (20 - 2 * 4) * 4)
    assert manager.reserve(table, 24)
    manager.register(table, tokens, 20)
    pages = list(table.pages)
    for cached_len, passed in ((8, 0), (9, 1), (17, 3)):
        manager.drop(table, cached_len)
        assert (table.pages, table.num_passed, table.num_dropped) == (pages, passed, 0)
        assert manager.num_available == (2 + 2 * passed) // 3
        manager.check_integrity([table])
    # a text that shares three pages looks back into the second, whose companions are spare
    assert manager.num_known(PageTable(), tokens[:13]) == (12 if caching else 0)
    other = PageTable()
    assert manager.reserve(other, 8)
    assert manager.num_known(PageTable(), tokens[:13]) == 0, "spare companions were taken"
    assert manager.num_known(PageTable(), tokens) == (20 if caching else 0), "the last pages have theirs"
    manager.check_integrity([table, other])
    manager.free(other)
    manager.free(table)
    manager.check_integrity([])


def test_a_page_that_has_companions_takes_the_place_of_one_without() -> None:
    manager, tokens = PageManager(21, 4, window=6, num_companions=2), list(range(17))
    first = filled(manager, tokens)
    manager.drop(first, 16)
    other = PageTable()
    assert manager.reserve(other, 8), "which takes what is spare"
    manager.free(other)
    assert manager.num_known(PageTable(), tokens[:9]) == 0
    manager.free(first)
    second = filled(manager, tokens[:9])
    assert manager.num_known(PageTable(), tokens[:9]) == 8
    manager.free(second)
    manager.check_integrity([])


def test_pages_of_old_texts_are_evicted_before_companions_of_new_ones() -> None:
    """However many texts came before, the last ones can be gone on with."""
    manager = PageManager(1 + 40, 4, window=6, num_companions=1)
    texts = [[i] * 12 for i in range(40)]
    for text in texts:
        manager.free(filled(manager, text))
    assert [manager.num_known(PageTable(), [*text, 0]) for text in texts[-6:]] == [12] * 6
    manager.check_integrity([])


def test_pages_that_the_prefix_cache_does_not_know_yet_stay() -> None:
    manager, table = PageManager(10, 4, window=6), PageTable()
    assert manager.reserve(table, 24)
    manager.register(table, list(range(24)), 4)
    manager.drop(table, 20)
    assert table.num_dropped == 1
    manager.check_integrity([table])
