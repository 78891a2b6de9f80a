"""Who gets rows, pages and prompt tokens when clients ask for more than there is."""

from __future__ import annotations

from collections import Counter

import pytest

from manyheads.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from manyheads.engine.step import Request
from manyheads.request import SamplingParams
from tests.engine.world import Setup, World


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def flood(world: World, client: str, count: int, tokens: int = 30, prompt: int = 2) -> list[str]:
    return [
        world.add([1 + i % 2] * prompt, client=client, ignore_eos=True, max_tokens=tokens - prompt)
        for i in range(count)
    ]


def steps_until_start(world: World, name: str, most: int = 20) -> int:
    for number in range(1, most + 1):
        world.step()
        if any(request.request_id == name for request in world.runner.plans[-1].admitted):
            return number
    raise AssertionError(f"request {name} has not started after {most} steps")


def rows(world: World) -> Counter[str]:
    return Counter(request.client for request in world.scheduler.running)


@pytest.mark.parametrize("after", [0, 1, 5, 40])
def test_one_token_waits_two_steps_at_most_behind_a_thousand_requests(after: int, overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=64, budget=16, max_queue=2000))
    flood(world, "many", 1000)
    for _ in range(after):
        world.step()
    for i in range(3):  # again and again: what it was given counts for little beside the other's
        name = world.add([2, 1, 2][: i + 1], client="few", max_tokens=1, ignore_eos=True)
        start = world.num_steps
        assert steps_until_start(world, name) <= 2
        while world.sent[name].last is None:
            world.step()
        assert world.num_steps - start <= 2 + overlaps


def test_one_token_waits_two_steps_at_most_behind_long_prompts(overlaps: bool) -> None:
    """Prompts are computed in chunks, of which each client gets its share."""
    world = World(Setup(overlaps=overlaps, pages=64, budget=8, max_queue=100, caching=False))
    flood(world, "many", 50, tokens=32, prompt=30)
    for _ in range(3):
        world.step()
    assert not any(request.decoding for request in world.scheduler.running)
    assert steps_until_start(world, world.add([2, 2], client="few", max_tokens=1)) <= 2


def test_many_small_clients_start_together(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, rows=8, pages=99, budget=32, max_queue=200))
    flood(world, "many", 100)
    for _ in range(4):
        world.step()
    names = [world.add([2], client=f"client {i}", max_tokens=1, ignore_eos=True) for i in range(6)]
    assert max(steps_until_start(world, name) for name in names[-1:]) <= 2
    for _ in range(2):
        world.step()
    assert all(world.sent[name].last is not None for name in names)


def test_rows_are_shared_and_seldom_taken(overlaps: bool) -> None:
    """A client that comes later gets a third soon; then rows come free by themselves."""
    world = World(Setup(overlaps=overlaps, rows=8, pages=128, budget=16, max_queue=400))
    flood(world, "early", 100)
    for _ in range(5):
        world.step()
    assert rows(world) == {"early": 8}
    flood(world, "late", 100)
    world.step()
    assert rows(world)["late"] >= 1
    for _ in range(3):
        world.step()
    assert rows(world)["late"] >= 3
    taken = world.engine.stats().preemptions
    assert taken == 3
    seen = Counter[str]()
    for _ in range(30):
        world.step()
    for _ in range(200):
        world.step()
        seen += rows(world)
    assert seen["late"] / seen["early"] == pytest.approx(1, abs=0.1)
    assert world.engine.stats().preemptions == taken


def test_who_is_set_back_is_the_youngest_and_keeps_its_text(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=64, budget=32, rows=3))
    names = flood(world, "many", 3)
    for _ in range(8):
        world.step()
    world.add([2], client="few", max_tokens=3, ignore_eos=True)
    world.step()
    assert [r.request_id for r in world.scheduler.waiting] == names[2:]
    (request,) = world.scheduler.waiting
    assert request.num_output > 5
    world.run()


def test_no_more_rows_are_taken_than_are_needed(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, rows=8, pages=99, budget=32, max_queue=100))
    flood(world, "many", 30)
    for _ in range(4):
        world.step()
    for _ in range(2):
        world.add([2], client="few", max_tokens=8, ignore_eos=True)
    for _ in range(6):
        world.step()
    assert rows(world) == {"many": 6, "few": 2}
    assert world.engine.stats().preemptions == 2


def test_a_row_is_left_to_everyone(overlaps: bool) -> None:
    """With as many clients as rows, one more has to wait for its turn."""
    world = World(Setup(overlaps=overlaps, rows=2, pages=64))
    for client in ("a", "b", "c"):
        flood(world, client, 1)
    world.run()
    assert world.engine.stats().preemptions == 0


def test_pages_are_shared_too(overlaps: bool) -> None:
    """Rows are free, but one client holds every page."""
    world = World(Setup(overlaps=overlaps, rows=8, pages=16, page_size=2, max_len=24, budget=32, caching=False))
    flood(world, "many", 4, tokens=24, prompt=6)
    while world.scheduler.pages.num_available > 1:
        world.step()
    assert len(world.scheduler.running) > 1
    assert steps_until_start(world, world.add([2] * 5, client="few", max_tokens=1)) <= 2
    world.run()


def test_clients_get_the_same_tokens_whatever_they_ask_for(overlaps: bool) -> None:
    """One asks for long prompts, one for long outputs; both have more waiting than can run."""
    world = World(Setup(overlaps=overlaps, rows=6, pages=120, budget=24, max_queue=400, caching=False))
    flood(world, "prompts", 150, tokens=26, prompt=24)
    flood(world, "outputs", 150, tokens=30, prompt=2)
    while min(Counter(r.client for r in world.scheduler.waiting).values()) > 20:
        world.step()
    served = world.scheduler.waiting.served
    # at most what fits into the rows of one of them (section 4 of the paper)
    assert abs(served["prompts"] - served["outputs"]) <= 6 * 32 * OUTPUT_WEIGHT
    assert min(served.values()) > 1000


@pytest.mark.parametrize("companions", [0, 2])
def test_nobody_is_set_back_for_a_prompt_that_fits_beside_no_other_row(companions: int, overlaps: bool) -> None:
    """Where pages have companions, a step's part of a prompt takes more than the whole text will."""
    world = World(Setup(overlaps=overlaps, pages=12, companions=companions, max_len=48, budget=128, rows=4))
    flood(world, "many", 4)
    for _ in range(2):
        world.step()
    world.add([2] * 47, client="few", ignore_eos=True)
    for _ in range(3):
        world.step()
        assert rows(world)["many"] == 4
    assert world.engine.stats().preemptions == 0
    world.run()


def test_a_lower_priority_starts_first_and_gives_way_last(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, rows=1, pages=64))
    order = [world.add([1], client=c, priority=p, max_tokens=2) for c, p in (("a", 0), ("a", 5), ("b", 0), ("a", -1))]
    world.run()
    assert world.finished == [order[3], order[2], order[0], order[1]]  # of two alike, one's client was served already

    world = World(Setup(overlaps=overlaps, rows=4, pages=8, page_size=2, max_len=16, budget=16))
    for first in (1, 2, 3):
        world.add([first] * 4, ignore_eos=True, priority=-first)
    world.run()
    assert world.engine.stats().preemptions > 0
    assert world.finished == ["2", "1", "0"]


def test_priority_goes_before_fair_shares(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, rows=2, pages=64))
    urgent = [world.add([1, 2], client="many", priority=-1, max_tokens=9, ignore_eos=True) for _ in range(4)]
    other = world.add([1], client="few", max_tokens=1)
    world.run()
    assert world.finished == [*urgent, other]


def test_nobody_is_set_back_while_steps_are_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Setup(overlaps=True, pages=64, budget=16))
    too_early = world.watch_preemptions(monkeypatch)
    flood(world, "many", 4)
    for _ in range(5):
        world.step()
    world.add([2], client="few", max_tokens=4, ignore_eos=True)
    world.run()
    assert len(too_early) == world.engine.stats().preemptions == 1


def waiting(client: str, *, prompt: int = 1, room: int = 10, priority: int = 0) -> Request:
    return Request(
        request_id="",
        params=SamplingParams(),
        tokens=[1] * prompt,
        prompt_len=prompt,
        max_len=prompt + room,
        stop_ids=frozenset(),
        seed=0,
        client=client,
        priority=priority,
    )


def test_who_comes_back_is_lifted_to_the_least_of_those_who_wait() -> None:
    queue = FairQueue()
    first, second = waiting("a"), waiting("b")
    queue.add(first)
    queue.charge(first, 100, 50)
    assert queue.served["a"] == 100 * PROMPT_WEIGHT + 50 * OUTPUT_WEIGHT == 200
    queue.add(second)
    assert queue.served["b"] == 200
    queue.charge(second, 10, 0)
    queue.add(waiting("b"))  # it waits already
    assert queue.served["b"] == 210
    for request in [*queue]:
        queue.remove(request)
    queue.add(waiting("c"))  # nobody waits: as much as the last one that did
    assert queue.served["c"] == 210


def test_the_order_counts_what_starting_will_cost() -> None:
    queue = FairQueue()
    requests = [waiting("a", prompt=5) for _ in range(3)] + [waiting("b", prompt=2) for _ in range(4)]
    for request in requests:
        queue.add(request)
    assert "".join(request.client for request in queue.in_turn({})) == "abbabab"  # at 25 and 22 a request
    assert next(queue.in_turn({"a": 1.0})).client == "b"


def test_idle_clients_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.engine.fair_queue.MAX_IDLE_CLIENTS", 10)
    queue = FairQueue()
    queue.add(waiting("stays"))
    for i in range(50):
        request = waiting(str(i))
        queue.add(request)
        queue.charge(request, i, 0)
        queue.remove(request)
    assert len(queue.served) <= 12
    assert {"stays", "49"} <= queue.served.keys()
