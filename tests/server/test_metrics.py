from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from manyheads.bench import counters
from manyheads.server.metrics import _PER_TOKEN, TokenGaps
from tests.server.conftest import Running, eventually
from tests.server.fake_engine import MEMORY

VLLM_NAMES = [  # what dashboards made for vLLM ask for
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_count",
    "request_time_per_output_token_seconds_sum",
    "e2e_request_latency_seconds_sum",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
]


ENDPOINT_PICKER = [  # what the Gateway API inference extension's endpoint picker asks for
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
]


def scrape(client: httpx.Client) -> dict[str, float]:
    """Samples by name and labels, our own prefix left out."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            assert sample.name.startswith("manyheads_") or sample.name in ENDPOINT_PICKER
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            key = sample.name.removeprefix("manyheads_") + (f"[{labels}]" if labels else "")
            assert key not in samples
            samples[key] = sample.value
    return samples


def settled(client: httpx.Client) -> dict[str, float]:
    """A scrape with nothing running; the engine's own numbers come a moment after the answer."""
    assert eventually(lambda: scrape(client)["num_requests_running"] == 0)
    return scrape(client)


def test_names(client: httpx.Client) -> None:
    names = {key.split("[")[0] for key in scrape(client)}
    assert set(VLLM_NAMES) <= names


def test_an_endpoint_picker_finds_the_load(client: httpx.Client) -> None:
    with client.stream("POST", "/generate_stream", json={"prompt": "SLOW"}) as response:
        lines = response.iter_lines()  # kept, for its end is the connection's
        next(lines)
        assert eventually(lambda: scrape(client)["vllm:num_requests_running"] == 1)
        assert scrape(client)["vllm:kv_cache_usage_perc"] == pytest.approx(1 / 64)
    samples = settled(client)
    assert samples["vllm:num_requests_waiting"] == 0
    assert samples["vllm:cache_config_info[block_size=16,num_gpu_blocks=64]"] == 1


def test_what_moves(client: httpx.Client) -> None:
    before = settled(client)
    body = {"prompt": "Hi you", "n": 2, "max_tokens": 9}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    client.post("/generate", json={"prompt": "Hi", "parameters": {"stop": ["mat"]}})
    assert client.post("/v1/completions", json={"prompt": "FAIL"}).status_code == 503
    assert eventually(lambda: scrape(client)["generation_tokens_total"] >= before["generation_tokens_total"] + 18)
    after = settled(client)
    moved = {key: after[key] - before[key] for key in after}
    assert moved["request_success_total[finished_reason=length]"] == 2
    assert moved["request_success_total[finished_reason=stop]"] == 1
    assert moved["request_success_total[finished_reason=error]"] == 1
    assert moved["request_success_total[finished_reason=abort]"] == 0
    assert moved["requests_rejected_total"] == 0
    assert moved["e2e_request_latency_seconds_count"] == 4
    assert moved["time_to_first_token_seconds_count"] == 3
    assert moved["request_generation_tokens_count"] == 4
    assert moved["request_prompt_tokens_sum"] > 2 * usage["prompt_tokens"]
    # 9 tokens, 3 a step: all but the first one have a gap to the one before
    assert moved["inter_token_latency_seconds_count"] >= 2 * 8
    assert moved["prompt_tokens_total"] > 2 * usage["prompt_tokens"]
    assert moved["engine_steps_total"] >= 3
    assert moved["decoding_row_steps_total"] >= 6
    assert all(value >= 0 for key, value in moved.items() if key.split("[")[0].endswith(("_total", "_count", "_sum")))


def test_gaps_are_a_histogram() -> None:
    """Prometheus' own histogram says the same, but for when it was made."""
    registry, gaps = CollectorRegistry(), TokenGaps("gaps", "text")
    plain = Histogram("gaps", "text", buckets=_PER_TOKEN)
    registry.register(gaps)
    for seconds, count in ((0.0, 1), (0.001, 2), (0.0011, 3), (0.5, 1), (2.5, 4), (3.0, 2)):
        gaps.observe(seconds, count)
        for _ in range(count):
            plain.observe(seconds)
    lines = [line for line in generate_latest(plain).decode().splitlines() if "_created" not in line]
    assert generate_latest(registry).decode().splitlines() == lines


def test_gauges_by_depth(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 9}).raise_for_status()
    assert eventually(lambda: scrape(client)["tokens_per_step"] > 0)
    samples = settled(client)
    rates = [samples[f"spec_decode_acceptance_rate[depth={d}]"] for d in (1, 2, 3)]
    assert rates == pytest.approx([0.6, 0.4, 0.5])  # the fake engine's
    assert samples["spec_decode_drafted_by_depth_total[depth=1]"] == 10
    assert samples["tokens_per_step"] > 1
    assert samples["kv_cache_usage_perc"] == 0


def test_memory(server: Running, client: httpx.Client) -> None:
    samples = settled(client)
    kinds = {key: value for key, value in samples.items() if key.startswith("memory_bytes")}
    assert {key: int(value) for key, value in kinds.items()} == {
        f"memory_bytes[kind={kind}]": getattr(MEMORY, kind)
        for kind in ("weights", "heads", "kv_cache", "graphs", "rest")
    }
    assert sum(kinds.values()) == MEMORY.total
    assert samples["kv_cache_tokens"] == 1024
    seen = counters.look(server.url)
    assert seen is not None
    assert sum(seen.memory.values()) == MEMORY.total  # the load test's report reads it
    assert server.errors().splitlines()[0] == (
        "memory: weights 13.5 GiB, heads 1.0 GiB, K/V 3.0 GiB (1,024 tokens), graphs 717 MiB, rest 512 MiB; "
        "a request may have 2,048 tokens, for 4,096 do not fit"
    )


def test_running_requests_are_seen(server: Running, client: httpx.Client) -> None:
    settled(client)
    aborted = "request_success_total[finished_reason=abort]"
    before = scrape(client)[aborted]
    with client.stream("POST", "/generate_stream", json={"prompt": "SLOW"}) as response:
        lines = response.iter_lines()  # kept, for its end is the connection's
        next(lines)
        assert eventually(lambda: scrape(client)["num_requests_running"] == 1)
        assert scrape(client)["kv_cache_usage_perc"] == pytest.approx(1 / 64)
    assert eventually(lambda: scrape(client)[aborted] == before + 1)


def test_refusals_of_the_queue_are_counted(client: httpx.Client) -> None:
    before = scrape(client)["requests_rejected_total"]
    body = {"prompt": ["Hi"] * 16, "n": 4, "max_tokens": 2000, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        refused = client.post("/generate", json={"prompt": "Hi"})
    assert refused.status_code == 429
    assert refused.headers["Retry-After"]
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert scrape(client)["requests_rejected_total"] == before + 1
