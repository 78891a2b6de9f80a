"""Fields that nobody knows are ignored, which log and answer tell; `--strict` refuses them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.server.conftest import Running, launch

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = launch(tmp_path_factory.mktemp("strict"), "--strict", FAKE_TOKENIZER="1").wait_ready()
    yield running
    running.stop()


def test_ignored_and_told(client: httpx.Client, server: Running) -> None:
    body = BODY | {"använd": 1, "stream_options": {"nonsense": 2}, "a,b\r\n": 3}
    for _ in range(2):
        answer = client.post(CHAT, json=body)
        assert answer.status_code == 200
        assert answer.headers["x-manyheads-ignored"] == "anv%C3%A4nd,a%2Cb%0D%0A,stream_options.nonsense"
    assert server.errors().count("the field stream_options.nonsense of a request is ignored") == 1
    assert "x-manyheads-ignored" not in client.post(CHAT, json=BODY).headers
    answer = client.post("/generate", json={"prompt": "a", "parameters": {"max_tokens": 1, "maxtokens": 5}})
    assert answer.headers["x-manyheads-ignored"] == "parameters.maxtokens"


def test_what_messages_hold_is_the_templates(client: httpx.Client) -> None:
    part = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    message = {"role": "user", "content": [part], "name": "me", "cache_control": {}, "anything": [1]}
    answer = client.post(CHAT, json=BODY | {"messages": [message]})
    assert answer.status_code == 200
    assert "x-manyheads-ignored" not in answer.headers
    assert answer.json()["usage"]["prompt_tokens"] == client.post(CHAT, json=BODY).json()["usage"]["prompt_tokens"]


def test_names_are_many_or_long(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=BODY | {f"{i}" + "x" * 1000: i for i in range(1000)})
    assert answer.status_code == 200
    assert len(answer.headers["x-manyheads-ignored"]) < 5000


def test_refused_where_strict(strict: Running) -> None:
    answer = httpx.post(strict.url + CHAT, json=BODY | {"stream_options": {"nonsense": 2}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options.nonsense"
    assert answer.json()["error"]["code"] == "unknown_field"
    assert httpx.post(strict.url + CHAT, json=BODY).status_code == 200
    answer = httpx.post(strict.url + "/v1/responses", json={"input": "hello", "include": ["file_search_call.results"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "include"
    assert "does not do" in answer.json()["error"]["message"]


def test_the_description_says_so(strict: Running, client: httpx.Client) -> None:
    for is_strict, description in (
        (True, httpx.get(strict.url + "/openapi.json")),
        (False, client.get("/openapi.json")),
    ):
        schemas = description.json()["components"]["schemas"]
        assert schemas["ChatRequest"]["additionalProperties"] is not is_strict
        assert schemas["Message"]["additionalProperties"] is True
