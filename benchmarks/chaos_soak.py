"""The soak of chaos.py: as much work as there is time for, half of which is left in the middle, with too few pages."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from chaos_client import Answer, Ask, Load, ask, difference, mixture
from chaos_rows import Row, Size
from chaos_server import Server

MAX_MODEL_LEN = 512
NUM_SEQS = 64
BLOCK_SIZE = 16
PAGES = NUM_SEQS * MAX_MODEL_LEN // BLOCK_SIZE // 10
"""A tenth of the pages that the rows of a full batch could need."""
OPTIONS = (
    *("--max-model-len", f"{MAX_MODEL_LEN}", "--max-num-seqs", f"{NUM_SEQS}"),
    *("--block-size", f"{BLOCK_SIZE}", "--num-blocks", f"{PAGES}"),
)
FLAT_MIB = 16.0
"""Memory that grows by less counts as flat: an allocator keeps about as much for itself."""
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclass
class _Counts:
    whole: int = 0
    left: int = 0
    tokens: int = 0
    """Of the whole answers."""
    wrong: list[str] = field(default_factory=list)


async def soak(server: Server, size: Size, seconds: float) -> Row:
    """Clients ask one request after the other for so many seconds, and leave half of them unread."""
    load = await Load.prepare(server.url, mixture(size.soak_clients * 2, size.soak_clients, 6, 160, size.soak_words))
    slowest = await _slowest(load)
    counts, memory = _Counts(), _Memory(server)
    end = time.monotonic() + seconds
    clients = [_client(load, slowest, random.Random(i), end, counts) for i in range(size.soak_clients)]
    watch = asyncio.create_task(memory.watch())
    await asyncio.gather(*clients)
    watch.cancel()
    deadline = time.monotonic() + 10
    while any(gauges := [await server.metric(name) for name in GAUGES]) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    growth = memory.growth()
    preemptions, restarts = [int(await server.metric(f"{n}_total")) for n in ("num_preemptions", "engine_restarts")]
    asked = counts.whole + len(counts.wrong)
    return {
        "found": f"{counts.whole:,} of {asked:,} answers the same, {counts.left:,} requests left; {preemptions:,} "
        f"preemptions; afterwards {gauges[2]:.0%} of the pages in use, {gauges[0] + gauges[1]:.0f} requests; memory "
        f"{growth['server']:+.1f} MiB (server) and {growth['engine']:+.1f} MiB (engine) after the first tenth",
        "met": not counts.wrong and not any(gauges) and not restarts and max(growth.values()) <= FLAT_MIB,
        "seconds": seconds,
        "whole": counts.whole,
        "left": counts.left,
        "tokens_of_whole": counts.tokens,
        "preemptions": preemptions,
        "restarts": restarts,
        "gauges_after": gauges,
        "growth_mib": growth,
        "wrong": counts.wrong[:5],
        "memory_mib": memory.series(),
    }


async def _slowest(load: Load) -> float:
    """Seconds for all requests at once."""
    start = time.monotonic()
    await load.open()
    return time.monotonic() - start


async def _client(load: Load, slowest: float, chance: random.Random, end: float, counts: _Counts) -> None:
    pairs = list(zip(load.asks, load.wanted, strict=True))
    while time.monotonic() < end:
        request, want = chance.choice(pairs)
        if chance.random() < 0.5:
            answer = await _leave(load.url, request, want, slowest * chance.random(), chance)
        else:
            answer = await ask(load.url, request)
        if answer is None:
            counts.left += 1
        elif (what := difference(want, answer)) is not None:
            counts.wrong.append(f"{request.path} {request.body}: {what}")
        else:
            counts.whole += 1
            counts.tokens += answer.num_tokens or 0


async def _leave(url: str, request: Ask, want: Answer, seconds: float, chance: random.Random) -> Answer | None:
    """Asks and leaves after some time or, if it streams, perhaps in the middle of the text; None if it did leave."""
    enough, num_bytes, most = asyncio.Event(), 0, want.num_bytes * chance.random()

    def came(count: int) -> None:
        nonlocal num_bytes
        num_bytes += count
        if num_bytes > most:
            enough.set()

    asked = asyncio.create_task(ask(url, request, came if request.streams else None))
    waits = asyncio.create_task(enough.wait())
    await asyncio.wait((asked, waits), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    waits.cancel()
    if asked.done():
        return asked.result()
    asked.cancel()  # which closes the connection
    await asyncio.gather(asked, return_exceptions=True)
    return None


class _Memory:
    """What both processes hold, over time."""

    def __init__(self, server: Server) -> None:
        engine = server.engine
        assert engine is not None
        self._processes = {"server": psutil.Process(server.process.pid), "engine": engine}
        self._samples: dict[str, list[float]] = {name: [] for name in self._processes}

    async def watch(self) -> None:
        """Takes a sample a second until it is cancelled."""
        while True:
            for name, process in self._processes.items():
                self._samples[name].append(process.memory_info().rss / 2**20)
            await asyncio.sleep(1)

    def growth(self) -> dict[str, float]:
        """By how many MiB the last tenth is above the second tenth, in the median."""
        found = {}
        for name, samples in self._samples.items():
            tenth = max(len(samples) // 10, 1)
            late, early = samples[-tenth:], samples[tenth : 2 * tenth] or samples[:tenth]
            found[name] = round(statistics.median(late) - statistics.median(early), 2)
        return found

    def series(self) -> dict[str, Any]:
        """Up to 60 samples of each, in MiB."""
        return {
            name: [round(value, 1) for value in samples[:: max(len(samples) // 60, 1)]]
            for name, samples in self._samples.items()
        }
