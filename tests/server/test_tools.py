"""Functions that replies call, through openai's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Running

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "K\\u00f6ln", "days": 3}}\n</tool_call>'
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture
def api(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def say(text: str) -> list[Any]:
    """A conversation that the fake engine answers with this."""
    return [{"role": "user", "content": f"SAY[[{text}]]"}]


def test_a_call_and_its_result(api: openai.OpenAI) -> None:
    messages = say(f"I look.\n{CALL}")
    choice = api.chat.completions.create(model="fake", messages=messages, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln", "days": 3})
    messages = [{"role": "user", "content": "hello"}, choice.message.model_dump()]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "It rains. SAY[[Take a coat.]]"})
    choice = api.chat.completions.create(model="fake", messages=messages, tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Take a coat.", "stop")


def test_stream(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(model="fake", messages=say(CALL + CALL), tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    calls = final.message.tool_calls or []
    assert [json.loads(c.function.arguments) for c in calls] == [{"city": "Köln", "days": 3}] * 2
    assert len({c.id for c in calls}) == 2
    pieces = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 4, "arguments come piece by piece"


def test_stream_of_calls_that_must_be_made(api: openai.OpenAI) -> None:
    hello: list[Any] = [{"role": "user", "content": "hello"}]
    with api.chat.completions.stream(model="fake", messages=hello, tools=TOOLS, tool_choice="required") as stream:
        final = [event for event in stream if event.type == "chunk"][-1].snapshot.choices[0]
    calls = final.message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in calls] == [("weather", "{}")] * 2
    assert (final.message.content, final.finish_reason) == ("", "tool_calls")


def test_choices(api: openai.OpenAI) -> None:
    def ask(messages: list[Any], **more: Any) -> Any:
        return api.chat.completions.create(model="fake", messages=messages, tools=TOOLS, **more).choices[0]

    hello = [{"role": "user", "content": "hello"}]
    none = ask(say(CALL), tool_choice="none")
    assert (none.message.tool_calls, none.message.content, none.finish_reason) == (
        None,
        CALL.replace("\\u00f6", "\\u00f6"),
        "stop",
    )
    for choice, names in (
        ("required", ["weather", "weather"]),
        ({"type": "function", "function": {"name": "now"}}, ["now"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]}}, ["now", "now"]),
    ):
        for parallel, called in ((True, names), (False, names[:1])):
            forced = ask(hello, tool_choice=choice, parallel_tool_calls=parallel)
            assert [c.function.name for c in forced.message.tool_calls] == called
            assert (forced.message.content, forced.finish_reason) == (None, "tool_calls")
    assert len(ask(say(CALL + CALL)).message.tool_calls) == 2
    assert len(ask(say(CALL + CALL), parallel_tool_calls=False).message.tool_calls) == 1


def test_what_is_no_call_is_content(api: openai.OpenAI) -> None:
    for text in ("<tool_call>{oh no}</tool_call>", '<tool_call>{"name": "weather", "arguments": {"ci'):
        choice = api.chat.completions.create(model="fake", messages=say(text), tools=TOOLS).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_tools_are_part_of_the_prompt(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    counts = [
        client.post("/v1/chat/completions", json=body | more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    ]
    assert counts[0] == counts[1] == counts[2] < counts[3]
    tokens = client.post("/tokenize", json={"messages": body["messages"], "tools": TOOLS}).json()
    assert tokens["count"] == counts[3]
    assert '"name": "weather"' in client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
