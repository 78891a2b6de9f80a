"""Multiple choice as lm-eval asks it, over HTTP, against transformers on the same checkpoint.

Each item is a context with four continuations, of which the likeliest is the answer. The server gets prompts of tokens
with `echo`, `logprobs` and `max_tokens: 1`, as lm-eval's `local-completions` sends them; the continuation's own tokens
are summed.

    manyheads serve --port 8000 &
    python benchmarks/loglikelihood.py --url http://127.0.0.1:8000 --model manyheads/builtin/model
"""

from __future__ import annotations

import argparse
import json
import random
import urllib.request
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SUBJECTS = (
    "The dog",
    "My teacher",
    "A dragon",
    "The king of France",
    "The old computer",
    "Her sister",
    "Rain",
    "The train",
)
VERBS = ("went to", "wrote about", "was afraid of", "could not find", "talked with", "sang about", "drew a picture of")
OBJECTS = (
    "the sea",
    "a small house",
    "the moon",
    "its own shadow",
    "an apple tree",
    "the capital city",
    "music",
    "seven bees",
)


def items(count: int) -> list[tuple[str, list[str]]]:
    """Made-up contexts with four continuations each."""
    dice = random.Random(0)
    return [
        (f"{dice.choice(SUBJECTS)} {dice.choice(VERBS)}", [f" {end}." for end in dice.sample(OBJECTS, 4)])
        for _ in range(count)
    ]


def ask(url: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The choices of a request for some prompts, in order."""
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        choices: list[dict[str, Any]] = json.load(response)["choices"]
    return choices


@torch.inference_mode()
def reference(model: Any, tokens: list[int], start: int) -> tuple[float, bool]:
    """Log-probability of the tokens from `start` on, and whether each is the likeliest, by transformers."""
    logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)[start - 1 : -1]
    chosen = torch.tensor(tokens[start:])
    return float(logprobs.gather(1, chosen[:, None]).sum()), bool((logprobs.argmax(-1) == chosen).all())


def main() -> None:
    """Ask for all items, compare, and say how far apart the two are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="manyheads/builtin/model", help="the folder that is served")
    parser.add_argument("--items", type=int, default=100)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    furthest, answers = 0.0, 0
    for context, ends in items(args.items):
        start = len(tokenizer.encode(context))
        prompts = [tokenizer.encode(context + end) for end in ends]
        found: list[float] = []
        wanted: list[float] = []
        for prompt, choice in zip(prompts, ask(args.url, prompts), strict=True):
            logprobs = choice["logprobs"]
            found.append(sum(logprobs["token_logprobs"][start:-1]))
            greedy = all(
                value >= max(top.values())
                for value, top in zip(
                    logprobs["token_logprobs"][start:-1], logprobs["top_logprobs"][start:-1], strict=True
                )
            )
            total, is_greedy = reference(model, prompt, start)
            wanted.append(total)
            assert greedy == is_greedy, (context, prompt)
        furthest = max(furthest, *(abs(a - b) for a, b in zip(found, wanted, strict=True)))
        answers += found.index(max(found)) == wanted.index(max(wanted))
    print(f"{args.items} items: {answers} answers the same, log-likelihoods at most {furthest:.1e} apart")
    assert answers == args.items
    assert furthest < 1e-4


if __name__ == "__main__":
    main()
