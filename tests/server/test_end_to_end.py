"""`manyheads serve` as it is, with the built-in model and its engine process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from manyheads import LLM, SamplingParams
from tests.server.conftest import ROOT, Running, free_port

QUESTION = "Tell me something about hip hop."


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "manyheads",
        "serve",
        "--port",
        str(port),
        "--drain-timeout",
        "1",
        "--max-num-seqs",
        "8",
    ]
    command += ["--tree-size", "8"]  # whatever speculation pays on this machine
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    temp = tmp_path_factory.mktemp("served")
    running = Running(process, f"http://127.0.0.1:{port}", temp, temp).wait_ready(120)
    yield running
    if process.poll() is None:
        running.stop()


@pytest.fixture
def web(builtin: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=builtin.url, timeout=60) as client:
        yield client


def test_the_first_versions_client_gets_a_sensible_reply(web: httpx.Client) -> None:
    parameters = {"temperature": 0.5, "max_steps": 100}
    reply = web.post("/generate", json={"prompt": QUESTION, "parameters": parameters}).json()
    words = re.findall(r"[a-z]+", reply["response"].lower())
    assert len(words) > 15
    assert {"hip", "hop", "music"} <= set(words)
    assert reply["details"]["steps"] <= 100
    assert reply["details"]["generated_tokens"] > reply["details"]["steps"]


def test_eight_at_once_get_what_each_gets_alone(web: httpx.Client) -> None:
    def ask(i: int) -> dict[str, Any]:
        parameters = {"temperature": 0.0, "max_new_tokens": 10 + 15 * i}
        prompt = QUESTION if i % 2 else "Write a short story about a dragon. " * (1 + i)
        reply = web.post("/generate", json={"prompt": prompt, "parameters": parameters})
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    with ThreadPoolExecutor(8) as pool:
        together = [reply["response"] for reply in pool.map(ask, range(8))]
    assert together == [ask(i)["response"] for i in range(8)]
    assert all(together)


def test_the_openai_package(builtin: Running) -> None:
    client = openai.OpenAI(base_url=f"{builtin.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": "builtin", "messages": messages, "temperature": 0.0, "max_tokens": 60}
    whole = client.chat.completions.create(**options)
    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens > 10
    completion = client.completions.create(model="builtin", prompt="Once there was", max_tokens=8, logprobs=2, n=2)
    assert len(completion.choices) == 2
    assert completion.choices[0].logprobs is not None


def test_the_metrics_know_of_speculation(web: httpx.Client) -> None:
    web.post("/generate", json={"prompt": QUESTION, "parameters": {"max_new_tokens": 50}})
    samples = {s.name: s.value for f in text_string_to_metric_families(web.get("/metrics").text) for s in f.samples}
    assert samples["manyheads_generation_tokens_total"] > 0
    assert samples["manyheads_kv_cache_tokens"] >= 2048
    memory = {
        s.labels["kind"]: s.value
        for f in text_string_to_metric_families(web.get("/metrics").text)
        for s in f.samples
        if s.name == "manyheads_memory_bytes"
    }
    assert all(memory[kind] > 2**20 for kind in ("weights", "heads", "kv_cache", "rest"))
    assert any("accepted" in name and value > 0 for name, value in samples.items())


def test_offline_gives_the_same_text(web: httpx.Client) -> None:
    parameters = {"temperature": 0.0, "max_new_tokens": 40}
    served = web.post("/generate", json={"prompt": QUESTION, "parameters": parameters}).json()["response"]
    llm = LLM(max_num_seqs=2, num_threads=1)
    messages = [{"role": "user", "content": QUESTION}]
    assert llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=40))[0].outputs[0].text == served


def test_it_ends_while_answering(builtin: Running) -> None:
    """Last in this file."""
    with httpx.Client(base_url=builtin.url, timeout=60) as web, ThreadPoolExecutor(1) as pool:
        body = {"prompt": QUESTION, "parameters": {"max_new_tokens": 1900, "ignore_eos": True}}
        long = pool.submit(web.post, "/generate", json=body)
        while "num_requests_running 1.0" not in web.get("/metrics").text:
            assert not long.done()
        assert builtin.stop(signal.SIGINT) < 5
        assert long.result().status_code in (200, 503)
