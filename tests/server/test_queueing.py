from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.requests import Request

from manyheads.server.auth import client_of

TEXT = {"prompt": "Hi", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def bodies(**fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """A request to each endpoint, plain and as a stream."""
    return [
        ("/v1/completions", TEXT | fields),
        ("/v1/completions", TEXT | fields | {"stream": True}),
        ("/v1/chat/completions", CHAT | fields),
        ("/v1/chat/completions", CHAT | fields | {"stream": True}),
        ("/generate", {"prompt": "Hi", "parameters": fields}),
        ("/generate_stream", {"prompt": "Hi", "parameters": fields}),
    ]


@pytest.mark.parametrize(("path", "body"), bodies(timeout=0.5))
def test_who_cannot_start_in_time_is_told_when_to_come_back(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "9"
    error = response.json()["error"]
    assert error["code"] == "queue_full"
    assert error["message"] == "the server is busy: it would start in about 9.0 s; try again in 9 s"


@pytest.mark.parametrize(("path", "body"), bodies(timeout=5, priority=-3))
def test_whose_request_it_is_reaches_the_engine(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    asking = body | ({"messages": [{"role": "user", "content": "WHO"}]} if "messages" in body else {"prompt": "WHO"})
    response = client.post(path, json=asking)
    assert "address 127.0.0.1, priority -3, timeout 5.0" in response.text


@pytest.mark.parametrize(
    "fields", [{"timeout": 0}, {"timeout": -1}, {"timeout": "soon"}, {"priority": 0.5}, {"priority": 2**31}]
)
def test_places_that_cannot_be(client: httpx.Client, fields: dict[str, Any]) -> None:
    for path, body in bodies(**fields):
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == ("parameters." if "/generate" in path else "") + next(iter(fields))


def test_a_client_is_its_keys_name_or_its_address() -> None:
    scope = {"type": "http", "client": ("10.0.0.1", 1234), "headers": [(b"authorization", b"Bearer secret")]}
    assert client_of(Request(scope)) == "address 10.0.0.1"
    assert client_of(Request(scope | {"state": {"client": "reports"}})) == "key reports"
    assert client_of(Request(scope | {"client": None})) == "address unknown"
