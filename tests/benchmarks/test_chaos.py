"""A short form of the faults, against a small random model, and what would be noticed if one did harm."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.tiny_tokenizer import make_hf, save_tokenizer
from tests.tiny import make_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import chaos
import chaos_rows as rows
from chaos_client import Answer, Choice, Load, difference, mixture, read
from chaos_server import poison, started

WATCHDOG = 3.0
OPTIONS = ("--device", "cpu", "--max-restarts", "100", "--watchdog", f"{WATCHDOG:g}")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What harm faults do is tested here; how long things take is for the benchmark, on a machine of its own."""
    for name in ("READY_WITHIN", "NOTICED_WITHIN", "GONE_WITHIN", "FLIPPED_WITHIN"):
        monkeypatch.setattr(rows, name, 60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    make_model(vocab_size=len(make_hf()), max_position_embeddings=512).save_pretrained(folder)
    return save_tokenizer(folder)


def test_an_engine_that_is_killed_or_stopped_and_a_server_that_drains(model: Path) -> None:
    async def run() -> list[rows.Row]:
        async with started(model, OPTIONS) as server:
            found = [await rows.killed(server, rows.SHORT), await rows.stopped(server, rows.SHORT, WATCHDOG)]
            return [*found, await rows.drained(server, rows.SHORT, 30.0)]

    killed, stopped, drained = asyncio.run(run())
    for row in (killed, stopped, drained):
        assert row["met"], row
    assert len(killed["rounds"]) == 2  # one may find all answers on their way already; of both, some went on


def test_a_poisoned_model_and_a_server_that_is_killed(model: Path, tmp_path: Path) -> None:
    token = poison(model, tmp_path / "poisoned")

    async def run() -> list[rows.Row]:
        async with started(tmp_path / "poisoned", OPTIONS) as server:
            return [
                await rows.poisoned(server, rows.SHORT, token),
                await rows.server_killed(server, rows.SHORT, left_out="model_error"),
            ]

    poisoned, server_killed = asyncio.run(run())
    assert poisoned["met"], poisoned
    assert poisoned["poisons"] == 8
    assert poisoned["others"] == 12
    assert server_killed["met"], server_killed


def chat_stream(*texts: str, finish: str | None = "length", done: bool = True, error: str | None = None) -> bytes:
    """What a server sends: an event for each text."""
    choices = [{"index": 0, "delta": {"content": text}, "logprobs": logprobs(text)} for text in texts]
    events: list[object] = [{"choices": [choice]} for choice in choices]
    if finish is not None:
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if error is not None:
        events.append({"error": {"message": "the engine has stopped", "code": error}})
    body = b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events) + b"data: [DONE]\n\n" * done
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:30], body[30:])) + b"0\r\n\r\n"


def logprobs(text: str, value: float = -1.5) -> dict[str, object]:
    data = text.encode()
    top = [{"token": text, "logprob": value, "bytes": list(data)}]
    return {"content": [{"token": text, "logprob": value, "bytes": list(data), "top_logprobs": top}]}


def test_whole_answers_are_read() -> None:
    answer = read(chat_stream("one", " two"), streams=True)
    assert (answer.status, answer.error) == (200, None)
    tokens = [b"one".hex(), b" two".hex()]
    assert answer.choices == {0: Choice("one two", tokens, [[-1.5, -1.5], [-1.5, -1.5]], "length")}
    assert difference(answer, answer) is None


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "broken off"),
        (chat_stream("one")[:-20], "broken off"),
        (chat_stream("one", done=False), "ended without an end"),
        (chat_stream("one", finish=None), "ended without an end"),
        (chat_stream("one", finish=None, error="engine_unavailable"), "the engine has stopped"),
        (chat_stream(finish=None), "ended without an end"),
    ],
)
def test_answers_that_are_not_whole(raw: bytes, error: str) -> None:
    answer = read(raw, streams=True)
    assert answer.error is not None
    assert error in answer.error
    assert difference(read(chat_stream("one"), streams=True), answer) == answer.error


def text(answer: Answer) -> None:
    answer.choices[0].text += "!"


def tokens(answer: Answer) -> None:
    answer.choices[0].tokens[1] = b"2".hex()


def missing(answer: Answer) -> None:
    answer.choices[1] = Choice()


def count(answer: Answer) -> None:
    answer.num_tokens = 9


def log_probability(answer: Answer) -> None:
    answer.choices[0].logprobs[1][0] -= 0.01


@pytest.mark.parametrize("change", [text, tokens, missing, count, log_probability])
def test_answers_that_differ(change: Callable[[Answer], None]) -> None:
    wanted, got = (read(chat_stream("one", " two"), streams=True) for _ in range(2))
    change(got)
    load = Load("", mixture(2, 1, 0), [wanted, wanted])
    assert len(load.differences([got, wanted])) == 1


def test_a_server_that_does_not_survive_is_no_row(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not restart an engine, so the first kill ends it."""
    for name, value in (("TOKENIZER", "1"), ("ENGINE_STEP_SECONDS", "0.01"), ("ENGINE_PID_FOLDER", str(tmp_path))):
        monkeypatch.setenv(f"FAKE_{name}", value)

    async def run() -> None:
        async with started(model, ("--max-restarts", "0"), program=("-m", "tests.server.launch")) as server:
            await rows.killed(server, rows.SHORT)

    with pytest.raises(RuntimeError, match="the server has ended"):
        asyncio.run(run())


def test_the_page_gets_the_table(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    row = {"fault": "killed", "aim": "none lost", "found": "one lost", "met": False}
    (results / "chaos.json").write_text(json.dumps({"killed": row, "drained": row | {"fault": "drained", "met": True}}))
    (results / "busy.json").write_text(json.dumps({"machine": {"cores": 2}, "quiet": row | {"fault": "busy"}}))
    overload = {"goodput_of_peak": 0.97, "first_token_p99_s": 29.0, "retry_after_error_median": 0.4}
    fairness = {"p99_times": 2.5, "beside_p99_s": 0.5, "alone_p99_s": 0.2}
    part = {"settings": {"max_wait": "30.0", "times": "4.0"}, "overload": overload, "fairness": fairness}
    (results / "overload.json").write_text(json.dumps({"now": part}))
    page.write_text(f"before\n{chaos.BEGIN}\nold\n{chaos.END}\nafter\n")
    for _ in range(2):
        chaos.write_docs(results, page)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line for line in lines if "lost" in line] == [
        "| killed | none lost | one lost | **no** |",
        "| drained | none lost | one lost | yes |",
        "| busy | none lost | one lost | **no** |",
    ]
    late, fair = (line.split(" | ") for line in lines[-5:-3])
    assert late[2:] == ["goodput 97%; p99 29.0 s (--max-wait 30); `Retry-After` off by 40%", "**no** |"]
    assert fair[2:] == ["2.5 times: 0.50 s, alone 0.20 s", "yes |"]
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the marks"):
        chaos.write_docs(results, page)
