"""`manyheads serve` as it is, with the built-in model and its engine process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field

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


def test_answers_of_a_schema(builtin: Running) -> None:
    class Person(BaseModel, extra="forbid"):
        name: str = Field(max_length=30)
        age: int = Field(ge=0, le=150)
        likes: list[Literal["music", "dance", "tea"]] = Field(max_length=2)

    client = openai.OpenAI(base_url=f"{builtin.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Who is Anna?"}]
    options: Any = {"model": "builtin", "messages": messages, "temperature": 1.0, "seed": 3, "max_tokens": 150}
    parsed = client.chat.completions.parse(**options, response_format=Person).choices[0]
    assert parsed.finish_reason == "stop"
    assert isinstance(parsed.message.parsed, Person)
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    pieces = list(client.chat.completions.create(**options, response_format=form, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == parsed.message.content
    plain = client.chat.completions.create(**options, response_format=form, extra_body={"speculative": False})
    assert plain.choices[0].message.content == parsed.message.content


FORMS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}, "max_tokens": 5}, r"\{.*"),
    ("/v1/chat/completions", {"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ("/v1/completions", {"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"}}, "[0-9]{3}-[a-z]{2}"),
    ("/v1/completions", {"guided_json": {"enum": [1, "a"]}}, '1|"a"'),
    ("/v1/completions", {"guided_grammar": 'root ::= "x" [yz]'}, "x[yz]"),
    ("/generate", {"parameters": {"grammar": {"type": "regex", "value": "b+c"}, "logit_bias": {}}}, "b+c?"),
]


@pytest.mark.parametrize(("path", "fields", "pattern"), FORMS)
def test_forms_of_answers(web: httpx.Client, path: str, fields: dict[str, Any], pattern: str) -> None:
    chat = {"messages": [{"role": "user", "content": QUESTION}]}
    body = {**(chat if "chat" in path else {"prompt": QUESTION}), **fields}
    answer = web.post(path, json=body).json()
    choice = answer["choices"][0] if "choices" in answer else {"text": answer["response"]}
    text = choice.get("text", choice.get("message", {}).get("content"))
    assert re.fullmatch(pattern, text), text


def test_a_bad_grammar_is_told_before_anything_is_streamed(web: httpx.Client) -> None:
    schema = {"type": "object", "not": {"required": ["a"]}}
    form = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
    for stream in (False, True):
        response = web.post("/v1/chat/completions", json={**body, "stream": stream})
        assert response.status_code == 400
        assert 'Unimplemented keys: ["not"]' in response.json()["error"]["message"]


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


def test_steps_say_what_was_guessed(web: httpx.Client) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, "return_steps": True, "stream": True}
    lines = web.post("/v1/chat/completions", json=body).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    told = [(choice["delta"]["content"], choice["steps"][0]) for choice in choices if choice.get("steps")]
    for text, step in told[:-1]:
        right = [guess["token"] for guess in step["guesses"] if guess["accepted"]]
        assert step["num_tokens"] == len(right) + 1
        assert text.startswith("".join(right))
        assert len(step["guesses"]) < 8  # --tree-size 8
    assert sum(step["num_tokens"] for _, step in told) > 1.5 * len(told)


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
