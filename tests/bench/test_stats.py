"""Figures of known records."""

from __future__ import annotations

import pytest

from manyheads.bench.plan import Use
from manyheads.bench.record import CUT, UNFINISHED, Record
from manyheads.bench.stats import generator_use, make_level, make_timeline, meets, percentile, summarize
from tests.bench.samples import OBJECTIVES, record


def test_percentiles() -> None:
    values = [float(v) for v in range(1, 102)]
    found = summarize([None, *reversed(values)])
    assert found is not None
    assert (found.n, found.mean, found.p50, found.p90, found.p95, found.p99, found.max) == (
        101,
        51,
        51,
        91,
        96,
        100,
        101,
    )
    assert found.quantiles == [float(v) for v in range(1, 102, 2)]
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0], 75) == 1.75
    assert summarize([None]) is None


def test_several_tokens_a_chunk() -> None:
    """TPOT is by tokens: 10 tokens in 5 chunks, 0.4 s after the first, are 0.4 / 9 s each."""
    one = record(5.0, [1.0, 1.1, 1.2, 1.3, 1.4])
    assert one.tokens == 10
    assert one.ttft == 1.0
    assert one.tpot == pytest.approx(0.4 / 9)
    assert one.gaps == pytest.approx([0.1] * 4)
    assert one.tokens_between(6.0, 6.25) == pytest.approx(6.0)
    assert record(0.0, [1.0], tokens=1).tpot is None
    assert Record(sent=0.0).ttft is None


def test_level_of_users() -> None:
    records = [record(i * 0.5, [0.1, 0.2, 0.3, 0.4], steps=4) for i in range(10)]
    records += [Record(sent=1.0, seconds=0.1, reason=CUT), Record(sent=4.8, seconds=9.0, reason=UNFINISHED)]
    level = make_level(records, (1.0, 4.0), 2.0, "users", OBJECTIVES)
    # ended in [1, 4): those sent at 1.0 (0.9 is of the one sent at 0.5) to 3.5
    assert (level.completed, level.failed, level.failures) == (6, 1, {CUT: 1})
    assert level.requests_per_s == pytest.approx(2.0)
    assert level.output_tokens_per_s == pytest.approx(16.0)
    assert level.total_tokens_per_s == pytest.approx(16.0 + 14.0)
    assert (level.prompt_tokens, level.output_tokens, level.tokens_per_chunk, level.tokens_per_step) == (7, 8, 2, 2)
    assert level.goodput == pytest.approx(2.0)
    assert level.in_flight == pytest.approx((6 * 0.4 + 0.1) / 3)
    assert not level.overloaded


def test_level_of_arrivals() -> None:
    """Latencies are of those that were sent in the window; a server that falls behind is overloaded."""
    quick = [record(0.1 * i, [0.05, 0.06]) for i in range(10)]
    slow = [record(1.0 + 0.1 * i, [3.0, 3.1]) for i in range(10)]
    level = make_level(quick + slow, (0.0, 2.0), 10.0, "rate", OBJECTIVES)
    assert (level.sent, level.completed, level.good) == (20, 20, 10)
    assert level.requests_per_s == pytest.approx(5.0)
    assert level.goodput == pytest.approx(5.0)
    assert level.overloaded
    assert level.e2e is not None
    assert level.e2e.max == 3.1


def test_a_burst_is_no_overload() -> None:
    """Five of 34 arrivals are unanswered at the end, for they came just before."""
    records = [record(i / 3, [0.1, 0.6]) for i in range(29)] + [record(9.5 + i / 20, [0.1, 0.6]) for i in range(5)]
    level = make_level(records, (0.0, 10.0), 4.0, "rate", OBJECTIVES)
    assert (level.sent, round(level.requests_per_s * 10)) == (34, 29)
    assert not level.overloaded


def test_objectives() -> None:
    assert meets(record(0.0, [0.5, 0.55]), OBJECTIVES)
    assert not meets(record(0.0, [0.51, 0.55]), OBJECTIVES)
    assert not meets(record(0.0, [0.1, 0.3]), OBJECTIVES)
    assert meets(record(0.0, [0.1], tokens=1), OBJECTIVES)
    assert not meets(record(0.0, [0.1, 0.11], reason=CUT), OBJECTIVES)


def test_generator_at_its_limit() -> None:
    calm = [Use(worker, at / 2, 0.5, 0.1, [0.002] * 50) for worker in (0, 1) for at in range(20)]
    assert generator_use(calm, [], (0.0, 10.0)).bound == []
    assert generator_use(calm, [], (0.0, 10.0)).cpu == pytest.approx(0.2)
    busy = [*calm, *(Use(2, at / 2, 0.5, 0.49, [0.002] * 50) for at in range(20))]
    assert "busy 98%" in generator_use(busy, [], (0.0, 10.0)).bound[0]
    late = [Use(0, at / 2, 0.5, 0.1, [0.002] * 40 + [0.3] * 10) for at in range(20)]
    assert "timers were late by 300 ms" in generator_use(late, [], (0.0, 10.0)).bound[0]
    sent_late = [record(1.5, [0.1], due=1.0)]
    assert "sent late by up to 500 ms" in generator_use(calm, sent_late, (0.0, 10.0)).bound[0]
    assert generator_use([], [], (0.0, 10.0)).cpu is None


def test_timeline() -> None:
    points = make_timeline([record(i * 0.5, [0.2, 0.4]) for i in range(20)], 0.0, 10.0)
    assert [p.at for p in points] == [i + 0.5 for i in range(10)]
    assert [p.requests_per_s for p in points] == [2.0] * 10
    assert make_timeline([], 1.0, 1.0) == []


def test_tokens_of_the_unfinished() -> None:
    """What they had brought counts, with as many tokens a chunk as the others brought."""
    records = [record(0.0, [0.1, 0.2]), Record(sent=0.5, seconds=9.0, chunks=[0.1, 0.2, 0.9], reason=UNFINISHED)]
    level = make_level(records, (0.0, 1.0), 2.0, "users", OBJECTIVES)
    assert level.output_tokens_per_s == pytest.approx(4.0 + 4.0)
