"""Records become figures here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from manyheads.bench.plan import Kind, Use
from manyheads.bench.record import UNFINISHED, Record
from manyheads.bench.result import Generator, Level, Point, Summary

NEAR_LIMIT = 0.9
"""A process of the generator that takes this share of a core is at its limit; Locust has the same threshold."""
LAG = 0.05
"""Timers that are late by more seconds than this blur times to first token."""
LATE = 0.1
"""Arrivals that are late by more seconds than this are no longer the load that was asked for."""
ANSWERED = 0.9
"""A server that answers a smaller share of arrivals than this while they come counts as overloaded."""
CHANCE = 4.0
"""Standard deviations, by Poisson, by which what is under way may grow: arrivals come in bursts, and these are answered
slower than others."""
POINTS = 60


def percentile(ordered: Sequence[float], p: float) -> float:
    """Return a percentile of sorted values, linear between neighbours as numpy has it; p is in [0, 100]."""
    place = (len(ordered) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(values: Sequence[float | None]) -> Summary | None:
    """Return the summary of the values that are there, or None if there are none."""
    ordered = sorted(v for v in values if v is not None)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, p) for p in (50, 90, 95, 99))
    quantiles = [round(percentile(ordered, p), 6) for p in range(0, 101, 2)]
    mean = math.fsum(ordered) / len(ordered)
    return Summary(len(ordered), mean, p50, p90, p95, p99, ordered[-1], quantiles)


def make_level(
    records: Sequence[Record],
    window: tuple[float, float],
    load: float,
    kind: Kind,
    objectives: dict[str, float],
) -> Level:
    """Return the figures of a window of the monotonic clock.

    Throughput counts what came within it. Latencies are, in a closed loop, of the requests that ended within it; in an
    open loop, of those sent within it, however late they were answered: at overload the others are the quick ones.
    """
    start, end = window
    seconds = max(end - start, 1e-9)
    sent = [r for r in records if start <= r.sent < end]
    ended = [r for r in records if start <= r.ended < end and r.reason != UNFINISHED]
    judged = ended if kind == "users" else [r for r in sent if r.reason != UNFINISHED]
    good = [r for r in judged if r.ok]
    failures = Counter(r.reason for r in judged if r.reason is not None)
    answered = [r for r in ended if r.ok]
    prompts = [r.prompt_tokens for r in good if r.prompt_tokens is not None]
    outputs = [r.tokens for r in good if r.tokens is not None]
    within = [r for r in good if meets(r, objectives)]
    steps = [(r.tokens, r.steps) for r in good if r.tokens and r.steps]
    chunks = sum(len(r.chunks) for r in good)
    per_chunk = sum(outputs) / chunks if chunks and outputs else None
    tokens = sum(r.tokens_between(start, end) for r in records if r.ok)
    # nobody has told how many tokens the unfinished ones had: as many a chunk as the others
    tokens += sum(r.chunks_between(start, end) for r in records if r.reason == UNFINISHED) * (per_chunk or 1.0)
    overlap = sum(max(0.0, min(r.ended, end) - max(r.sent, start)) for r in records)
    in_flight = overlap / seconds
    behind = len(sent) - len(answered)
    by_chance = CHANCE * math.sqrt(2 * max(in_flight, 1.0))  # both ends of the window have Poisson's variance
    return Level(
        load=load,
        seconds=seconds,
        sent=len(sent),
        completed=len(good),
        failed=len(judged) - len(good),
        unfinished=sum(r.reason == UNFINISHED for r in sent),
        failures=dict(failures.most_common()),
        requests_per_s=len(answered) / seconds,
        prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        output_tokens=sum(outputs) / len(outputs) if outputs else None,
        output_tokens_per_s=tokens / seconds,
        total_tokens_per_s=(tokens + sum(r.prompt_tokens or 0 for r in answered)) / seconds,
        in_flight=in_flight,
        ttft=summarize([r.ttft for r in good]),
        tpot=summarize([r.tpot for r in good]),
        gap=summarize([gap for r in good for gap in r.gaps]),
        e2e=summarize([r.seconds for r in good]),
        tokens_per_chunk=per_chunk,
        tokens_per_step=sum(t for t, _ in steps) / sum(s for _, s in steps) if steps else None,
        good=len(within),
        goodput=len(within) / seconds,
        overloaded=kind != "users" and behind > max((1 - ANSWERED) * len(sent), by_chance),
    )


def meets(record: Record, objectives: dict[str, float]) -> bool:
    """Tell whether a request was within the objectives; one without a second token has no time per token to miss."""
    if not record.ok or record.ttft is None:
        return False
    return record.ttft <= objectives["ttft"] and (record.tpot is None or record.tpot <= objectives["tpot"])


def generator_use(uses: Sequence[Use], records: Sequence[Record], window: tuple[float, float]) -> Generator:
    """Return how busy the generator was, and whether that spoils the window's figures."""
    start, end = window
    inside = [u for u in uses if start <= u.at < end]
    busy: dict[int, tuple[float, float]] = {}
    for use in inside:
        cpu, wall = busy.get(use.worker, (0.0, 0.0))
        busy[use.worker] = (cpu + use.cpu, wall + use.seconds)
    cpu_share = max((cpu / wall for cpu, wall in busy.values() if wall), default=None)
    lags = sorted(late for u in inside for late in u.lags)
    lag = percentile(lags, 95) if lags else None
    lates = sorted(r.sent - r.due for r in records if r.due is not None and start <= r.sent < end)
    late = percentile(lates, 99) if lates else None
    bound = []
    if cpu_share is not None and cpu_share >= NEAR_LIMIT:
        bound.append(f"a process of the generator was busy {cpu_share:.0%} of the time (limit {NEAR_LIMIT:.0%})")
    if lag is not None and lag > LAG:
        bound.append(f"its timers were late by {lag * 1e3:.0f} ms (limit {LAG * 1e3:.0f} ms)")
    if late is not None and late > LATE:
        bound.append(f"requests were sent late by up to {late * 1e3:.0f} ms (limit {LATE * 1e3:.0f} ms)")
    return Generator(cpu_share, lag, late, bound)


def near_limit(level: Level, limit: dict[str, float]) -> list[str]:
    """Say whether a load came close to what the generator can do at all; empty if not."""
    most = limit.get("chunks_per_s")
    came = level.output_tokens_per_s / (level.tokens_per_chunk or 1.0)
    if not most or came < NEAR_LIMIT * most:
        return []
    return [f"{came:.0f} chunks/s are close to the {most:.0f} that the generator can read"]


def make_timeline(records: Sequence[Record], start: float, end: float) -> list[Point]:
    """Cut the run into at most POINTS slices of at least a second, and return their figures."""
    if end <= start:
        return []
    width = max(1.0, (end - start) / POINTS)
    points = []
    for i in range(math.ceil((end - start) / width)):
        low, high = start + i * width, min(start + (i + 1) * width, end)
        if high - low < width / 2:
            break
        ended = [r for r in records if low <= r.ended < high]
        latencies = sorted(r.seconds for r in ended if r.ok)
        points.append(
            Point(
                at=(low + high) / 2 - start,
                in_flight=sum(max(0.0, min(r.ended, high) - max(r.sent, low)) for r in records) / (high - low),
                requests_per_s=len(latencies) / (high - low),
                tokens_per_s=sum(r.tokens_between(low, high) for r in records) / (high - low),
                failures_per_s=sum(r.failed for r in ended) / (high - low),
                p50=percentile(latencies, 50) if latencies else None,
            )
        )
    return points
