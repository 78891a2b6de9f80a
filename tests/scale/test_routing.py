"""To which replica requests go."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from manyheads.scale.prefixes import BLOCK, Prefixes, digests_of
from manyheads.scale.routing import Chooser, Route
from manyheads.scale.stats import summed
from manyheads.stats import AdapterStats, EngineStats, MemoryUse


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def chooser(**settings: float) -> Chooser:
    return Chooser(random=random.Random(0), **settings)  # type: ignore[arg-type]


def test_beginnings_are_remembered_by_whole_blocks() -> None:
    known = Prefixes(100)
    shared = text(0, 3 * BLOCK)
    known.add(digests_of(shared + text(1, 2 * BLOCK + 5)), "a")
    known.add(digests_of(shared[: 2 * BLOCK] + text(2, BLOCK)), "b")
    assert known.longest(digests_of(shared)) == {"a": 3 * BLOCK, "b": 2 * BLOCK}
    assert known.longest(digests_of(shared[: BLOCK + 3])) == {"a": BLOCK, "b": BLOCK}
    assert known.longest(digests_of(text(9, 200))) == {}
    assert known.longest(digests_of(shared[: BLOCK - 1])) == {}
    known.keep({"b"})
    assert known.longest(digests_of(shared)) == {"b": 2 * BLOCK}


def test_a_replica_without_the_middle_has_nothing_behind_it() -> None:
    known = Prefixes(3)
    long = text(0, 3 * BLOCK)
    known.add(digests_of(long), "a")
    known.add(digests_of(long[:BLOCK]), "b")
    assert known.longest(digests_of(long)) == {"a": 3 * BLOCK, "b": BLOCK}


def test_what_an_adapter_or_a_salt_has_computed_is_its_own() -> None:
    known, shared = Prefixes(100), text(0, 2 * BLOCK)
    known.add(digests_of(shared, adapter="sql"), "a")
    known.add(digests_of(shared, salt="s"), "b")
    assert known.longest(digests_of(shared)) == {}
    assert known.longest(digests_of(shared, adapter="sql")) == {"a": 2 * BLOCK}
    assert known.longest(digests_of(shared, salt="s")) == {"b": 2 * BLOCK}
    assert known.longest(digests_of(shared, salt="s", adapter="sql")) == {}


def test_what_was_not_used_for_long_is_forgotten() -> None:
    known = Prefixes(4)
    known.add(digests_of(text(0, 2 * BLOCK)), "a")
    known.add(digests_of(text(1, 2 * BLOCK)), "a")
    known.add(digests_of(text(0, 2 * BLOCK)), "a")
    known.add(digests_of(text(2, 2 * BLOCK)), "a")
    assert known.longest(digests_of(text(1, 2 * BLOCK))) == {}
    assert known.longest(digests_of(text(0, 2 * BLOCK))) == {"a": 2 * BLOCK}


def test_the_longest_beginning_goes_first_unless_it_is_too_busy() -> None:
    routes = chooser()
    routes.sent(Route.of(text(0, 10 * BLOCK)), "a")
    routes.sent(Route.of(text(0, 4 * BLOCK)), "b")
    asked = Route.of(text(0, 10 * BLOCK) + text(5, 20))
    assert routes.ranked(asked, {"a": 4, "b": 0, "c": 0})[0] == ["a"]
    assert routes.ranked(asked, {"a": 5, "b": 0, "c": 0})[0] == ["b"]
    assert routes.ranked(asked, {"a": 45, "b": 60, "c": 40})[0] == ["a"]
    beneath = routes.ranked(asked, {"a": 5, "b": 9, "c": 0})
    assert len(beneath) == 1  # nobody fits: two random ones
    assert len(beneath[0]) == 2


def test_a_short_beginning_of_a_long_prompt_does_not_count() -> None:
    routes = chooser()
    routes.sent(Route.of(text(0, BLOCK)), "a")
    assert len(routes.ranked(Route.of(text(0, BLOCK) + text(1, 30 * BLOCK)), {"a": 0, "b": 0})) == 1
    assert routes.ranked(Route.of(text(0, BLOCK) + text(1, BLOCK)), {"a": 0, "b": 0})[0] == ["a"]


def test_a_session_stays_unless_its_replica_goes() -> None:
    routes = chooser()
    there = dict.fromkeys("abcdef", 0.0)
    first = {f"user {i}": routes.ranked(Route.of([], f"user {i}"), there)[0][0] for i in range(300)}
    assert max(Counter(first.values()).values()) < 2 * 300 / 6
    del there["c"]
    for session, replica in first.items():
        now = routes.ranked(Route.of([], session), there)[0][0]
        assert now == replica or replica == "c"


@pytest.mark.parametrize("count", [0, 1])
def test_few_replicas(count: int) -> None:
    there = dict.fromkeys(range(count), 0.0)
    assert chooser().ranked(Route.of([1, 2]), there) == [[0]] * count


def test_chats_with_shared_beginnings_stay_together_and_in_balance() -> None:
    """Twelve long system prompts on three replicas: nearly everything is found, and nobody has much more."""
    routes, rng = chooser(), random.Random(1)
    loads: dict[object, float] = dict.fromkeys("abc", 0.0)
    running: list[object] = []
    sent: Counter[object] = Counter()
    found = total = 0
    held: dict[object, set[int]] = {replica: set() for replica in loads}
    for i in range(3000):
        kind = rng.randrange(12)
        route = Route.of(text(kind, 2000) + text(100 + i, 100))
        ranks = routes.ranked(route, loads)
        replica = min(ranks[0], key=lambda r: loads[r])
        found, total = found + (kind in held[replica]), total + 1
        held[replica].add(kind)
        routes.sent(route, replica)
        loads[replica] += 1
        sent[replica] += 1
        running.append(replica)
        if len(running) > 24:
            loads[running.pop(rng.randrange(24))] -= 1
    assert found / total > 0.97
    assert max(sent.values()) / min(sent.values()) < 1.2


def test_statistics_of_many_are_those_of_one() -> None:
    one = EngineStats(num_running=2, queue_wait=3.0, tree_size=4, drafted_by_depth=[5, 2], memory=MemoryUse(weights=7))
    two = EngineStats(num_running=1, queue_wait=1.0, tree_size=8, drafted_by_depth=[1], drafter="x")
    both = summed([one, two])
    assert (both.num_running, both.queue_wait, both.tree_size, both.drafted_by_depth) == (3, 1.0, 8, [6, 2])
    assert both.memory.weights == 7
    assert summed([]) == EngineStats()


def test_an_adapters_counts_are_summed_over_replicas() -> None:
    one = EngineStats(adapters={"a": AdapterStats(row_steps=2, accepted_tokens=3), "b": AdapterStats(row_steps=1)})
    two = EngineStats(adapters={"a": AdapterStats(row_steps=5, generation_tokens=4)})
    both = summed([one, two]).adapters
    assert both["a"] == AdapterStats(row_steps=7, accepted_tokens=3, generation_tokens=4)
    assert both["b"] == AdapterStats(row_steps=1)
