"""What clients send beside the text: which tokens, which part of the prompt, its log-probabilities."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import TEXT

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = client.post(path, json=body | {"stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_token_ids(client: httpx.Client) -> None:
    prompt = client.post("/tokenize", json={"messages": HELLO["messages"]}).json()["tokens"]
    answer = client.post(CHAT, json=HELLO | {"return_token_ids": True, "n": 2}).json()
    assert answer["prompt_token_ids"] == prompt
    tokens = answer["choices"][1]["token_ids"]
    assert len(tokens) == 4
    chunks = events(client, CHAT, HELLO | {"return_token_ids": True})
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == tokens
    assert chunks[0]["prompt_token_ids"] == prompt
    body = {"prompt": [5, 6], "max_tokens": 4, "return_token_ids": True}
    choice = client.post(TEXTS, json=body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], tokens)
    assert [t for c in events(client, TEXTS, body) for t in c["choices"][0]["token_ids"]] == tokens


@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_steps(client: httpx.Client, path: str) -> None:
    """Whole and streamed, an event for each step; what is held back belongs to the step all the same."""
    body = {**(HELLO if path == CHAT else {"prompt": "a"}), "max_tokens": 12, "stop": "mat, 猫"}
    whole = client.post(path, json=body | {"return_steps": True}).json()
    steps = whole["choices"][0]["steps"]
    assert sum(step["num_tokens"] for step in steps) == whole["usage"]["completion_tokens"]
    assert len(steps) == whole["usage"]["decoding_steps"]
    first, second, other = steps[0]["guesses"]
    assert [guess["parent"] for guess in (first, second, other)] == [-1, 0, 1]
    assert [guess["accepted"] for guess in (first, second, other)] == [True, True, False]
    assert TEXT.startswith(first["token"] + second["token"])
    assert other["token"] == "<|assistant|>"
    chunks = events(client, path, body | {"return_steps": True})
    assert [step for c in chunks for step in c["choices"][0].get("steps", [])] == steps
    assert all(len(c["choices"][0].get("steps", [])) <= 1 for c in chunks)
    assert "steps" not in client.post(path, json=body).json()["choices"][0]


@pytest.mark.parametrize(("most", "kept"), [(2, [8, 9]), (50, [5, 6, 7, 8, 9]), (-1, [5, 6, 7, 8, 9])])
def test_truncation(client: httpx.Client, most: int, kept: list[int]) -> None:
    body = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 1, "truncate_prompt_tokens": most, "return_token_ids": True}
    assert client.post(TEXTS, json=body).json()["choices"][0]["prompt_token_ids"] == kept


def test_truncation_to_the_context(client: httpx.Client) -> None:
    body = {"prompt": [5] * 3000, "max_tokens": 48, "truncate_prompt_tokens": -1}
    assert client.post(TEXTS, json=body).json()["usage"]["prompt_tokens"] == 2000


def test_echo_with_logprobs(client: httpx.Client) -> None:
    """As lm-eval reads it: everything in one list, of which nothing is known of the first token."""
    body = {"prompt": "hello the", "echo": True, "logprobs": 1, "max_tokens": 2}
    choice = client.post(TEXTS, json=body).json()["choices"][0]
    logprobs, prompt = choice["logprobs"], client.post("/tokenize", json={"prompt": "hello the"}).json()["tokens"]
    assert choice["text"] == "hello the" + "The cat" == "".join(logprobs["tokens"])
    assert logprobs["token_logprobs"] == [None] + [-1.5] * (len(prompt) - 1) + [-0.5] * 2
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][len(prompt)] == len("hello the")
    chunks = [c["choices"][0] for c in events(client, TEXTS, body)]
    assert "".join(c["text"] for c in chunks) == choice["text"]
    assert [v for c in chunks for v in c["logprobs"]["token_logprobs"]] == logprobs["token_logprobs"]
    nothing = client.post(TEXTS, json=body | {"max_tokens": 0}).json()
    assert nothing["choices"][0]["text"] == "hello the"
    assert nothing["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][: len(prompt)]
    assert nothing["usage"]["completion_tokens"] == 0
    plain = client.post(TEXTS, json={"prompt": "hello the", "echo": True, "max_tokens": 0}).json()["choices"][0]
    assert (plain["text"], plain["logprobs"], plain["finish_reason"]) == ("hello the", None, "length")


def test_prompt_logprobs(client: httpx.Client) -> None:
    choice = client.post(TEXTS, json={"prompt": [5, 6], "max_tokens": 1, "prompt_logprobs": 1}).json()["choices"][0]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert (second["6"]["logprob"], second["6"]["rank"], choice["logprobs"]) == (-1.5, 1, None)
    answer = client.post(CHAT, json=HELLO | {"prompt_logprobs": 0}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_best_of(client: httpx.Client) -> None:
    answer = client.post(TEXTS, json={"prompt": "a", "best_of": 3, "n": 2, "max_tokens": 4}).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert all(c["logprobs"] is None and TEXT.startswith(c["text"].rstrip("\ufffd")) for c in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12


def test_how_the_prompt_ends(client: httpx.Client) -> None:
    said = {"messages": [*HELLO["messages"], {"role": "assistant", "content": "The"}], "return_token_ids": True}

    def prompt(**more: Any) -> str:
        tokens = client.post(CHAT, json=HELLO | said | more).json()["prompt_token_ids"]
        text: str = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        return text

    assert prompt().endswith("The<|end|>\n<|assistant|>")
    assert prompt(add_generation_prompt=False).endswith("The<|end|>\n")
    assert prompt(continue_final_message=True).endswith("<|assistant|>The")


def test_sampling_and_queueing_fields_are_taken(client: httpx.Client) -> None:
    body = {"bad_words": ["mat", "the cat"], "allowed_token_ids": [5, 6.0], "cache_salt": "s", "priority": 3}
    variables = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}
    answer = client.post(CHAT, json=HELLO | body | variables)
    assert answer.status_code == 200, answer.text
    assert "x-manyheads-ignored" not in answer.headers


def test_pages_have_heads_and_an_icon(client: httpx.Client) -> None:
    for path in ("/", "/health", "/v1/models", "/metrics", "/version"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
    icon = client.get("/favicon.ico")
    assert icon.headers["content-type"] == "image/svg+xml"
    assert icon.text.startswith("<svg")
    assert client.head("/v1/chat/completions").status_code == 405
