from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import Running

HELLO = [{"role": "user", "content": "hello"}]
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
        (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of"),
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
        (TEXT, {}, 400, "'prompt' is required"),
        (GENERATE, {"prompt": ""}, 400, "empty"),
        (GENERATE, {"prompt": "a", "parameters": {"max_new_tokens": 0}}, 400, "max_tokens"),
        (GENERATE, {"prompt": "a", "parameters": {"maxtokens": 5}}, 400, "parameters.maxtokens"),
        (GENERATE, {"prompt": "hello " * 5000}, 400, "context"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
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
        (CHAT, {"messages": HELLO, "nonsense": 1}, 400, "unknown field 'nonsense'"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
        (CHAT, {"messages": HELLO, "seed": 2**70}, 400, "seed"),
        (CHAT, [1, 2], 400, "JSON object"),
    ],
)
def test_refused_with_a_reason(client: httpx.Client, path: str, body: Any, status: int, word: str) -> None:
    content = json.dumps(body).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    check(response, status, word)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b'{"prompt": "\xff\xfe"}',
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

    # the server may close before all is sent, which is its right
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        check(client.post(GENERATE, content=chunks()), 413, "4194304")
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        check(client.post(GENERATE, content=b"x" * 10_000_000), 413)
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
        "reasoning_effort": "low",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stop": None,
        "logit_bias": {"5": -100},
    }
    assert client.post(CHAT, json=body).status_code == 200
