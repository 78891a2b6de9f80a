"""The description of the interface says what is sent: schemathesis asks the server what it allows and what it forbids.

SCHEMATHESIS_EXAMPLES sets how many requests each endpoint gets (12 by default).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import ValidationError

from manyheads.errors import RequestError
from manyheads.request import SamplingParams
from manyheads.server import answers
from manyheads.server.schemas import CompletionRequest
from tests.server.conftest import Running, launch

if TYPE_CHECKING:  # importing it takes seconds, which only the process that runs these tests is to spend
    import schemathesis

NUM_EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "12"))
BEYOND_SCHEMAS = re.compile(
    "best_of must be at least n|best_of does not stream|max_tokens and max_(new|completion)_tokens|top_logprobs needs"
    "|tool_choice names|there are no tools|continue_final_message|chat_template_kwargs cannot|the chat template refuses"
    "|parts are not supported|needs '(text|refusal)'|nested deeper|needs a schema"
    "|ask for one form of answer|grammar of kind (json|structural_tag): the value|seed must be a 64-bit integer"
    r"|min_tokens \(\d+\) must not exceed|must be between 0 and \d+$|context|are too many: this server queues"
)
"""The description cannot say what fields have to do with each other, nor what the model has to do with them, nor that a
text is JSON; and what it says of 64-bit integers, a client may round."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants a key and answers at once."""
    env = {"FAKE_TOKENIZER": "1", "FAKE_ENGINE_STEP_SECONDS": "0"}
    options = ("--api-key", "key", "--max-model-len", "64")
    running = launch(tmp_path_factory.mktemp("openapi"), *options, **env).wait_ready()
    yield running
    running.stop()
    assert "Traceback" not in running.errors()


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_the_description_is_true(guarded: Running, kind: str) -> None:
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    accepts, mode = CHECKS.get_one("positive_data_acceptance"), GenerationMode(kind)
    interface = schemathesis.openapi.from_url(guarded.url + "/openapi.json")
    operations = [found.ok() for found in interface.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters:

            @settings(
                max_examples=NUM_EXAMPLES,
                derandomize=True,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                response = case.call(headers={"Authorization": "Bearer key"}, timeout=10)
                is_beyond = response.status_code == 400 and BEYOND_SCHEMAS.search(response.json()["error"]["message"])
                case.validate_response(response, excluded_checks=[accepts] if is_beyond else [])

            ask()


EVENTS = {
    "/v1/completions": answers.CompletionChunk,
    "/v1/chat/completions": answers.ChatCompletionChunk,
    "/generate_stream": answers.GenerateText,
}


@pytest.mark.parametrize("path", EVENTS)
def test_events_are_as_described(client: httpx.Client, path: str) -> None:
    hello = 'SAY[[Hi. <tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>]]'
    messages = {"messages": [{"role": "user", "content": hello}], "logprobs": True, "top_logprobs": 2}
    messages["tools"] = [{"type": "function", "function": {"name": "now"}}]
    more = {"stream": True, "max_tokens": 90, "return_token_ids": True, "stream_options": {"include_usage": True}}
    more["return_steps"] = True
    body = {
        "/v1/completions": {"prompt": "a b", "echo": True, "logprobs": 2, "prompt_logprobs": 1, **more},
        "/v1/chat/completions": messages | more,
        "/generate_stream": {"prompt": "a", "parameters": {"max_tokens": 30}},
    }[path]
    lines = [line for line in client.post(path, json=body).text.splitlines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    assert len(events) >= 2
    for event in events:
        model = answers.GenerateAnswer if "response" in event else EVENTS[path]
        described = model.model_validate(event).model_dump(exclude_unset=True)
        assert described == event, "the description leaves nothing out"


def ends_of_ranges() -> Iterator[tuple[str, float, bool]]:
    """Values at the ends of the ranges that the description has, and beyond; and whether they are inside."""
    properties = CompletionRequest.model_json_schema()["properties"]
    for name, description in properties.items():
        for words in description.get("anyOf", ()):
            step = 1 if words.get("type") == "integer" else 0.001
            for word, sign in (("minimum", -1), ("maximum", 1)):
                if word in words:
                    yield name, words[word], True
                    yield name, words[word] + sign * step, False
                exclusive = "exclusive" + word.capitalize()
                if exclusive in words:
                    yield name, words[exclusive] - sign * step, True
                    yield name, words[exclusive], False


@pytest.mark.parametrize(("name", "value", "inside"), list(ends_of_ranges()))
def test_ranges_are_those_that_are_checked(name: str, value: float, inside: bool) -> None:
    related = {"best_of": {"n": 1}, "min_tokens": {"max_tokens": 2**31 - 1}}.get(name, {})
    with nullcontext() if inside else pytest.raises((RequestError, ValidationError)):
        body = CompletionRequest(prompt="a", **{name: value, **related})
        body.check()
        body.completion_params(SamplingParams())


def test_nothing_that_is_not_sent(guarded: Running) -> None:
    description = httpx.get(guarded.url + "/openapi.json").json()
    assert "422" not in json.dumps(description)
    assert description["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    needs = {path for path, methods in description["paths"].items() for m in methods.values() if "security" in m}
    assert {"/generate", "/v1/models"} <= needs
    assert not {"/health", "/metrics", "/version"} & needs


def test_without_a_key_there_is_none_to_bring(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    assert "securitySchemes" not in description["components"]
    assert all("401" not in m["responses"] for methods in description["paths"].values() for m in methods.values())
