"""OpenAI's client: a chat, its stream helper, a function that is called and answers, a parsed answer, and responses."""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """What the model is asked to say about a city."""

    name: str
    is_capital: bool


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a day in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "day": {"enum": ["today", "tomorrow"]}},
            "required": ["city", "day"],
            "additionalProperties": False,
        },
    },
}


def call_a_function(client: OpenAI, model: str) -> None:
    """One turn in which the model must call, and one in which it says what came of that."""
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris today?"}]
    reply = client.chat.completions.create(
        model=model, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=100, temperature=0
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    print(f"call: {call.function.name}({arguments})")
    messages.append(reply.choices[0].message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": f"It is sunny in {arguments['city']}."})
    reply = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], max_tokens=30, temperature=0)
    print(f"after the call: {reply.choices[0].message.content!r}")


def respond(client: OpenAI, model: str) -> None:
    """The newer interface, streamed, with a call."""
    with client.responses.stream(model=model, input="Tell me a joke.", max_output_tokens=30, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        status = stream.get_final_response().status
    print(f"response: {text!r} [{status}]")
    flat: Any = {"type": "function", "strict": False, **TOOL["function"]}
    called = client.responses.create(
        model=model,
        input="Weather in Rome?",
        tools=[flat],
        tool_choice="required",
        max_output_tokens=100,
        temperature=0,
    )
    print(f"response calls: {[(item.name, item.arguments) for item in called.output if item.type == 'function_call']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    question: list[Any] = [{"role": "user", "content": "Who was Napoleon?"}]
    with client.chat.completions.stream(model=model, messages=question, max_tokens=20, temperature=0) as stream:
        print("stream: " + "".join(event.delta for event in stream if event.type == "content.delta"))
    call_a_function(client, model)
    question = [{"role": "user", "content": "Is Paris a capital?"}]
    parsed = client.chat.completions.parse(
        model=model, messages=question, response_format=City, max_tokens=100, temperature=0
    )
    print(f"parsed: {parsed.choices[0].message.parsed!r}")
    respond(client, model)
