from __future__ import annotations

import json

import httpx

from tests.server.fake_engine import TEXT


def events(response: httpx.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_first_versions_client(client: httpx.Client) -> None:
    body = {"prompt": "Tell me something about hip hop.", "parameters": {"temperature": 0.5, "max_steps": 100}}
    answer = client.post("/generate", json=body).json()
    assert TEXT.startswith(answer["response"].rstrip("\ufffd"))
    details = answer["details"]
    assert (details["steps"], details["generated_tokens"], details["tokens_per_step"]) == (100, 300, 3.0)
    assert details["finish_reason"] == "length"
    assert details["prompt_tokens"] > 5


def test_max_new_tokens_and_stop(client: httpx.Client) -> None:
    body = {"prompt": "Hi", "parameters": {"max_new_tokens": 50, "stop": ["猫は"]}}
    answer = client.post("/generate", json=body).json()
    assert answer["response"] == "The cat 🐈 sat on the mat, "
    assert answer["details"]["stop_reason"] == "猫は"


def test_raw_prompts_are_not_put_into_the_template(client: httpx.Client) -> None:
    counts = [
        client.post("/generate", json={"prompt": "Hi", "parameters": {"raw": raw, "max_steps": 1}}).json()["details"][
            "prompt_tokens"
        ]
        for raw in (True, False)
    ]
    assert counts[0] < counts[1]


def test_stream(client: httpx.Client) -> None:
    body = {"prompt": "Hi", "parameters": {"max_new_tokens": 60}}
    with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = events(response)
    assert "".join(p["text"] for p in parts[:-1]) == parts[-1]["response"]
    assert len(parts) > 5
    assert not any("\ufffd" in p["text"] for p in parts[:-2])
    assert parts[-1]["details"]["generated_tokens"] == 60
