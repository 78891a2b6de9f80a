"""What the API process adds to first tokens and to events while requests arrive, whatever the engine.

    python benchmarks/arrivals.py                                 # 60 requests/s; writes results/arrivals.json
    python benchmarks/arrivals.py --cases 60:40 240:10 --prompts spec_bench.jsonl

A case is requests/s and the milliseconds of a step. An engine that computes nothing (streams.py) gives every stream 1
to 3 tokens a step. Requests come as traffic.py draws them, as chats whose texts the server has to tokenize, and what
would have been open before the first of them is open from the start. Engine and clients write down when a request and
each step's tokens passed; the difference is what the API process added, with the sockets on both sides.

A case is kept up with if 99 % of the tokens are with their client before the next step's are there. Each is measured
with asyncio's event loop and, where it is installed, with uvloop's. Server, engine and clients share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streams
from common import BUILTIN, ROOT, Others, machine, percentile, save, table
from traffic import ANSWERS, Ask, draw

from manyheads.bench.prompts import OPENINGS, SUBJECTS

LEAD_SECONDS = 0.5
"""Clients start in so long, once all of them are there."""
SETTLE_SECONDS, LAST_SECONDS = 1.5, 0.5
"""What happens before and behind the time that is measured: everything is open, and everything has arrived."""
LONGEST_SECONDS = 60.0
"""Requests that came up to so long ago may still be open."""
COUNT = re.compile(rb'"completion_tokens":(\d+)')
PORT = streams.PORT


@dataclass(frozen=True)
class Heard:
    """What a client saw of a request: the event's time, and the tokens so far."""

    number: int
    sent: float
    events: list[tuple[float, int]]


@dataclass(frozen=True)
class Told:
    """What the engine saw of it: when it came, and after each step's time the tokens so far."""

    came: float
    steps: list[tuple[float, int]]


def texts_of(prompts: Path | None) -> list[str]:
    """Texts that prompts are cut from."""
    if prompts is None:
        return [opening.format(subject) for opening in OPENINGS for subject in SUBJECTS]
    return [" ".join(json.loads(line)["turns"]) for line in prompts.read_text().splitlines()]


def asks_of(rate: float, step: float, seconds: float, prompts: Path | None) -> list[tuple[Ask, str]]:
    """Requests, and their texts; those of the past with what is left of them, at once."""
    from tokenizers import Tokenizer  # NOTE: not in the processes of clients, which have to start soon

    tokenizer = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    texts = [tokenizer.encode(text + " ", add_special_tokens=False).ids for text in texts_of(prompts)]
    past = min(LONGEST_SECONDS, ANSWERS[3] * step)
    found = []
    for ask in draw(rate, past + seconds, 0, texts):
        at = ask.at - past
        left = ask.max_tokens - round(max(0.0, -at) / step * statistics.mean(streams.GAINS))
        if left > 0:
            found.append((Ask(max(at, 0.0), ask.prompt, left), tokenizer.decode(ask.prompt)))
    return found


async def listen(number: int, ask: Ask, text: str, start: float) -> Heard:
    """Send a request when its time has come, and read its stream."""
    await asyncio.sleep(max(0.0, start + ask.at - time.monotonic()))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": ask.max_tokens}
    body |= {"seed": number, "stream": True, "ignore_eos": True, "temperature": 0}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    data = json.dumps(body).encode()
    head = f"Host: here\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(data)}"
    heard = Heard(number, time.monotonic(), [])
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=2**20)
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data)
    try:
        async for line in reader:
            if count := COUNT.search(line):
                heard.events.append((time.monotonic(), int(count[1])))
    except asyncio.CancelledError:
        pass  # NOTE: the time is over, and what has been heard is the result
    writer.close()
    return heard


def work(part: list[tuple[int, Ask, str]], start: float, seconds: float) -> list[Heard]:
    """What one process of clients does; after so many seconds it leaves."""

    async def all_of_them() -> list[Heard]:
        tasks = [asyncio.create_task(listen(*each, start)) for each in part]
        await asyncio.sleep(start + seconds - time.monotonic())
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return [heard for heard in done if isinstance(heard, Heard)]

    return asyncio.run(all_of_them())


def told(log: Path) -> dict[int, Told]:
    """What the engine wrote down."""
    found: dict[int, Told] = {}
    for number, tokens, at in struct.iter_unpack(streams.RECORD, log.read_bytes()):
        if tokens == 0:
            found[number] = Told(at, [])
        else:
            found[number].steps.append((at, tokens))
    return found


def figures(engine: dict[int, Told], clients: list[Heard], begin: float, end: float, step: float) -> dict[str, Any]:
    """Of what happened between two times; what has not arrived has been on its way until it was looked for last."""
    firsts: list[float] = []
    delays: list[float] = []
    num_events = num_tokens = sent = 0
    for heard in clients:
        counts = [count for _, count in heard.events]
        if begin <= heard.sent < end:
            sent += 1
            late = end + LAST_SECONDS - heard.sent
            if heard.number in engine and (first := bisect.bisect_left(counts, 1)) < len(counts):
                made = engine[heard.number].steps[0][0] - engine[heard.number].came
                late = heard.events[first][0] - heard.sent - made
            firsts.append(late)
        num_events += sum(begin <= at < end for at, count in heard.events if count > 0)
        before = 0
        for at, count in engine[heard.number].steps if heard.number in engine else ():
            if begin <= at < end:
                place = bisect.bisect_left(counts, count)
                delays.append((heard.events[place][0] if place < len(counts) else end + LAST_SECONDS) - at)
                num_tokens += count - before
            before = count
    late = sum(delay > step for delay in delays) / len(delays)
    steps = {at for of in engine.values() for at, _ in of.steps if begin <= at < end}
    found: dict[str, Any] = {"steps_per_s": len(steps) / (end - begin), "streams": len(delays) / len(steps)}
    found |= {"requests_per_s": sent / (end - begin)}
    found |= {"tokens_per_s": num_tokens / (end - begin), "events_per_s": num_events / (end - begin)}
    for name, values in (("first_ms", firsts), ("event_ms", delays)):
        ordered = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)}
        found |= {f"{name}_{key}": 1e3 * (value or 0.0) for key, value in ordered.items()}
    return {key: round(value, 2) for key, value in found.items()} | {"late": round(late, 4), "keeps_up": late <= 0.01}


def measure(loop: str, rate: float, step: float, args: argparse.Namespace) -> dict[str, Any]:
    """One case."""
    seconds = SETTLE_SECONDS + args.hold + LAST_SECONDS
    asks = [(number, *each) for number, each in enumerate(asks_of(rate, step, seconds, args.prompts))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with streams.serving(STREAMS_LOOP=loop, STREAMS_STEP=str(step), STREAMS_LOG=str(log)) as process:
            context = multiprocessing.get_context("spawn")
            all_there = context.Barrier(args.clients + 1)
            with context.Pool(args.clients, all_there.wait) as pool:
                all_there.wait()
                start = time.monotonic() + LEAD_SECONDS
                parts = [(asks[i :: args.clients], start, seconds) for i in range(args.clients)]
                running = pool.starmap_async(work, parts)
                begin = start + SETTLE_SECONDS
                time.sleep(begin - time.monotonic())
                before, others = process.cpu_times(), Others()
                end = begin + args.hold
                time.sleep(end - time.monotonic())
                after, elsewhere = process.cpu_times(), others.share()
                heard = [one for part in running.get() for one in part]
            process.kill()  # NOTE: else it would finish what is open; the engine ends with it
        found = figures(told(log), heard, begin, end, step)
    busy = after.user + after.system - before.user - before.system
    row = {"loop": loop, "rate": rate, "step_ms": step * 1e3, "cpu_share": round(busy / args.hold, 3)}
    row["cpu_us_per_event"] = round(1e6 * busy / args.hold / found["events_per_s"], 1)
    return row | found | {"other_work": round(elsewhere, 3)}


def case(text: str) -> tuple[float, float]:
    """Requests/s, and seconds of a step."""
    rate, step = map(float, text.split(":"))
    return rate, step / 1e3


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=case, nargs="+", default=[case("60:10"), case("60:40")], metavar="RATE:MS")
    parser.add_argument("--loops", nargs="+", choices=("asyncio", "uvloop"))
    parser.add_argument("--hold", type=float, default=5.0, help="seconds that are measured")
    parser.add_argument("--clients", type=int, default=min(6, os.cpu_count() or 1), help="processes of them")
    parser.add_argument("--prompts", type=Path, help="lines with `turns` (default: short made-up questions)")
    parser.add_argument("--part", default="now", help="name of this run in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arrivals.json")
    args = parser.parse_args()
    loops = args.loops or ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]
    rows = [measure(loop, rate, step, args) for rate, step in args.cases for loop in loops]
    table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    save(args.out, args.part, {"machine": machine(), "prompts": getattr(args.prompts, "name", None), "rows": rows})


if __name__ == "__main__":
    main()
