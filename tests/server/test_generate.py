from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.server.conftest import Running
from tests.server.fake_engine import TEXT


def idle(client: httpx.Client, seconds: float = 5.0) -> bool:
    """Whether the engine comes to have nothing to do."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if "manyheads_num_requests_running 0.0" in client.get("/metrics").text:
            return True
        time.sleep(0.05)
    return False


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


def test_eight_clients_at_once(client: httpx.Client) -> None:
    def ask(i: int) -> dict:
        body = {"prompt": "Hi " * (i + 1), "parameters": {"max_new_tokens": 20 * (i + 1)}}
        return client.post("/generate", json=body).json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert [a["details"]["generated_tokens"] for a in answers] == [20 * (i + 1) for i in range(8)]
    assert all(TEXT.startswith(a["response"].rstrip("\ufffd")) for a in answers)
    assert idle(client)


def test_disconnecting_frees_the_row(server: Running, client: httpx.Client) -> None:
    body = {"prompt": "SLOW", "parameters": {"max_new_tokens": 1000}}
    with httpx.stream("POST", server.url + "/generate_stream", json=body) as response:
        next(response.iter_lines())
    assert idle(client, 1.0)
    try:
        httpx.post(server.url + "/generate", json=body, timeout=0.3)
    except httpx.ReadTimeout:
        pass
    else:
        raise AssertionError("the request was to be slow")
    assert idle(client, 1.0)
    assert client.post("/generate", json={"prompt": "Hi", "parameters": {"max_steps": 1}}).status_code == 200
