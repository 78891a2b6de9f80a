"""Traffic over HTTP: what clients send and when, and what they make of a server's streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
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


async def answered(lines: list[bytes], status: bytes = b"200 OK") -> traffic.Answer:
    """What a client makes of a server that says this."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        assert json.loads(await reader.readexactly(size))["max_tokens"] == 3
        writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n")
        for line in lines:
            writer.write(line + b"\n\n")
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await traffic.answer(f"http://127.0.0.1:{port}", "m", traffic.Ask(0.0, [1], 3), 0.0)


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
