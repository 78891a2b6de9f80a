"""Pydantic AI (pip install 'pydantic-ai-slim[openai]'): an agent that chats, and one whose answer is an object."""

from __future__ import annotations

import argparse

from openai import OpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """What the model is asked to say about a city."""

    name: str
    is_capital: bool


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    args = parser.parse_args()

    base = f"{args.url}/v1"
    name = OpenAI(base_url=base, api_key="none").models.list().data[0].id
    model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=base, api_key="none"))
    settings = {"max_tokens": 100, "temperature": 0.0}
    agent = Agent(model, instructions="Be kind.", model_settings=settings)
    print(f"text: {agent.run_sync('Who was Napoleon?').output!r}")
    by_call = Agent(model, output_type=City, model_settings=settings)
    print(f"by a call: {by_call.run_sync('Is Paris a capital?').output!r}")
    by_schema = Agent(model, output_type=NativeOutput(City), model_settings=settings)
    print(f"by a schema: {by_schema.run_sync('Is Paris a capital?').output!r}")
