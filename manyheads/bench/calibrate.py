"""This module measures the generator's own limit, with a server that computes nothing: what does a chunk cost it?

`python -m manyheads.bench.calibrate CHUNKS` is that server; it prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from manyheads.bench.drive import Outcome
from manyheads.bench.plan import Run, Stage

USERS = 32
"""So many users ask in each process of the generator."""
GAP = 0.01
"""An answer's chunks come so many seconds apart, for each is to arrive by itself, as from a model."""
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def pieces(chunks: int) -> list[bytes]:
    """Make the parts of an answer that has so many chunks of text."""
    piece = {"id": "x", "object": "text_completion", "choices": [{"index": 0, "text": " word", "finish_reason": None}]}
    last = {"choices": [{"index": 0, "text": " word", "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": chunks}}
    events = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in [piece] * (chunks - 1) + [last]]
    end = b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n"
    framed = [b"%x\r\n%s\r\n" % (len(part), part) for part in [*events, end]]
    return [_HEAD + framed[0], *framed[1:-1], framed[-1] + b"0\r\n\r\n"]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: list[bytes]) -> None:
    """Answer the requests of one connection."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(int(lengths[0]) if lengths else 0)
            for part in parts:
                writer.write(part)
                await asyncio.sleep(GAP)


async def serve(chunks: int) -> None:
    """Answer requests until the process is ended."""
    parts = pieces(chunks)
    server = await asyncio.start_server(lambda r, w: answer(r, w, parts), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def running(chunks: int) -> Iterator[str]:
    """Run that server while the block lasts, which is given its URL."""
    command = [sys.executable, "-m", "manyheads.bench.calibrate", str(chunks)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def limit_run(url: str, run: Run, folder: Path, seconds: float) -> Run:
    """Make the run that measures the limit: it sends the same requests with the same number of processes."""
    users = float(USERS * max(1, run.workers))
    stages = [Stage(users, seconds, 1.0)]
    return msgspec.structs.replace(
        run, url=url, kind="users", stages=stages, records=str(folder / "limit.jsonl"), drain=10.0
    )


def limit(outcome: Outcome, chunks: int) -> dict[str, float]:
    """Return the requests and chunks a second at which the generator would fill its cores; empty if unknown.

    It is extrapolated from the processor time of a chunk at a load that is far from the limit.
    """
    start, end = outcome.window(0)
    came = sum(start <= r.sent + at < end for r in outcome.records for at in r.chunks)
    inside = [use for use in outcome.uses if start <= use.at < end]
    cpu, wall = sum(use.cpu for use in inside), sum(use.seconds for use in inside)
    if not came or not cpu or not wall:
        return {}
    processes = len({use.worker for use in inside})
    most = came / (end - start) / (cpu / wall)
    return {"chunks_per_s": most, "requests_per_s": most / chunks, "processes": float(processes)}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(int(sys.argv[1])))
