"""/v1/responses through openai's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import response_create_params

from manyheads.request import TokenLogprobs
from manyheads.server import response_answers
from manyheads.server.logprobs import TextLogprobs
from manyheads.server.response_request import ResponsesRequest
from tests.server.conftest import Running
from tests.server.fake_engine import TEXT

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]


@pytest.fixture
def api(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_text(api: openai.OpenAI) -> None:
    answer = api.responses.create(model="fake", input="hello", instructions="Be kind.", max_output_tokens=12)
    assert TEXT.startswith(answer.output_text.rstrip("\ufffd"))
    assert (answer.status, answer.usage.output_tokens) == ("incomplete", 12)  # type: ignore[union-attr]
    assert answer.incomplete_details is not None
    done = api.responses.create(model="fake", input=[{"role": "user", "content": "SAY[[Hi.]]"}])
    assert (done.status, done.output_text) == ("completed", "Hi.")


def test_calls(api: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": f"SAY[[I look. {CALL}]]"}]}]
    answer = api.responses.create(model="fake", input=asked, tools=TOOLS)
    message, call = answer.output
    assert message.type == "message"
    assert call.type == "function_call"
    assert (answer.output_text, call.name, json.loads(call.arguments)) == ("I look.", "weather", {"city": "Ulm"})
    history = [{"role": "user", "content": "hello"}, *[item.model_dump() for item in answer.output]]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "SAY[[It rains.]]"})
    assert api.responses.create(model="fake", input=history, tools=TOOLS).output_text == "It rains."
    forced = api.responses.create(
        model="fake", input="hello", tools=TOOLS, tool_choice={"type": "function", "name": "weather"}
    )
    assert [item.type for item in forced.output] == ["function_call"]


def test_stream(api: openai.OpenAI) -> None:
    with api.responses.stream(model="fake", input=f"SAY[[I look. {CALL}]]", tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "I look."
    arguments = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(arguments)) == {"city": "Ulm"}
    kinds = [e.type for e in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2:] == ["response.output_item.done", "response.completed"]
    assert [item.type for item in final.output] == ["message", "function_call"]


def test_logprobs_are_those_of_the_text(client: httpx.Client) -> None:
    body = {"input": "SAY[[<think>Well, well.</think>Well.]]", "include": ["message.output_text.logprobs"]}
    answer = client.post("/v1/responses", json=body | {"top_logprobs": 2, "max_tool_calls": 1})
    assert "x-manyheads-ignored" not in answer.headers
    assert (answer.json()["top_logprobs"], answer.json()["max_tool_calls"]) == (2, 1)
    lines = client.post("/v1/responses", json=body | {"top_logprobs": 2, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    for output in (answer.json()["output"], events[-1]["response"]["output"]):
        (part,) = output[-1]["content"]
        assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == part["text"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    told = [entry for e in events if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    assert told == part["logprobs"] != []


def test_logprobs_of_pieces_of_text() -> None:
    tokenizer: Any = SimpleNamespace(
        token_bytes=lambda token: [b"<t>", b"We", b"ll", b"</t>", b"W", b"ell.", b"\xc3"][token]
    )
    found = TextLogprobs(tokenizer)
    found.add([TokenLogprobs(token, -1.0, 1, []) for token in (0, 1, 2, 3, 4)])
    assert [entry["token"] for entry in found.take("Well")] == ["We", "ll"]
    found.add([TokenLogprobs(5, -1.0, 1, [])])
    assert [entry["token"] for entry in found.take("Wel")] == ["W", "ell."]
    assert found.take("l.") == []
    found.add([TokenLogprobs(6, -1.0, 1, [])])
    assert [entry["bytes"] for entry in found.take("\ufffd")] == [[0xC3]]


def test_what_is_not_done_is_told(client: httpx.Client) -> None:
    body = {"input": "hello", "max_output_tokens": 2, "truncation": "auto", "top_logprobs": 1, "include": ["other"]}
    answer = client.post("/v1/responses", json=body)
    assert answer.headers["x-manyheads-ignored"] == "include,top_logprobs,truncation"
    assert answer.json()["truncation"] == "disabled"
    plain = {"include": [], "truncation": "disabled", "top_logprobs": None, "max_tool_calls": None}
    assert "x-manyheads-ignored" not in client.post("/v1/responses", json=body | plain).headers


def test_events_are_as_described(client: httpx.Client) -> None:
    body = {"input": "hello", "max_output_tokens": 5}
    lines = client.post("/v1/responses", json=body | {"stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in events]
    for event in events:
        response_answers.ResponseEvent.model_validate(event)
    response_answers.ResponseAnswer.model_validate(events[-1]["response"])
    response_answers.ResponseAnswer.model_validate(client.post("/v1/responses", json=body).json())


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "'input' is required"),
        ({"input": []}, "input"),
        ({"input": "a", "previous_response_id": "x"}, "nothing is stored"),
        ({"input": "a", "background": True}, "nothing is stored"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0: 'web_search' tools are not supported"),
        ({"input": [{"type": "web_search_call"}]}, "input.0: type must be message, function_call, "),
        (
            {"input": [{"type": "message", "role": "user", "content": 5}]},
            "input.0.content: input should be a valid str",
        ),
        ({"input": 5}, "input: input should be a valid string or a valid list"),
        ({"input": "a", "include": ["message.output_text.logprobs"], "top_logprobs": 50}, "logprobs"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image' parts"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "needs a schema"),
        ({"input": "a", "max_output_tokens": 0}, "max_tokens"),
    ],
)
def test_refused(client: httpx.Client, body: dict[str, Any], word: str) -> None:
    answer = client.post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_every_field_of_openai_is_known() -> None:
    known = ResponsesRequest.model_fields.keys()
    assert response_create_params.ResponseCreateParamsBase.__annotations__.keys() <= known
