"""Print an answer as it comes, with OpenAI's client: several tokens at a time, where the heads were right."""

from __future__ import annotations

import argparse

from openai import OpenAI

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("question", nargs="?", default="Write a short story about a dragon.")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")  # or the key that the server was started with
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        temperature=0.5,
        seed=1,  # the same seed gives the same text, whatever else the server does meanwhile
        max_tokens=args.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
        if event.usage:  # the last event
            print(f"\n[{event.usage.completion_tokens} tokens]")
