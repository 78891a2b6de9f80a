"""Who is let into the queue, when those are told to come back who are not, and what a promise of it is worth."""

from __future__ import annotations

import math
import random
from statistics import median
from typing import Any

import pytest

from manyheads.engine.admission import CLOSES, OPENS
from manyheads.engine.step import Request
from manyheads.errors import QueueFull, RequestError
from manyheads.request import SamplingParams
from tests.engine.world import Setup, World

SETUP: dict[str, Any] = {"rows": 4, "pages": 64, "budget": 64, "max_queue": 5000, "caching": False}
"""Four rows of 21 steps on average, of 0.1 s each: 1.9 requests a second, and 38 output tokens."""
PEAK = 1.9


def ask(world: World, rng: random.Random, **more: Any) -> str:
    return world.add([1, 2], ignore_eos=True, max_tokens=rng.randint(12, 30), **more)


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def busy(overlaps: bool) -> World:
    """Rates and lengths are known, and some wait."""
    world, rng = World(Setup(overlaps=overlaps, max_wait=30.0, **SETUP)), random.Random(0)
    for _ in range(50):
        ask(world, rng, client="many")
    for _ in range(100):
        world.step()
    assert world.scheduler.waiting
    return world


def started(world: World) -> dict[str, float]:
    return {request.request_id: world.now for request in world.runner.plans[-1].admitted if not request.num_preemptions}


def test_nobody_is_refused_for_what_is_not_known(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, max_wait=1e-3, **SETUP))
    for _ in range(100):
        world.add([1], max_tokens=5)
    assert len(world.scheduler.waiting) == 100
    assert world.engine.stats().queue_wait == 0


def test_a_free_row_means_no_wait(busy: World) -> None:
    assert busy.scheduler.expected_wait("many") > 5
    while busy.scheduler.waiting or len(busy.scheduler.running) == 4:
        busy.step()
    assert busy.scheduler.expected_wait("many") == 0


@pytest.mark.parametrize(("clients", "most"), [(1, 0.1), (3, 0.3), (40, 0.5)])
def test_the_estimate_is_about_right(clients: int, most: float, overlaps: bool) -> None:
    """For requests that came all at once, and others that came later. The more clients there are, the more of them go
    first that have not come yet."""
    world, rng = World(Setup(overlaps=overlaps, max_wait=None, **SETUP)), random.Random(1)
    told: dict[str, tuple[float, float]] = {}
    came: dict[str, float] = {}
    errors: list[float] = []
    for step in range(1200):
        for _ in range(40 if step == 0 else rng.random() < 0.15):
            client = f"client {rng.randrange(clients)}"
            wait = world.scheduler.expected_wait(client)
            came[ask(world, rng, client=client)] = world.now
            if step > 100:
                told[str(len(came) - 1)] = (world.now, wait)
        world.step()
        for name, now in started(world).items():
            if name in told:
                at, wait = told[name]
                errors += [abs(now - at - wait) / (now - at)] if now - at > 2 else []
    assert len(errors) > 50
    assert median(errors) < most


def test_overload(overlaps: bool) -> None:
    """Four times as many as can be served, for minutes: those let in start in time, no row is idle, and who comes back
    when told is let in."""
    max_wait = 30.0
    world, rng = World(Setup(overlaps=overlaps, max_wait=max_wait, **SETUP)), random.Random(2)
    came: dict[str, float] = {}
    waited: list[float] = []
    retries: list[float] = []
    probes: list[bool] = []
    errors: list[float] = []
    refused: list[tuple[float, float]] = []
    while world.now < 1300:
        for _ in range(sum(rng.random() < 4 * PEAK * 0.1 / 8 for _ in range(8))):
            try:
                came[ask(world, rng, client="many")] = world.now
                errors += [abs(told - (world.now - at)) / told for at, told in refused if told > 1]
                refused = []
            except QueueFull as error:
                retry_after = error.retry_after or math.nan
                refused.append((world.now, retry_after))
                if rng.random() < 0.1:
                    retries.append(world.now + retry_after)
        while retries and min(retries) <= world.now:
            retries.remove(min(retries))
            try:
                came[ask(world, rng, client="many")] = world.now
                probes.append(True)
            except QueueFull:
                probes.append(False)
        world.step()
        waited += [now - came[name] for name, now in started(world).items()]
        if world.now > 1020:
            assert world.scheduler.waiting
    late = [sent for sent in world.sent.values() if sent.last is not None and sent.last.finish_reason == "error"]
    assert len(late) <= len(waited) / 100
    assert max(waited) <= max_wait
    assert median(waited) > max_wait / 3
    assert len(probes) > 20
    assert sum(probes) / len(probes) > 0.8
    assert median(errors) < 0.3


def test_what_is_done_while_a_grammar_is_compiled_is_no_rate(overlaps: bool) -> None:
    """Who waits for that waits for no row: little may be asked for at that time."""
    world = World(Setup(overlaps=overlaps, max_wait=10.0, **SETUP))
    for _ in range(4):
        world.add([1, 2], ignore_eos=True, max_tokens=20)
    world.run()
    world.add([1, 2], client="grammar", ignore_eos=True, max_tokens=20)
    (held,) = world.scheduler.waiting
    held.is_held = True
    world.add([1, 2], client="few", ignore_eos=True, max_tokens=30)
    for _ in range(25):
        world.now += 0.1
        world.engine.step()
    assert [request.client for request in world.scheduler.running] == ["few"]
    assert world.scheduler.expected_wait("many") == 0
    held.is_held = False
    for _ in range(12):  # for 60 steps of four rows: six seconds
        world.add([1, 2], client="many", ignore_eos=True, max_tokens=20)
    assert world.scheduler.expected_wait("many") == 0  # nobody has waited for a row


def test_a_light_client_is_let_in_beside_a_heavy_one(busy: World) -> None:
    while busy.scheduler.expected_wait("many") <= CLOSES * 30:
        busy.add([1], client="many", max_tokens=30, ignore_eos=True)
    with pytest.raises(QueueFull):
        busy.add([1], client="many", max_tokens=5)
    assert busy.scheduler.expected_wait("few") == busy.engine.stats().queue_wait == 0
    busy.add([1], client="few", max_tokens=5)
    with pytest.raises(QueueFull):
        busy.add([1], client="many", max_tokens=5)


def test_a_request_may_be_in_a_hurry(busy: World) -> None:
    wait = busy.scheduler.expected_wait("many")
    with pytest.raises(QueueFull, match="the limit is 3 s") as caught:
        busy.add([1], client="many", timeout=3.0)
    assert caught.value.retry_after == pytest.approx(wait - 3 * OPENS)
    busy.add([1], client="many", timeout=wait / CLOSES + 0.1)
    for timeout in (0.0, -1.0, math.nan):
        with pytest.raises(RequestError, match="timeout must be above 0"):
            busy.add([1], timeout=timeout)


def test_who_does_not_start_in_time_is_refused_then(busy: World) -> None:
    """The engine has become slower than it was when it let the request in."""
    name = busy.add([1], client="many", max_tokens=4)
    request = [*busy.scheduler.waiting][-1]
    running = [r.request_id for r in busy.scheduler.running]
    assert request.request_id == name
    busy.now = request.start_by - 0.15
    busy.step()
    assert busy.sent[name].last is None
    busy.step()
    last = busy.sent[name].last
    assert last is not None
    assert (last.finish_reason, last.error_kind) == ("error", "queue_full")
    assert last.error == "it did not start within 30 s, the limit"
    assert last.retry_after is not None
    assert not any(busy.sent[r].last is not None and busy.sent[r].last.error for r in running)  # type: ignore[union-attr]
    while busy.engine.has_work():
        busy.step()


def test_who_was_set_back_has_started(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, max_wait=1.0, rows=2, pages=64))
    for _ in range(2):
        world.add([1], client="many", max_tokens=20, ignore_eos=True)
    for _ in range(3):
        world.step()
    world.add([2], client="few", max_tokens=20, ignore_eos=True)
    world.step()
    assert [request.num_preemptions for request in world.scheduler.waiting] == [1]
    world.now += 1000
    world.run()


def test_who_has_started_elsewhere_is_let_in(busy: World) -> None:
    """Whatever the queue is like: its text is being read."""
    busy.scheduler.max_queue = 1
    request = Request("x", SamplingParams(), [1, 2, 3], 2, 30, frozenset(), 0, client="many", timeout=1e-3)
    busy.scheduler.add(request)
    assert request.start_by == math.inf
    request = Request("y", SamplingParams(), [1, 2], 2, 30, frozenset(), 0, client="many", timeout=1e-3)
    with pytest.raises(QueueFull, match="the limit is 1") as caught:
        busy.scheduler.add(request)
    assert 0 < (caught.value.retry_after or 0) < 2  # about the time between two starts
