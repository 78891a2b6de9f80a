"""LangChain (pip install langchain-openai): a chat, a stream, bound functions, and structured answers in two ways."""

from __future__ import annotations

import argparse

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """What the model is asked to say about a city."""

    name: str
    is_capital: bool


@tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"It is sunny in {city}."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    args = parser.parse_args()

    base = f"{args.url}/v1"
    model = OpenAI(base_url=base, api_key="none").models.list().data[0].id
    llm = ChatOpenAI(base_url=base, api_key="none", model=model, temperature=0, max_tokens=100)
    print(f"invoke: {llm.invoke('Who was Napoleon?').content!r}")
    print("stream: " + "".join(str(chunk.content) for chunk in llm.stream("Tell me a joke.")))
    bound = llm.bind_tools([weather], tool_choice="any")
    question = HumanMessage("What is the weather in Paris?")
    called = bound.invoke([question])
    (call,) = called.tool_calls
    print(f"call: {call['name']}({call['args']})")
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    print(f"after the call: {llm.invoke([question, called, result]).content!r}")
    for method in ("function_calling", "json_schema"):
        structured = llm.with_structured_output(City, method=method)
        print(f"{method}: {structured.invoke('Is Paris a capital?')!r}")
