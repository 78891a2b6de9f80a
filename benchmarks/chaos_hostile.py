"""Clients of chaos.py that hold connections and do not do their part, and what the others notice of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import hostile
from chaos_client import Load
from chaos_rows import Row, Size
from chaos_server import Server

SECONDS = 5.0
OPTIONS = tuple(part for limit in ("header", "write") for part in (f"--{limit}-timeout", f"{SECONDS:g}"))
FEW_FILES = 64
LATE = 5.0
"""Connections may stay for so many seconds beyond the limit: the processors are shared with 1,200 clients."""
MOST_SECONDS = 120.0
"""Streams that nobody reads fill the buffers on the way first, as fast as the model writes."""
MOST_LOG = 100_000
"""Bytes."""


async def hold(server: Server, few_files: Server, size: Size) -> Row:
    """Connections with half a request and streams that nobody reads, and idle ones where files are few.

    Args:
        few_files: a server that may open only so many files (`FEW_FILES`).
    """
    unread = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "logprobs": 20}
    kinds: list[tuple[str, Server, Callable[[hostile.Address], hostile.Clients], float]] = [
        ("1,200 half-open", server, lambda address: hostile.half_open(address, 1200), SECONDS + LATE),
        ("40 unread", server, lambda address: hostile.unread(address, 40, **unread), MOST_SECONDS),
        (f"200 idle, {FEW_FILES} files", few_files, lambda address: hostile.idle(address, 200), SECONDS + LATE),
    ]
    loads = {s: await Load.prepare(s.url, size.asks(4, 4, 7)) for s in (server, few_files)}
    found = [await _beside(name, loads[s], open_all, most) for name, s, open_all, most in kinds]
    log = max(len(s.log) for s in loads)
    running = sum([await s.metric("num_requests_running") for s in loads])
    wrong = [line for kind in found for line in kind.pop("differences")]
    words = [f"{kind['clients']} gone after {kind['gone_s']:.1f} s, {kind['rounds']} rounds of 8" for kind in found]
    return {
        "found": f"{'; '.join(words)} answered meanwhile, {len(wrong)} wrong; {log:,} bytes of log",
        "met": not wrong and all(kind["in_time"] for kind in found) and log < MOST_LOG and not running,
        "limit_s": SECONDS,
        "log_bytes": log,
        "wrong": wrong[:5],
        "kinds": found,
    }


async def _beside(name: str, load: Load, open_all: Callable[[hostile.Address], hostile.Clients], most: float) -> Row:
    """Opens such clients, and asks for what others ask until the server has closed them all."""
    where = urlsplit(load.url)
    assert where.hostname is not None
    assert where.port is not None
    begun = time.monotonic()
    await load.open()
    alone, begun = time.monotonic() - begun, time.monotonic()
    rounds: list[float] = []
    differences: list[str] = []
    with await asyncio.to_thread(open_all, (where.hostname, where.port)) as clients:

        async def watch() -> float:
            while clients.num_open() and time.monotonic() - begun < MOST_SECONDS:
                clients.drip()  # which gives no more time
                await asyncio.sleep(0.1)
            return time.monotonic() - begun

        watching = asyncio.create_task(watch())
        while not watching.done():
            start = time.monotonic()
            differences += load.differences(await load.open())
            rounds.append(time.monotonic() - start)
        gone = await watching
        left = clients.num_open()
    return {
        "clients": name,
        "gone_s": round(gone, 2),
        "in_time": not left and gone <= most,
        "rounds": len(rounds),
        "alone_s": round(alone, 2),
        "slowest_s": round(max(rounds), 2),
        "differences": differences,
    }
