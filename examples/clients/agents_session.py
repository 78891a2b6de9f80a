"""OpenAI's Agents SDK (pip install openai-agents): a function that must be called, over both of OpenAI's interfaces."""

from __future__ import annotations

import argparse
import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI


@function_tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"It is sunny in {city}."


async def session(url: str) -> None:
    """Run an agent over either interface: it calls the function, and then says what it makes of that."""
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    name = (await client.models.list()).data[0].id
    for model in (OpenAIChatCompletionsModel(name, client), OpenAIResponsesModel(name, client)):
        agent = Agent(
            name="Forecaster",
            instructions="Be brief.",
            tools=[weather],
            model=model,
            model_settings=ModelSettings(tool_choice="required", temperature=0),
        )
        result = await Runner.run(agent, "What is the weather in Paris?")
        kinds = [item.type for item in result.new_items]
        print(f"{type(model).__name__}: {kinds}, {result.final_output!r}")
        streamed = Runner.run_streamed(agent, "What is the weather in Rome?")
        count = len([event async for event in streamed.stream_events()])
        print(f"streamed: {count} events, {streamed.final_output!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    asyncio.run(session(parser.parse_args().url))
