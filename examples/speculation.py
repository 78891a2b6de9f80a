"""What the heads bring: a request with and without them, and what the server counted of both on /metrics."""

from __future__ import annotations

import argparse
import urllib.request

from openai import OpenAI

COUNTERS = {
    "manyheads_generation_tokens_total": "tokens",
    "manyheads_decoding_row_steps_total": "steps",
    "manyheads_spec_decode_num_draft_tokens_total": "guesses checked",
    "manyheads_spec_decode_num_accepted_tokens_total": "guesses right",
}


def counters(url: str) -> dict[str, float]:
    """What the server has counted so far; whoever else it serves is in it, too."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = [line.split() for line in reply.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines if name in COUNTERS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=100)
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    texts = []
    for speculative in (True, False):
        before = counters(args.url)
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me something about hip hop."}],
            temperature=0,
            max_tokens=args.max_tokens,
            extra_body={"speculative": speculative},
        )
        after = counters(args.url)
        texts.append(reply.choices[0].message.content)
        counted = ", ".join(f"{text} {after[name] - before[name]:.0f}" for name, text in COUNTERS.items())
        print(f"{'with heads:   ' if speculative else 'without heads:'} {counted}")
    print("the text is the same" if texts[0] == texts[1] else "the texts differ")
