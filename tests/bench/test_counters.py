"""Counters of our server and of vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from manyheads.bench.counters import Counters, acceptance, by_engine, parse, tokens_per_step
from manyheads.server.metrics import Metrics
from manyheads.stats import EngineStats

VLLM = """# HELP vllm:generation_tokens_total Tokens
vllm:generation_tokens_total{engine="0",model_name="m"} 300.0
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 80.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 60.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 20.0
vllm:e2e_request_latency_seconds_bucket{le="+Inf"} 3.0
"""


def told(stats: EngineStats, by_engine: dict[str, EngineStats] | None = None) -> Counters:
    """What our server's page says of such statistics."""
    engine = SimpleNamespace(stats=stats, num_restarts=0, num_resumed=0, by_engine=by_engine or {})
    found = parse(Metrics(engine, SimpleNamespace(page_size=16, num_pages=9)).render().decode())
    assert found is not None
    return found


def test_ours() -> None:
    stats = EngineStats(generation_tokens=30, row_steps=20, drafted_by_depth=[20, 10], accepted_by_depth=[8, 2])
    seen = told(stats)
    assert (seen.tokens, seen.row_steps) == (30, 20)
    assert tokens_per_step(Counters(), seen) == 1.5
    assert acceptance(Counters(), seen) == [0.4, 0.2]


def test_of_several_engines() -> None:
    """A replica that was started meanwhile has its own name."""

    def seen(**tokens: int) -> Counters:
        return told(EngineStats(), {name: EngineStats(generation_tokens=count) for name, count in tokens.items()})

    assert by_engine(seen(a=5, b=7), seen(a=11, c=4)) == {"a": 6, "c": 4}


def test_of_vllm() -> None:
    seen = parse(VLLM)
    assert seen is not None
    assert tokens_per_step(Counters(), seen) == pytest.approx(1.8)
    assert acceptance(Counters(), seen) == pytest.approx([0.6, 0.2])


def test_of_others() -> None:
    assert parse("go_goroutines 7\nnonsense\n") is None
    assert tokens_per_step(Counters(), Counters()) is None
    assert acceptance(Counters(), Counters()) == []


def test_memory_by_part() -> None:
    seen = parse('manyheads_memory_bytes{kind="weights"} 5e+07\nmanyheads_memory_bytes{kind="kv_cache"} 1e+08\n')
    assert seen is not None
    assert seen.memory == {"weights": 50_000_000, "kv_cache": 100_000_000}
