from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types import chat, completion_create_params

from manyheads.server.schemas import ChatRequest, CompletionRequest
from tests.server.conftest import Running

HELLO = [{"role": "user", "content": "hello"}]
NAMELESS = {"schema": {"type": "object"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
OTHER = {"type": "function", "function": {"name": "other"}}
DEEP: Any = "deep"
for _ in range(80):
    DEEP = [DEEP]
CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"


def check(response: httpx.Response, status: int, *words: str) -> None:
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        (TEXT, {"prompt": ""}, 400, "empty"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {"prompt": ["a", ""]}, 400, "empty"),
        (TEXT, {"prompt": [10**9]}, 400, "token ids"),
        (TEXT, {"prompt": [-1]}, 400, "token ids"),
        (TEXT, {"prompt": ["a"] * 300}, 400, "prompts"),
        (TEXT, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        (TEXT, {"prompt": "a", "best_of": 2, "n": 3}, 400, "best_of"),
        (TEXT, {"prompt": "a", "best_of": 3, "stream": True}, 400, "best_of"),
        (TEXT, {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        (TEXT, {"prompt": "a", "temperature": True}, 400, "temperature"),
        (TEXT, {"prompt": "a", "echo": 1}, 400, "echo"),
        (TEXT, {"prompt": "a", "allowed_token_ids": [10**9]}, 400, "allowed_token_ids"),
        (TEXT, {"prompt": "a", "bad_words": [""]}, 400, "bad word"),
        (TEXT, {"prompt": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
        (TEXT, {"prompt": "a", "logprobs": 100}, 400, "logprobs"),
        (TEXT, {"prompt": "hello " * 5000}, 400, "context"),
        (TEXT, {"prompt": "a" * 3_000_000}, 400, "context"),
        (TEXT, {"prompt": "\ud800"}, 400, "prompt"),
        (TEXT, {"prompt": ["\ud800"]}, 400, "prompt"),
        (GENERATE, {"prompt": "\ud800"}, 400, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "content"),
        (CHAT, {"messages": HELLO, "stop": "\ud800"}, 400, "stop"),
        (CHAT, {"messages": HELLO, "model": "\ud800"}, 400, "model"),
        (CHAT, {"messages": HELLO, "\ud800": "x"}, 400, "unknown"),
        (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
        (TEXT, {"prompt": "a", "max_tokens": 2**31}, 400, "max_tokens"),
        (TEXT, {"prompt": "a", "n": 10**6}, 400, "n must be"),
        (TEXT, {"prompt": ["a"] * 20, "n": 4}, 400, "this server queues 64"),
        (TEXT, {"prompt": "a", "temperature": 1e30}, 400, "temperature"),
        (TEXT, {"prompt": "a", "model": "gpt-4"}, 404, "'fake'"),
        (TEXT, {"prompt": "a", "model": ""}, 404, "'fake'"),
        (TEXT, {"prompt": "a", "stop": ["x"] * 10_000}, 400, "stop"),
        (TEXT, {"prompt": "a", "stop": "x" * 10_000}, 400, "stop"),
        (TEXT, {}, 400, "'prompt' is required"),
        (GENERATE, {"prompt": ""}, 400, "empty"),
        (GENERATE, {"prompt": "a", "parameters": {"max_new_tokens": 0}}, 400, "max_tokens"),
        (GENERATE, {"prompt": "hello " * 5000}, 400, "context"),
        (GENERATE, {"prompt": "a", "parameters": {"max_new_tokens": -3}}, 400, "max_tokens"),
        (GENERATE, {"prompt": "a", "parameters": {"max_new_tokens": 10**12}}, 400, "max_tokens"),
        (GENERATE, {"prompt": "a", "parameters": {"n": 10**6}}, 400, "n must be 1"),
        (GENERATE, {"prompt": "a", "parameters": {"stop": ["x"] * 10_000}}, 400, "stop"),
        (CHAT, {"messages": [{"role": "user", "content": "hello " * 5000}]}, 400, "context"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "content"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "\ud800": 1}]}, 400, "unknown field"),
        (CHAT, {"messages": HELLO, "moderation": {"model": "m"}}, 400, "moderation"),
        (CHAT, {"messages": HELLO, "web_search_options": {}}, 400, "does not search the web"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content: input should be a valid str"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "valid string or a valid list"),
        (
            CHAT,
            {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {}}},
            400,
            "'tool_",
        ),
        (CHAT, {"messages": HELLO, "tools": [{"type": "web_search"}]}, 400, "tools.0.type: input should be 'function'"),
        (CHAT, {"messages": HELLO, "top_k": 10**30}, 400, "top_k"),
        (CHAT, {"messages": HELLO, "top_k": 2**63}, 400, "top_k"),
        (CHAT, {"messages": HELLO, "max_steps": 10**30}, 400, "max_steps"),
        (CHAT, {"messages": HELLO, "min_tokens": 2**63 - 1}, 400, "min_tokens"),
        (CHAT, {"messages": HELLO, "stop_token_ids": [10**30]}, 400, "stop_token_ids"),
        (CHAT, {"messages": HELLO, "stop_token_ids": [5000]}, 400, "stop_token_ids"),
        (CHAT, {"messages": HELLO, "logit_bias": {str(10**30): 1}}, 400, "logit_bias"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
        (CHAT, {"messages": [{"role": "tool"}]}, 400, "a tool message needs content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'image_url' parts"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "needs 'text'"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "extra": "\ud800"}]}, 400, "Unicode"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"a": DEEP}}, 400, "nested"),
        (CHAT, {"messages": HELLO, "tools": [TOOL | {"deep": DEEP}]}, 400, "nested"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "there are no tools"),
        (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": "sometimes"}, 400, "tool_choice"),
        (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": OTHER}, 400, "'other'"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "name"),
        (CHAT, {"messages": HELLO, "functions": [{"name": "f"}]}, 400, "use tools"),
        (CHAT, {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}, 400, "continue"),
        (CHAT, {"messages": HELLO, "max_tokens": -5}, 400, "max_tokens"),
        (CHAT, {"messages": HELLO, "max_tokens": 10**9}, 400, "context"),
        (CHAT, {"messages": HELLO, "max_tokens": 10**30}, 400, "max_tokens"),
        (CHAT, {"messages": HELLO, "n": 10**6}, 400, "n must be"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
        (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p"),
        (CHAT, {"messages": HELLO, "stop": ["x"] * 10_000}, 400, "stop"),
        (CHAT, {"messages": HELLO, "stop": [""]}, 400, "stop"),
        (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
        (CHAT, {"messages": HELLO, "model": "gpt-4"}, 404, "gpt-4"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, 400, "response_format: type must be text"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": NAMELESS}}, 400, "name"),
        (CHAT, {"messages": HELLO, "structured_outputs": {}}, 400, "must have one of json, regex"),
        (CHAT, {"messages": HELLO, "structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "not 2 of them"),
        (CHAT, {"messages": HELLO, "structured_outputs": {"yaml": "a"}}, 400, "structured_outputs.yaml"),
        (CHAT, {"messages": HELLO, "guided_json": "{"}, 400, "grammar of kind json: the value is not JSON"),
        (CHAT, {"messages": HELLO, "guided_choice": []}, 400, "grammar of kind choice"),
        (CHAT, {"messages": HELLO, "guided_regex": "a", "guided_json": {}}, 400, "ask for one form of answer"),
        (TEXT, {"prompt": "a", "structured_outputs": {"regex": "\ud800"}}, 400, "surrogate"),
        (CHAT, {"messages": HELLO, "seed": 2**70}, 400, "seed"),
        (CHAT, [1, 2], 400, "JSON object"),
    ],
)
def test_refused_with_a_reason(client: httpx.Client, path: str, body: Any, status: int, word: str) -> None:
    content = json.dumps(body).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    check(response, status, word)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b'{"prompt": "\xff\xfe"}',
        b"\xff\xfe\x00",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "logit_bias": {"1": NaN}}',
        b'{"prompt": "a", "max_tokens": 1e400}',
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    ],
)
def test_bad_json(client: httpx.Client, content: bytes) -> None:
    check(client.post(TEXT, content=content, headers={"Content-Type": "application/json"}), 400)
    assert client.get("/health").status_code == 200


def test_streaming_refusals_are_statuses(client: httpx.Client) -> None:
    check(client.post(CHAT, json={"messages": HELLO, "stream": True, "max_tokens": 10**6}), 400, "context")
    # the fake engine refuses this one, not the server
    check(client.post(TEXT, json={"prompt": "FAIL", "stream": True}), 503, "told to fail")


def test_form_body(client: httpx.Client) -> None:
    check(client.post(GENERATE, data={"prompt": "a"}), 400, "application/json")


def test_wrong_path_and_method(client: httpx.Client) -> None:
    check(client.get("/v2/nothing"), 404, "/v2/nothing", "/docs")
    check(client.get(GENERATE), 405, "GET")


def test_large_body_is_not_read(client: httpx.Client, server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as s:
        s.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10485760\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 413")

    def chunks() -> Iterator[bytes]:
        for _ in range(160):
            yield b"x" * 65536

    check(client.post(GENERATE, content=chunks()), 413, "4194304")
    check(client.post(GENERATE, content=b"x" * 10_000_000), 413)
    just = b'{"prompt": "' + b"x" * (4 * 2**20 - 14) + b'"}'
    check(client.post(GENERATE, content=just, headers={"Content-Type": "application/json"}), 400, "context")
    check(client.post(GENERATE, content=just + b" "), 413)
    assert client.get("/health").status_code == 200


def test_ignored_fields_of_openai(client: httpx.Client) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 2,
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "prompt_cache_options": {"mode": "explicit"},
        "stream_options": {"include_obfuscation": False},
        "verbosity": "low",
        "store": True,
        "modalities": ["text"],
        "prediction": {"type": "content", "content": "a"},
        "moderation": None,
        "reasoning_effort": "low",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stop": None,
        "logit_bias": {"5": -100},
    }
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("endpoint", [chat.completion_create_params, completion_create_params])
def test_every_field_of_openai_is_known(endpoint: Any) -> None:
    schema = ChatRequest if endpoint is chat.completion_create_params else CompletionRequest
    assert endpoint.CompletionCreateParamsBase.__annotations__.keys() <= schema.model_fields.keys()


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HELLO}, {"messages": []}])
def test_tokenize(client: httpx.Client, body: Any) -> None:
    check(client.post("/tokenize", json=body), 400)


def test_detokenize(client: httpx.Client) -> None:
    check(client.post("/detokenize", json={"tokens": [10**30]}), 400, "tokens")
    check(client.post("/detokenize", json={"tokens": [1], "model": "x"}), 404, "'fake'")


def test_pages(client: httpx.Client) -> None:
    for path in ("/", "/docs"):
        assert client.get(path).headers["content-type"].startswith("text/html")
    for link in re.findall(r'(?:src|href)="([^"]+)"', client.get("/docs").text):
        assert link.startswith("/"), "the page needs no network"
        assert client.get(link).status_code == 200
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
