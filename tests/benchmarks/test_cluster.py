"""Invariants of the simulated cluster, and cases that have a closed form."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from cluster import experiments, from_results
from cluster.calibrate import Calibration
from cluster.cluster import Cluster, Outcome, Plan, Scaling
from cluster.costs import StepCosts, interpolate
from cluster.replica import PrefixCache
from cluster.report import figures
from cluster.routing import RULES, Beginnings, Router
from cluster.traffic import Request, Traffic

COSTS = StepCosts(
    decode=((1, 0.01), (8, 0.02)),
    prefill=((16, 0.01), (512, 0.11)),
    gain=((1, 2.0), (8, 1.5)),
    once=0.005,
    overhead=0.004,
    max_rows=8,
    max_prompt_tokens=512,
    cache_tokens=4000,
    start_seconds=2.0,
)
CHATS = Traffic(rate=30.0, seconds=20.0, systems=8, system_tokens=300, turns=2.0, pause=2.0, spread=0.2)


def simulate(traffic: Traffic = CHATS, costs: StepCosts = COSTS, **plan: object) -> Outcome:
    return Cluster(costs, Plan(**({"replicas": 4} | plan)), traffic.draw(1)).run()  # type: ignore[arg-type]


def states(outcome: Outcome) -> list[tuple[float, ...]]:
    return [(r.at, r.first, r.last, r.hits, r.computed) for r in outcome.requests]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"deaths": (3.0, 3.5, 9.0)},
        {"scaling": Scaling(target=4, least=1, most=6, every=1.0, up_after=1.0, down_after=3.0)},
        {"routers": 3, "sync_seconds": 0.5, "deaths": (5.0,)},
    ],
)
def test_every_request_ends_once_with_all_its_tokens(rule: str, plan: dict[str, object]) -> None:
    outcome = simulate(routing=rule, **plan)
    for r in outcome.requests:
        assert r.at + COSTS.overhead <= r.first <= r.last <= outcome.seconds + COSTS.overhead
        assert r.done == r.output
        assert r.hits + r.computed >= r.prompt
        assert r.moves or r.hits + r.computed == r.prompt
    assert outcome.moved == sum(r.moves for r in outcome.requests)
    assert 0 < outcome.busy_seconds <= outcome.replica_seconds


def test_a_seed_gives_the_same() -> None:
    a, b = (states(simulate(deaths=(4.0,), seed=7)) for _ in range(2))
    assert a == b
    assert a != states(simulate(deaths=(4.0,), seed=8))


def test_littles_law() -> None:
    """Open requests on average = their rate × the time that each is open (Little 1961)."""
    outcome = simulate()
    waited = sum(r.last - r.at - COSTS.overhead for r in outcome.requests)
    assert outcome.open_seconds == pytest.approx(waited)


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_one_row_is_a_queue_with_a_closed_form(busy: float) -> None:
    """Random arrivals, constant times: M/D/1, whose mean wait is ρ / (2 (1 − ρ)) services (Khinchin 1932)."""
    service = 0.05
    costs = StepCosts(decode=((1, 1.0),), prefill=((10, service),), gain=((1, 1.0),), once=0.0, max_rows=1)
    traffic = Traffic(rate=busy / service, seconds=1000.0, lengths=((10, 1),))
    outcome = simulate(traffic, costs, replicas=1)
    waits = [r.last - r.at - service for r in outcome.requests]
    assert np.mean(waits) == pytest.approx(service * busy / (2 * (1 - busy)), rel=0.1)
    assert outcome.busy_seconds == pytest.approx(service * len(outcome.requests))


def test_one_request_alone() -> None:
    request = Request(0.0, 100, 21)
    Cluster(COSTS, Plan(replicas=1), [request]).run()
    prefill = interpolate(COSTS.prefill, 100)
    assert request.first == pytest.approx(prefill + COSTS.overhead)
    assert request.last == pytest.approx(request.first + 10 * 0.01)  # 20 tokens more, two a step


def test_who_arrives_joins_at_the_next_step() -> None:
    first, second = Request(0.0, 16, 101), Request(0.0351, 16, 1)
    costs = StepCosts(decode=((1, 0.01),), prefill=((16, 0.01),), gain=((1, 1.0),), once=0.0)
    Cluster(costs, Plan(replicas=1), [first, second]).run()
    assert second.first == pytest.approx(0.04 + 0.02)  # a step of both
    assert first.last == pytest.approx(0.01 + 100 * 0.01 + 0.01)


def test_after_a_death_only_the_lost_is_computed_again() -> None:
    calm, struck = (Cluster(COSTS, Plan(replicas=2, deaths=d, seed=2), [Request(0.0, 100, 201)]) for d in ((), (0.5,)))
    a, b = (cluster.run().requests[0] for cluster in (calm, struck))
    assert (a.first, b.moves) == (b.first, 1)
    again = b.computed - 100  # its prompt and the tokens that it had
    assert 100 < again < 301
    assert 1.0 < b.last - a.last < 1.0 + interpolate(COSTS.prefill, again) + 0.05  # a second until it is noticed


def test_prefix_cache_forgets_the_oldest() -> None:
    cache = PrefixCache(250)
    a, b, c = (Request(0.0, 100, 5, (("s", 40), (name, 100)), done=5.0) for name in "abc")
    for request in (a, b, c):
        cache.keep(request)
    for request in (a, c, b):
        assert cache.find(request) == 99  # all but the last token
    cache.keep(Request(0.0, 150, 5, (("t", 140), ("d", 150))))
    assert cache.find(Request(0.0, 100, 5, (("a", 100),))) == 0
    assert cache.room >= 0


def test_prefix_routing_saves_prompts_and_ours_stays_even() -> None:
    traffic = Traffic(rate=20.0, seconds=40.0, systems=24, system_tokens=600)
    found = {rule: figures(simulate(traffic, routing=rule), 10.0, 40.0, 1.0, 0.1, 1.0) for rule in RULES}
    ours = found["prefix unless busy"]
    assert ours["prefix_hits"] > found["two choices"]["prefix_hits"] + 0.1
    assert ours["ttft_p99_s"] < found["random"]["ttft_p99_s"]
    assert ours["busiest_to_mean"] < found["prefix"]["busiest_to_mean"]


def test_a_busy_replica_is_left_alone() -> None:
    beginnings = Beginnings()
    router = Router("prefix unless busy", beginnings, random.Random(0))
    loads = np.array([0.0, 0.0, 0.0])
    router.look([0, 1, 2], loads)
    request = Request(0.0, 100, 5, (("s", 80), ("x", 100)))
    beginnings.add(request, 2)
    for load, chosen in ((4.0, {2}), (5.0, {0, 1})):
        loads[2] = load
        assert router.choose(request) in chosen
    with pytest.raises(ValueError, match="a routing is one of random, least busy"):
        Router("nearest", beginnings, random.Random(0))


def test_scaling_follows_the_load() -> None:
    traffic = Traffic(rate=20.0, seconds=60.0, wave=0.9)
    rule = Scaling(target=4, least=1, most=12, every=1.0, up_after=2.0, down_after=5.0)
    scaled, fixed = simulate(traffic, replicas=1, scaling=rule), simulate(traffic, replicas=12)
    assert 1 < scaled.most_replicas <= 12 + 3  # some may still drain
    assert scaled.replica_seconds < 0.7 * fixed.replica_seconds
    assert fixed.replica_seconds == pytest.approx(12 * fixed.seconds)


def test_costs_are_kept_and_grow(tmp_path: Path) -> None:
    COSTS.save(tmp_path / "costs.json", {"machine": "test"})
    assert StepCosts.load(tmp_path / "costs.json") == COSTS
    for rows, tokens in itertools.product((0, 1, 5, 8), (1, 100, 512)):
        assert COSTS.seconds(rows, tokens) >= max(COSTS.seconds(0, tokens), COSTS.seconds(rows, 0) if rows else 0)
    assert COSTS.most_prompt_tokens(0) == 512 > COSTS.most_prompt_tokens(1)
    assert StepCosts.load(from_results.RESULTS / "cluster" / "h200_7b.json") == from_results.costs()


def test_a_small_experiment() -> None:
    found = experiments.run(COSTS, 2.0, Plan(replicas=2), Traffic(rate=5.0, seconds=20.0), 5.0)
    assert found["replica_hours"] == pytest.approx(2 * 20 / 3600, rel=0.2)
    assert found["cost_per_million_tokens"] > 0
    assert 0 < found["busy"] < 1


def test_calibration_recovers_the_costs_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of which everything is known: the calibration sees its clock, its counters and its answers."""
    server = Pretended()
    monkeypatch.setattr("cluster.calibrate.ask", server.ask)
    monkeypatch.setattr("cluster.calibrate.counters", server.counters)
    monkeypatch.setattr("cluster.calibrate.perf_counter", lambda: server.now)
    monkeypatch.setattr("cluster.calibrate.sleep", server.sleep)
    found = asyncio.run(Calibration("x", server, 8, 512).run((1, 4, 8), (64, 256, 512), 1))  # type: ignore[arg-type]
    for rows, seconds in found.decode:
        assert seconds == pytest.approx(COSTS.seconds(int(rows), 0), rel=0.01)
    for tokens, seconds in found.prefill:
        assert seconds == pytest.approx(COSTS.seconds(0, int(tokens)), rel=0.02)
    assert [gain for _, gain in found.gain] == [2.0, 2.0, 2.0]
    assert found.spread == 0


class Pretended:
    """A step is made whenever the first open row is looked at, or a prompt comes, which the step computes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.open: list[list[float]] = []
        self.counts = {"engine_steps_total": 0.0, "decoding_row_steps_total": 0.0, "generation_tokens_total": 0.0}

    def prompt(self, request: Request, _: int) -> list[int]:
        return [0] * request.prompt

    async def counters(self, _: str) -> dict[str, float]:
        return dict(self.counts)

    async def sleep(self, _: float) -> None:
        await asyncio.sleep(0)

    def step(self, tokens: int) -> None:
        self.now += COSTS.seconds(len(self.open), tokens)
        self.counts["engine_steps_total"] += 1
        self.counts["decoding_row_steps_total"] += len(self.open)
        self.counts["generation_tokens_total"] += 2 * len(self.open)
        for row in self.open:
            row[0] -= 2

    async def ask(self, _: str, prompt: list[int], output: int) -> tuple[float, float, int]:
        self.step(len(prompt))
        first, row = self.now + COSTS.overhead, [output - 1.0]
        if output > 1:
            self.open.append(row)
            while row[0] > 0:
                if row is self.open[0]:
                    self.step(0)
                await asyncio.sleep(0)
            self.open.remove(row)
        return first, self.now, -(-(output - 1) // 2)
