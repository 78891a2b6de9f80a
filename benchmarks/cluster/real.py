"""Real replicas on this machine, and a client that sends them the simulation's requests by its routings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from cluster.routing import Beginnings, Router
from cluster.traffic import Request

FOLDER = Path(__file__).resolve().parents[1]
LIMIT = 300.0
"""Seconds that a request may take."""


class Text:
    """Tokens of real text, of which prompts are cut: the same for the same beginning, never twice for the rest."""

    def __init__(self, model: Path, file: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        turns = [" ".join(json.loads(line)["turns"]) for line in file.read_text().splitlines()]
        random.Random(0).shuffle(turns)
        self._tokens: list[int] = tokenizer("\n\n".join(turns)[:400_000]).input_ids

    def prompt(self, request: Request, number: int) -> list[int]:
        """Return the tokens of a request."""
        found: list[int] = []
        for key, length in request.prefixes[:-1]:
            found += self._cut(f"shared {key}", length - len(found))
        return found + self._cut(f"own {number}", request.prompt - len(found))

    def _cut(self, key: str, count: int) -> list[int]:
        at = random.Random(key).randrange(len(self._tokens) - count)
        return self._tokens[at : at + count]


@contextlib.contextmanager
def replicas(count: int, model: Path, pace: str, options: Sequence[str]) -> Iterator[list[str]]:
    """Run so many servers, one thread each, while the block lasts; yields their addresses."""
    environment = os.environ | {"CLUSTER_PACE": pace, "PYTHONPATH": f"{FOLDER}:{FOLDER.parent}"}
    command = [sys.executable, "-m", "cluster.paced", str(model), "--num-threads", "1", *options]
    ports = [_free_port() for _ in range(count)]
    started = [
        subprocess.Popen([*command, "--port", str(port)], env=environment, stderr=subprocess.DEVNULL) for port in ports
    ]
    try:
        asyncio.run(_ready(ports))
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


async def _ready(ports: Sequence[int]) -> None:
    deadline = time.monotonic() + 300
    for port in ports:
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError):
                status, _ = await asyncio.wait_for(get(f"http://127.0.0.1:{port}", "/ready"), 5)
                if status == 200:
                    break
            if time.monotonic() > deadline:
                raise SystemExit("a replica did not become ready within 300 s")
            await asyncio.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def get(url: str, path: str) -> tuple[int, str]:
    """GET: the status and the body."""
    reader, writer = await _open(url, f"GET {path} HTTP/1.1\r\nConnection: close\r\nHost: x\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return int(text.split(" ", 2)[1]), text.partition("\r\n\r\n")[2]


async def _open(url: str, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**22)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def ask(url: str, tokens: list[int], output: int) -> tuple[float, float, int]:
    """Send a request for so many tokens: when the first and the last came, by the clock, and in how many steps.

    Raises:
        ValueError: the answer is an error.
    """
    body: dict[str, Any] = {
        "prompt": tokens,
        "max_tokens": output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    reader, writer = await _open(url, f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    first = last = 0.0
    steps = got = 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            steps, got = event["usage"]["decoding_steps"], event["usage"]["completion_tokens"]
        if event.get("choices"):
            last = time.perf_counter()
            first = first or last
    writer.close()
    if got != output:
        raise ValueError(f"{url} answered with {got} tokens of {output}")
    return first, last, steps


def drive(urls: Sequence[str], requests: list[Request], text: Text, routing: str, seed: int) -> list[int]:
    """Send requests at their times and note when they were answered; returns the steps of each."""
    return asyncio.run(_drive(urls, requests, text, routing, seed))


async def _drive(urls: Sequence[str], requests: list[Request], text: Text, routing: str, seed: int) -> list[int]:
    prompts = [text.prompt(request, i + seed * 1_000_000) for i, request in enumerate(requests)]
    loads = np.zeros(len(urls))
    router = Router(routing, Beginnings(), random.Random(seed))
    router.look(range(len(urls)), loads)
    start = time.perf_counter() + 0.5

    async def one(request: Request, prompt: list[int]) -> int:
        await asyncio.sleep(start + request.at - time.perf_counter())
        number = router.choose(request)
        loads[number] += 1
        first, last, steps = await asyncio.wait_for(ask(urls[number], prompt, request.output), LIMIT)
        loads[number] -= 1
        request.first, request.last, request.done = first - start, last - start, request.output
        return steps

    return await asyncio.gather(*map(one, requests, prompts))


async def counters(url: str) -> dict[str, float]:
    """Our counters of now, by name."""
    _, page = await get(url, "/metrics")
    lines = (line.split() for line in page.splitlines() if line.startswith("manyheads_") and "{" not in line)
    return {name.removeprefix("manyheads_"): float(value) for name, value in lines}
