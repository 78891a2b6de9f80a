"""A server with OpenAI's interface and known delays: `python -m tests.bench.mock SCRIPT`, or `running(script)`.

Times are kept by a schedule from the arrival of a request, so that errors of the sleeps do not add up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from manyheads.bench.calibrate import pieces


@dataclass
class Script:
    """What the server does with every request; `break_` of them in turn, the empty string being a good answer."""

    ttft: float = 0.02
    gap: float = 0.01
    chunks: int = 5
    tokens_per_chunk: int = 1
    usage: bool = True
    finish: str = "length"
    breaks: tuple[str, ...] = ("",)
    at_once: bool = False
    """Write good answers as one prepared text, which costs nearly nothing."""


class Mock:
    """The server."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self.one(reader, writer):
                pass
        writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        came = asyncio.get_running_loop().time()
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        await reader.readexactly(int(lengths[0]) if lengths else 0)
        path = head.split(b" ")[1].decode()
        if path == "/v1/models":
            return plain(writer, 200, {"data": [{"id": "mock", "owned_by": "tests"}]})
        if path == "/health":
            return plain(writer, 200, {})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return plain(writer, 404, {"error": {"message": "no such path"}})
        how = self.script.breaks[self.asked % len(self.script.breaks)]
        self.asked += 1
        return await self.answer(writer, how, "chat" in path, came)

    async def answer(self, writer: asyncio.StreamWriter, how: str, chat: bool, came: float) -> bool:
        script = self.script
        if how.isdigit():
            return plain(writer, int(how), {"error": {"message": f"told to answer {how}"}})
        if how == "never":
            await asyncio.sleep(3600)
        if how == "plain":
            return plain(writer, 200, {"choices": [{"text": "whole"}]})
        if how == "close":
            return False
        if script.at_once and not how:
            await asyncio.sleep(script.ttft)
            writer.write(whole(script.chunks))
            await writer.drain()
            return True
        await until(came + script.ttft)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        send(writer, b": ping\n\n")
        if how == "empty":
            send(writer, b"data: [DONE]\n\n")
            return end(writer)
        for i in range(script.chunks):
            await until(came + script.ttft + i * script.gap)
            if writer.is_closing():
                return False
            last = i == script.chunks - 1
            text = " w" * script.tokens_per_chunk
            part = {"delta": {"content": text}} if chat else {"text": text}
            event({"choices": [{"index": 0, "finish_reason": script.finish if last else None, **part}]}, writer)
            if i == script.chunks // 2 and how:
                if how == "cut":
                    writer.transport.abort()
                    return False
                if how == "stop":
                    send(writer, b"data: [DONE]\n\n")  # it ends well, but without a finish reason
                    return end(writer)
                if how == "stall":
                    await asyncio.sleep(3600)
                if how == "error":
                    event({"error": {"message": "told to fail"}}, writer)
                    return end(writer)
                send(writer, b"data: {nonsense\n\n" if how == "json" else b"nonsense\n\n")
        if script.usage:
            tokens = script.chunks * script.tokens_per_chunk
            event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}, writer)
        send(writer, b"data: [DONE]\n\n")
        return end(writer)


@functools.cache
def whole(chunks: int) -> bytes:
    return b"".join(pieces(chunks))


async def until(at: float) -> None:
    """Sleep to a time of the loop's clock, the last milliseconds awake: timers are late by as much."""
    loop = asyncio.get_running_loop()
    if (left := at - loop.time()) > 0.003:
        await asyncio.sleep(left - 0.002)
    while loop.time() < at:
        await asyncio.sleep(0)


def plain(writer: asyncio.StreamWriter, status: int, body: object) -> bool:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return True


def event(body: object, writer: asyncio.StreamWriter) -> None:
    send(writer, b"data: " + json.dumps(body).encode() + b"\r\n\r\n")


def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def end(writer: asyncio.StreamWriter) -> bool:
    writer.write(b"0\r\n\r\n")
    return True


@contextlib.contextmanager
def running(script: Script) -> Iterator[str]:
    """The URL of such a server, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.mock", json.dumps(asdict(script))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def main() -> None:
    mock = Mock(Script(**json.loads(sys.argv[1])))
    server = await asyncio.start_server(mock.connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
