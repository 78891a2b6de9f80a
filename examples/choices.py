"""Several answers to one question, and how sure the model was of each token: `n` and `logprobs`."""

from __future__ import annotations

import argparse
import math

from openai import OpenAI

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=30)
    parser.add_argument("--n", type=int, default=3, help="answers")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Tell me something about dogs."}],
        temperature=1.0,
        top_p=1.0,
        seed=1,
        n=args.n,
        max_tokens=args.max_tokens,
        logprobs=True,
        top_logprobs=3,
    )
    for choice in reply.choices:
        print(f"{choice.index + 1}. {choice.message.content}")
        tokens = (choice.logprobs.content or []) if choice.logprobs else []
        if tokens:
            least = min(tokens, key=lambda token: token.logprob)
            instead = ", ".join(f"{other.token!r} {math.exp(other.logprob):.0%}" for other in least.top_logprobs)
            print(f"   least sure of {least.token!r}, {math.exp(least.logprob):.0%}; likeliest were {instead}")
