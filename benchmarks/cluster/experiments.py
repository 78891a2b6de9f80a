"""What is simulated and compared: each experiment gives a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cluster.cluster import Cluster, Plan, Scaling
from cluster.costs import StepCosts
from cluster.report import figures
from cluster.routing import RULES
from cluster.traffic import Traffic, read_lengths

TTFT, TPOT, ATTAIN = 0.5, 0.02, 0.95
"""Objectives in seconds, and the share of requests that should meet both, as `manyheads bench mix` has them."""
TENANTS, SYSTEM_TOKENS = 256, 2000
"""So many beginnings of so many tokens are in use."""
OURS = "prefix unless busy"
Table = tuple[list[str], list[list[Any]]]
FIGURES = ["attained", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "prefix_hits", "busiest_to_mean"]


def run(costs: StepCosts, price: float, plan: Plan, traffic: Traffic, settle: float) -> dict[str, Any]:
    """Simulate one case and return its figures."""
    outcome = Cluster(costs, plan, traffic.draw(plan.seed)).run()
    return figures(outcome, settle, traffic.seconds, TTFT, TPOT, price)


def seconds_for(rate: float, requests: float = 8_000) -> float:
    """Return how long to simulate for about so many requests, within limits."""
    return min(120.0, max(2.0, requests / rate))


def full_rate(costs: StepCosts) -> float:
    """Return about the requests/s of a full replica that finds every shared beginning in its cache."""
    pairs = read_lengths()
    return costs.capacity(*(sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1)))


def chats(costs: StepCosts, rate: float, seconds: float, **others: Any) -> Traffic:
    """Return the traffic of the comparisons."""
    given = {"systems": TENANTS, "system_tokens": SYSTEM_TOKENS} | others
    return Traffic(rate=rate, seconds=seconds, spread=costs.spread, **given)


def routings(costs: StepCosts, price: float) -> Table:
    """Find the most requests/s that replicas answer within the objectives by each rule, in steps of a fifth."""
    rates = [full_rate(costs) * 0.08 * 1.2**i for i in range(15)]
    rows = []
    for replicas in (4, 16, 64):
        for rule in RULES:
            best: dict[str, Any] = {}
            low, high = -1, len(rates)
            while high - low > 1:
                middle = (low + high) // 2
                traffic = chats(costs, rates[middle] * replicas, 8.0 + 64 / replicas)
                found = run(costs, price, Plan(replicas=replicas, routing=rule), traffic, traffic.seconds / 2)
                if found["attained"] >= ATTAIN:
                    low, best = middle, found
                else:
                    high = middle
            each = round(rates[low], 1) if low >= 0 else 0.0
            rows.append([replicas, rule, each, *(best.get(key) for key in FIGURES)])
    return ["replicas", "routing", "requests_per_s_each", *FIGURES], rows


def conversations(costs: StepCosts, price: float) -> Table:
    """Compare the rules where conversations of five turns come back after four seconds."""
    replicas, rows = 4, []
    rate = 0.1 * replicas * full_rate(costs)
    for rule in RULES:
        traffic = chats(costs, rate, 40.0, systems=16, turns=5.0, pause=4.0)
        found = run(costs, price, Plan(replicas=replicas, routing=rule), traffic, 20.0)
        rows.append([rule, *(found[key] for key in FIGURES)])
    return ["routing", *FIGURES], rows


def late_news(costs: StepCosts, price: float) -> Table:
    """Compare the rules where several routers hear only so often how busy replicas are."""
    replicas, rows = 32, []
    rate = 0.5 * replicas * full_rate(costs)
    for routers, sync in ((1, 0.5), (4, 0.5), (16, 0.1), (16, 0.5)):
        for rule in (r for r in RULES if r != "prefix"):
            plan = Plan(replicas=replicas, routing=rule, routers=routers, sync_seconds=sync)
            found = run(costs, price, plan, chats(costs, rate, 8.0, systems=16), 3.0)  # every cache holds them
            rows.append([routers, sync, rule, *(found[key] for key in FIGURES)])
    return ["routers", "sync_seconds", "routing", *FIGURES], rows


def scaling(costs: StepCosts, price: float) -> Table:
    """Follow a rate that goes from 0.2 to 1.8 of its mean and back in 40 minutes, by targets of open requests."""
    rate, seconds, rows = 40.0, 2400.0, []
    most = math.ceil(1.8 * rate / (0.25 * full_rate(costs))) + 1
    keys = ["attained", "ttft_p99_s", "replica_hours", "most_replicas", "busy", "cost_per_million_tokens"]
    for target in (None, 8, 16, 32):
        rule = Scaling(target=target, least=1, most=2 * most, down_after=120.0) if target else None
        plan = Plan(replicas=1 if target else most, scaling=rule)
        found = run(costs, price, plan, chats(costs, rate, seconds, wave=0.8), 0.0)
        rows.append([target or f"none: {most} replicas", *(found[key] for key in keys)])
    return ["target_open_requests", *keys], rows


def failures(costs: StepCosts, price: float) -> Table:
    """Let replicas die every so many seconds; requests go on elsewhere with the tokens that they have."""
    replicas, seconds, rows = 16, 60.0, []
    keys = ["attained", "ttft_p99_s", "tpot_p99_s", "whole_p99_s", "moved"]
    for load in (0.3,):
        rate = load * replicas * full_rate(costs)
        for every in (None, 30.0, 10.0):
            deaths = [every * i for i in range(1, int(seconds / every) + 1)] if every else []
            found = run(costs, price, Plan(replicas=replicas, deaths=deaths), chats(costs, rate, seconds), 10.0)
            rows.append([load, every or "never", *(found[key] for key in keys)])
    return ["load", "death_every_s", *keys], rows


def sizes(costs: StepCosts, price: float) -> Table:
    """Find the fewest replicas that answer so many requests/s within the objectives."""
    keys = ["attained", "ttft_p99_s", "tpot_p99_s", "prefix_hits"]
    rows: list[list[Any]] = []
    least = 1.0
    for rate in (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0):
        seconds = max(4.0, seconds_for(rate))
        count = math.ceil(least * rate / full_rate(costs))
        best: tuple[int, dict[str, Any]] | None = None
        while count and (best is None or count < best[0]):
            found = run(costs, price, Plan(replicas=count), chats(costs, rate, seconds), seconds / 4)
            if found["attained"] >= ATTAIN:
                best, count = (count, found), int(count / 1.06)
            elif best is None:
                count = max(count + 1, math.ceil(1.06 * count))
            else:
                break
        assert best is not None
        count, found = best
        if rate >= 1_000:
            least = count * full_rate(costs) / rate  # a larger service hardly needs more of them for a request
        cost = price * count / 3600 / found["output_tokens_per_s"] * 1e6
        rows.append([rate, count, round(rate / count, 1), *(found[key] for key in keys), round(cost, 3)])
    return ["requests_per_s", "replicas", "requests_per_s_each", *keys, "cost_per_million_tokens"], rows


def largest(costs: StepCosts, price: float) -> Table:
    """Run 4,096 replicas for a moment, at half of what they could do."""
    rate, rows = 0.5 * 4096 * full_rate(costs), []
    for rule in ("two choices", OURS):
        found = run(costs, price, Plan(replicas=4096, routing=rule), chats(costs, rate, 1.5), 0.5)
        rows.append([rule, round(rate), *(found[key] for key in FIGURES)])
    return ["routing", "requests_per_s", *FIGURES], rows


EXPERIMENTS: dict[str, Callable[[StepCosts, float], Table]] = {
    "routings": routings,
    "conversations": conversations,
    "late_news": late_news,
    "scaling": scaling,
    "failures": failures,
    "sizes": sizes,
    "largest": largest,
}
