"""LiteLLM (pip install litellm): a chat, a stream and a function that must be called."""

from __future__ import annotations

import argparse

import litellm
from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    args = parser.parse_args()

    base = f"{args.url}/v1"
    name = OpenAI(base_url=base, api_key="none").models.list().data[0].id
    asked = {"model": f"hosted_vllm/{name}", "api_base": base, "api_key": "none", "max_tokens": 100, "temperature": 0}
    question = [{"role": "user", "content": "Who was Napoleon?"}]
    print(f"completion: {litellm.completion(messages=question, **asked).choices[0].message.content!r}")
    stream = litellm.completion(messages=question, stream=True, **asked)
    print("stream: " + "".join(chunk.choices[0].delta.content or "" for chunk in stream))
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    reply = litellm.completion(messages=question, tools=[TOOL], tool_choice="required", **asked)
    (call,) = reply.choices[0].message.tool_calls
    print(f"call: {call.function.name}({call.function.arguments})")
