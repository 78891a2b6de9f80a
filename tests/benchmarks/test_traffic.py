"""Traffic over HTTP: what clients send and when, and what they make of a server's streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import traffic


@pytest.mark.parametrize("module", ["traffic", "gpu_mix"])
def test_processes_of_clients_start_soon(module: str) -> None:
    """They import the file that starts them, and torch alone would take longer than they have."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(traffic.__file__).parent, check=True)


def test_the_same_is_asked_of_every_server() -> None:
    texts = [[1, 2, 3], [4, 5]]
    asks = traffic.draw(20.0, 30.0, 0, texts)
    assert asks == traffic.draw(20.0, 30.0, 0, texts)
    assert asks != traffic.draw(20.0, 30.0, 1, texts)
    assert 500 < len(asks) < 700
    assert all(0 < ask.at < 30 for ask in asks)
    assert all(16 <= len(ask.prompt) <= 1400 for ask in asks)
    assert all(8 <= ask.max_tokens <= 600 for ask in asks)


async def answered(
    lines: list[bytes], status: bytes = b"200 OK", stall: tuple[int, float] = (0, 0.0)
) -> traffic.Answer:
    """What a client makes of a server that says this, and is silent for so many seconds behind a line."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        assert json.loads(await reader.readexactly(size))["max_tokens"] == 3
        writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n")
        await asyncio.sleep(stall[1] if stall[0] < 0 else 0)
        for i, line in enumerate(lines):
            writer.write(line + b"\n\n")
            await writer.drain()
            await asyncio.sleep(0.02 + (stall[1] if i == stall[0] else 0))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await traffic.answer(f"http://127.0.0.1:{port}", "m", traffic.Ask(0.0, [1], 3), time.time())


def usage(tokens: int) -> bytes:
    return b'data: {"choices": [], "usage": {"completion_tokens": %d}}' % tokens


def test_a_stream_is_timed_by_its_events() -> None:
    text = b'data: {"choices": [{"text": "a"}]}'
    whole = asyncio.run(answered([text, text, usage(3), b"data: [DONE]"]))
    assert (whole.error, whole.tokens) == (None, 3)
    assert whole.first is not None
    assert whole.last - whole.first >= 0.035
    assert whole.token_seconds == pytest.approx((whole.last - whole.first) / 2)
    short = asyncio.run(answered([text, usage(2)]))
    assert short.error == "2 tokens of 3"
    assert not short.is_good
    refused = asyncio.run(answered([], b"429 Too Many Requests"))
    assert refused.error == "HTTP/1.1 429 Too Many Requests"
    assert not refused.is_good


def test_a_stall_is_seen_in_the_stream_that_has_it() -> None:
    text = b'data: {"choices": [{"text": "a"}]}'
    calm = asyncio.run(answered([text, text, usage(3)]))
    stalled = asyncio.run(answered([text, text, text, usage(3)], stall=(1, 0.2)))
    late = asyncio.run(answered([text, text, usage(3)], stall=(-1, 0.2)))
    assert calm.gap < 0.1
    assert stalled.first is not None
    assert stalled.gap == pytest.approx(0.22, abs=0.1)
    assert stalled.gap_at >= stalled.first + 0.015  # not behind the first event, but behind the second
    assert stalled.gap_at + stalled.gap <= stalled.last
    assert late.gap < 0.1  # what comes before the first event is no gap
    assert late.first is not None
    assert late.first >= 0.2


def row(rate: float, seed: int, good: float, **more: float) -> dict[str, float]:
    names = ("first_s_p50", "first_s_p99", "token_ms_p50", "token_ms_p99", "tokens_per_s")
    return {"rate": rate, "seed": seed, "good": good, **dict.fromkeys(names, 1.0), **more}


ROWS = [
    *(row(15, seed, 1.0, gap_s_max=gap, first_s_max=0.3) for seed, gap in enumerate((0.05, 0.2, 0.1))),
    *(row(30, seed, good) for seed, good in enumerate((0.96, 0.94, 0.95))),
    *(row(45, seed, good) for seed, good in enumerate((0.2, 1.0, 0.95))),
]


def test_a_rate_holds_if_all_lower_ones_do() -> None:
    assert traffic.highest({"rows": ROWS}) == [30, 15, 45]
    assert traffic.highest({"rows": [row(15, 0, 0.9), row(30, 0, 1.0)]}) == [0]


def test_seeds_are_told_by_their_median_and_extremes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"ours": {"rows": ROWS}, "before": {"rows": [row(15, 0, 1.0)]}}))
    traffic.show(file)
    lines = capsys.readouterr().out.splitlines()
    assert "| 0.100 (0.050–0.200) |" in next(line for line in lines if line.startswith("| ours | 15 |"))
    assert "| 0.95 (0.94–0.96) |" in next(line for line in lines if line.startswith("| ours | 30 |"))
    assert next(line for line in lines if line.startswith("| before | 15 |")).split("|")[-4:-1] == [
        "  ",
        " 1.00 ",
        " 1 ",
    ]
    assert "| ours | 30 (15–45) | 3 |" in lines
    assert "| before | 15 | 1 |" in lines


def test_a_picture_has_all_systems_and_colours_for_dark_pages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "result.json", tmp_path / "result.svg"
    file.write_text(json.dumps({"ours": {"rows": ROWS}, "vLLM": {"rows": ROWS[:3]}}))
    traffic.plot(file, picture)
    text = picture.read_text()
    assert ">ours</text>" in text
    assert ">vLLM</text>" in text
    assert "prefers-color-scheme: dark" in text
    for colour in (traffic.INK, traffic.PAPER):  # as the rule for dark pages expects them to be written
        assert f'style="fill: {colour}' in text or f"; fill: {colour}" in text
    traffic.plot(file, again := tmp_path / "again.svg")
    assert again.read_text() == text
