"""/v1/responses through openai's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import response_create_params

from manyheads.server import response_answers
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
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0"),
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
