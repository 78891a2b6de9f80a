"""Answer every line of a file, all lines at once: the server computes them together."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from openai import AsyncOpenAI


async def answer_all(url: str, prompts: list[str], max_tokens: int) -> None:
    """Print a JSON line for each prompt, in the order in which the answers come."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id

        async def answer(number: int, prompt: str) -> None:
            reply = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=max_tokens
            )
            record = {"line": number, "prompt": prompt, "answer": reply.choices[0].message.content}
            print(json.dumps(record, ensure_ascii=False), flush=True)

        await asyncio.gather(*(answer(number, prompt) for number, prompt in enumerate(prompts, 1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("file", type=Path, nargs="?", help="a prompt on each line (default: standard input)")
    args = parser.parse_args()

    text = args.file.read_text(encoding="utf-8") if args.file else sys.stdin.read()
    asyncio.run(answer_all(args.url, [line for line in text.splitlines() if line.strip()], args.max_tokens))
