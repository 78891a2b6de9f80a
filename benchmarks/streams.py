"""How many tokens a second the API server writes to many streams, whatever the engine.

An engine that computes nothing has a token for every stream each 10 ms. (arrivals.py: while requests arrive.)

    python benchmarks/streams.py                     # writes results/streams.json

Server, engine and clients share the machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib
import json
import os
import random
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import BUILTIN, ROOT, machine, save, server, table

from manyheads.config import EngineConfig
from manyheads.request import EngineReady, EngineRequest, FinishReason, RequestDelta
from manyheads.stats import EngineStats

STEP_SECONDS = 0.01
PORT = 8017
TEXT = range(300, 500)
"""Tokens, over and over: each is some letters."""
GAINS = (1, 2, 3)
"""Tokens of a stream in a step, where a log is written."""
RECORD = "=iid"
"""In the log: a request's seed, its tokens so far (0: it has come), and the time."""
NAP_SECONDS = 5e-4
"""So often an engine that waits looks whether requests have come."""


class Engine:
    """A token for every request at every step; with a log 1 to 3, and it writes down when."""

    def __init__(self) -> None:
        self._step_seconds = float(os.environ.get("STREAMS_STEP", STEP_SECONDS))
        log = os.environ.get("STREAMS_LOG")
        self._log = open(log, "xb", buffering=0) if log else None  # noqa: SIM115 - to its end; another engine has none
        self.ready = EngineReady(
            model="streams",
            max_model_len=4096,
            vocab_size=4096,
            dtype="float32",
            device="none",
            num_pages=1,
            page_size=16,
            eos_token_ids=[0],
        )
        self._open: dict[str, EngineRequest] = {}
        self._done: dict[str, int] = {}
        self._due = 0.0

    def listen(self, admitted: object, beat: object) -> None:
        pass

    def add_request(self, message: EngineRequest) -> None:
        self._open[message.request_id], self._done[message.request_id] = message, 0
        self._write([(message, 0)])

    def abort(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._open)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._open))

    def step(self) -> list[RequestDelta]:
        if self._due > time.perf_counter():
            time.sleep(min(NAP_SECONDS, self._due - time.perf_counter()))
            return []
        self._due = max(self._due + self._step_seconds, time.perf_counter())
        deltas, written = [], []
        for name, request in list(self._open.items()):
            done, most = self._done[name], request.params.max_tokens or 0
            self._done[name] = count = min(most, done + (random.choice(GAINS) if self._log is not None else 1))
            tokens = [TEXT[i % len(TEXT)] for i in range(done, count)]
            reason: FinishReason | None = "length" if count == most else None
            if reason:
                del self._open[name]
            deltas.append(RequestDelta(request_id=name, new_token_ids=tokens, finish_reason=reason, num_steps=count))
            written.append((request, count))
        self._write(written)
        return deltas

    def _write(self, counts: list[tuple[EngineRequest, int]]) -> None:
        if self._log is not None:
            now = time.monotonic()
            self._log.write(b"".join(struct.pack(RECORD, of.params.seed or 0, count, now) for of, count in counts))


def build(config: EngineConfig, progress: object = None) -> Engine:
    """For the engine process."""
    return Engine()


@contextlib.contextmanager
def serving(**more: str) -> Iterator[psutil.Process]:
    """The API process over this engine, with more in its environment; it ends with the block."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--serve"]
    with server(command, f"http://127.0.0.1:{PORT}", env=os.environ | {"PYTHONPATH": path} | more) as process:
        yield psutil.Process(process.pid)


async def read(num_tokens: int) -> tuple[int, int]:
    """One stream: its events and its tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=2**20)
    asked = {"prompt": [5], "max_tokens": num_tokens, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(asked).encode()
    head = f"Host: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + body)
    events, last = 0, b""
    while data := await reader.read(2**16):
        events += data.count(b"data: ")
        last = (last + data)[-1000:]
    writer.close()
    usage = json.loads(last.split(b"data: ")[-2].split(b"\n")[0])["usage"]
    return events - 2, usage["completion_tokens"]  # without the usage and the end


async def measure(streams: int, num_tokens: int, process: psutil.Process) -> dict[str, Any]:
    before, start = process.cpu_times(), time.perf_counter()
    found = await asyncio.gather(*(read(num_tokens) for _ in range(streams)))
    seconds, after = time.perf_counter() - start, process.cpu_times()
    events, tokens = (sum(column) for column in zip(*found, strict=True))
    busy = after.user + after.system - before.user - before.system
    return {
        "streams": streams,
        "asked_per_s": streams / STEP_SECONDS,
        "tokens_per_s": tokens / seconds,
        "events_per_s": events / seconds,
        "tokens_per_event": tokens / events,
        "server_cpu_us_per_token": busy / tokens * 1e6,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--part", default="now", help="name of this run in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "streams.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        from manyheads import cli
        from manyheads.server import run

        run.serve = functools.partial(run.serve, build="streams:build")
        if os.environ.get("STREAMS_LOOP") == "uvloop":
            asyncio.set_event_loop_policy(importlib.import_module("uvloop").EventLoopPolicy())
        sys.exit(cli.main(["serve", str(BUILTIN), "--port", str(PORT)]))
    with serving() as process:
        asyncio.run(measure(8, 50, process))
        rows = [asyncio.run(measure(streams, args.tokens, process)) for streams in args.streams]
    table(list(rows[0]), [[f"{value:.5g}" for value in row.values()] for row in rows])
    save(args.out, args.part, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
