from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from manyheads.config import ConfigError, EngineConfig
from manyheads.server.config import ServerConfig
from manyheads.server.service import service_of
from tests.server.conftest import Running
from tests.server.fake_engine import TEXT, FakeEngine
from tests.server.tiny_tokenizer import tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=12, user="me", store=False)
    assert TEXT.startswith(answer.choices[0].message.content or "?")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_chat_stream(api: openai.OpenAI) -> None:
    chunks = list(
        api.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = api.chat.completions.create(model="fake", messages=HELLO, max_tokens=30).choices[0].message.content
    assert text == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert all(c.usage is None for c in chunks[:-1])


def test_usage_in_every_chunk(api: openai.OpenAI) -> None:
    """vLLM's option, which its users' load generators ask for."""
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
    stream = api.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=90, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 90
    assert len(counts) > 3


def test_chat_stop_never_leaks(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(model="fake", messages=HELLO, stop=["on the mat", "zz"], stream=True)
    parts = [c.choices[0].delta.content or "" for c in stream]
    assert "".join(parts) == "The cat 🐈 sat "


def test_chat_n_and_logprobs(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=7, n=3, logprobs=True, top_logprobs=2, seed=1
    )
    assert [c.index for c in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert len(content) == 7
        assert all(len(t.top_logprobs) == 2 for t in content)
        data = b"".join(bytes(t.bytes or []) for t in content)
        assert data.decode("utf-8", "replace") == choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 21


def test_chat_stream_of_several(api: openai.OpenAI) -> None:
    texts = ["", ""]
    for chunk in api.chat.completions.create(model="fake", messages=HELLO, max_tokens=9, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts[0] == texts[1] != ""


def test_content_parts_and_returned_messages(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 5}).json()
    messages = [*HELLO, answer["choices"][0]["message"] | {"tool_calls": None, "annotations": []}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": " now"}]})
    assert client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5}).status_code == 200


def test_completions(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="fake", prompt=["a b", "c"], max_tokens=6, n=2, logprobs=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    logprobs = answer.choices[3].logprobs
    assert logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[1] == len((logprobs.tokens or [])[0])
    assert api.completions.create(model="fake", prompt="hi").usage.completion_tokens == 16  # type: ignore[union-attr]


def test_completions_of_tokens_and_echo(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "hello the"}).json()["tokens"]
    for prompt in (tokens, [tokens, tokens], "hello the"):
        answer = client.post("/v1/completions", json={"prompt": prompt, "echo": True, "max_tokens": 2}).json()
        assert all(c["text"] == "hello theThe cat" for c in answer["choices"])
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "hello the"


def test_completions_stream(api: openai.OpenAI) -> None:
    stream = api.completions.create(model="fake", prompt="hi", max_tokens=30, stream=True, logprobs=0)
    chunks = list(stream)
    assert TEXT.startswith("".join(c.choices[0].text for c in chunks).rstrip("\ufffd"))
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset or []]
    assert len(offsets) == 30
    assert offsets == sorted(offsets)


def test_models(api: openai.OpenAI) -> None:
    assert [m.id for m in api.models.list()] == ["fake", "sql"]
    assert api.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="this server has 'fake', 'sql'"):
        api.models.retrieve("other")


def test_an_adapter_is_a_model_with_a_parent(api: openai.OpenAI) -> None:
    parents = {model.id: (model.model_extra or {})["parent"] for model in api.models.list()}
    assert parents == {"fake": None, "sql": "fake"}
    assert api.models.retrieve("sql").id == "sql"
    answer = api.chat.completions.create(model="sql", messages=HELLO)
    assert (answer.model, answer.choices[0].message.content) == ("sql", "sql")
    assert api.completions.create(model="sql", prompt="hello").choices[0].text == "sql"
    assert api.responses.create(model="sql", input="hello").output_text == "sql"
    assert api.chat.completions.create(model="fake", messages=HELLO).choices[0].message.content != "sql"


def test_an_adapter_has_a_name_of_its_own() -> None:
    llm: Any = SimpleNamespace(tokenizer=tiny_tokenizer(), ready=FakeEngine(EngineConfig(loras={"a": "where"})).ready)
    with pytest.raises(ConfigError, match="'a' is the name of an adapter and of the model; rename one of them"):
        service_of(llm, ServerConfig(served_model_names=("b", "a")))


def test_adapters_are_counted_by_name(client: httpx.Client) -> None:
    assert 'manyheads_adapter_generation_tokens_total{adapter="sql"} 3.0' in client.get("/metrics").text


def test_our_own_fields(client: httpx.Client) -> None:
    body = {"messages": HELLO, "max_steps": 4, "speculative": False, "top_k": 5, "min_p": 0.1, "ignore_eos": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == answer["usage"]["decoding_steps"] == 4
