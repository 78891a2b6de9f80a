"""What the queue promises when far too much is asked.

    python benchmarks/overload.py                  # writes results/overload.json
    python benchmarks/overload.py --seconds 30     # a quick look

Who is let in starts in time, who is not is told when to come back, and a small client does not wait for a large one. A
real server answers with the built-in model, or another one. First the most that it serves is measured, with more users
than rows; then Poisson arrivals ask for several times as much and wait for no answer. Client and server share the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import BUILTIN, ROOT, Others, machine, percentile, save, server, table

PORT = 8018
SETTLE_SECONDS = 5.0
"""What ends sooner after the start of a load does not count."""
RETRIES = 0.1
"""So many of those who are refused come back, exactly when they were told to."""
MANY, FEW = "127.0.0.1", "127.0.0.2"
"""Clients are told apart by their addresses."""
SUBJECTS = ("hip hop", "the sea", "bread", "old maps", "bees", "a lighthouse", "chess", "snow")


@dataclass
class Answer:
    """How one request went; times are in seconds of `time.monotonic`."""

    sent: float
    status: int = 0
    retry_after: float | None = None
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    error: str = ""
    retry: bool = False

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error


async def ask(body: dict[str, Any], address: str = MANY, retry: bool = False) -> Answer:
    """Stream one answer."""
    answer = Answer(time.monotonic(), retry=retry)
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT, local_addr=(address, 0), limit=2**20)
        data = json.dumps(body).encode()
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + data)
        with contextlib.closing(writer):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            answer.status = int(lines[0].split()[1])
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            answer.retry_after = float(headers["retry-after"]) if "retry-after" in headers else None
            async for line in reader:
                if line.startswith(b'data: {"error"'):
                    answer.error = json.loads(line[6:])["error"]["message"]
                elif line.startswith(b"data: {"):
                    answer.first = answer.first or time.monotonic()
                    if b'"completion_tokens"' in line:
                        answer.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    except (OSError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.monotonic()
    return answer


@dataclass
class Load:
    """Requests of one kind, and how they went."""

    tokens: tuple[int, int]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    answers: list[Answer] = field(default_factory=list)

    async def one(self, retry: bool = False) -> Answer:
        subject = self.rng.choice(SUBJECTS)
        body = {
            "prompt": f"{self.rng.randrange(1000)}. Tell me something about {subject}.",
            "max_tokens": self.rng.randint(*self.tokens),
            "ignore_eos": True,
            "temperature": 0.8,
        }
        answer = await ask(body, retry=retry)
        self.answers.append(answer)
        return answer

    def rate(self, start: float, end: float) -> tuple[float, float]:
        """Requests and tokens a second, of what was whole between two times."""
        done = [a for a in self.answers if a.ok and start <= a.ended < end]
        return len(done) / (end - start), sum(a.tokens for a in done) / (end - start)


async def closed(load: Load, users: int, seconds: float) -> tuple[float, float]:
    """So many users ask again and again. Returns requests and tokens a second."""
    start = time.monotonic()

    async def user() -> None:
        while time.monotonic() < start + SETTLE_SECONDS + seconds:
            await load.one()

    await asyncio.gather(*(user() for _ in range(users)))
    return load.rate(start + SETTLE_SECONDS, start + SETTLE_SECONDS + seconds)


async def opened(load: Load, per_second: float, seconds: float) -> float:
    """Requests arrive whatever becomes of them. Returns tokens a second of those that were served."""
    start = time.monotonic()
    due = start
    tasks: list[asyncio.Task[None]] = []

    async def once(retry: bool) -> None:
        answer = await load.one(retry)
        if answer.status == 429 and answer.retry_after is not None and (retry or load.rng.random() < RETRIES):
            await asyncio.sleep(answer.retry_after - (time.monotonic() - answer.ended))
            if time.monotonic() < start + seconds:
                tasks.append(asyncio.create_task(once(True)))

    while due < start + seconds:
        await asyncio.sleep(due - time.monotonic())
        tasks.append(asyncio.create_task(once(False)))
        due += load.rng.expovariate(per_second)
    while pending := [task for task in tasks if not task.done()]:
        await asyncio.gather(*pending)
    return load.rate(start + SETTLE_SECONDS, start + seconds)[1]


def retry_errors(answers: list[Answer]) -> list[float]:
    """Of every refusal: how far what it was told is from the time until somebody was let in, relative to that."""
    let_in = sorted(a.sent for a in answers if a.status == 200)
    errors = []
    for refused in (a for a in answers if a.status == 429):
        later = next((sent for sent in let_in if sent > refused.sent), None)
        if later is not None and refused.retry_after is not None:
            actual = later - refused.sent
            errors.append(abs(refused.retry_after - actual) / actual)
    return errors


async def overload(args: argparse.Namespace) -> dict[str, Any]:
    """The most that is served, and what becomes of several times as much."""
    peak_requests, peak_tokens = await closed(Load(args.tokens), args.users, max(10.0, args.seconds / 4))
    load = Load(args.tokens, random.Random(1))
    goodput = await opened(load, args.times * peak_requests, args.seconds)
    answers = load.answers
    accepted = [a for a in answers if a.status == 200]
    first = [a.first - a.sent for a in accepted if a.first is not None]
    errors, retries = retry_errors(answers), [a for a in answers if a.retry]
    late = [a for a in answers if a.status == 429 and a.ended - a.sent > args.max_wait / 2]
    unlike = {a.error or str(a.status) for a in answers if not a.ok and a.status != 429}
    return {
        "peak_requests_per_s": peak_requests,
        "peak_tokens_per_s": peak_tokens,
        "asked_per_s": args.times * peak_requests,
        "requests": len(answers),
        "goodput_tokens_per_s": goodput,
        "goodput_of_peak": goodput / peak_tokens,
        "first_token_p50_s": percentile(first, 50),
        "first_token_p99_s": percentile(first, 99),
        "first_token_in_time": sum(f <= args.max_wait for f in first) / max(1, len(first) + len(late)),
        "refused": sum(a.status == 429 for a in answers) / len(answers),
        "refused_late": len(late),
        "other_errors": sorted(unlike),
        "retry_after_median_s": statistics.median(a.retry_after or 0 for a in answers if a.status == 429),
        "retry_after_error_median": statistics.median(errors) if errors else None,
        "retries": len(retries),
        "retries_let_in": sum(a.status == 200 for a in retries) / max(1, len(retries)),
    }


async def fairness(args: argparse.Namespace) -> dict[str, Any]:
    """One-token requests of one client, alone and beside 16 prompts with n = 64 of another."""
    small = {"prompt": "Tell me", "max_tokens": 1, "ignore_eos": True}

    async def beside(work: Awaitable[Any]) -> list[float]:
        task = asyncio.ensure_future(work)
        found: list[float] = []
        await asyncio.sleep(0.5)
        while not task.done() or len(found) < 20:
            answer = await ask(small, FEW)
            assert answer.ok, answer
            found.append(answer.ended - answer.sent)
            await asyncio.sleep(0.05)
        await task
        return found

    alone = await beside(asyncio.sleep(args.seconds / 8))
    prompts = [f"{i}. Tell me something about {SUBJECTS[i % 8]}." for i in range(16)]
    flood = {"prompt": prompts, "n": 64, "max_tokens": args.flood_tokens, "ignore_eos": True, "temperature": 0.8}
    large = asyncio.ensure_future(ask(flood))
    waits = await beside(large)
    assert large.result().ok, large.result()
    p99 = [percentile(found, 99) or 0.0 for found in (alone, waits)]
    return {
        "large_seconds": large.result().ended - large.result().sent,
        "alone_n": len(alone),
        "alone_p50_s": percentile(alone, 50),
        "alone_p99_s": p99[0],
        "beside_n": len(waits),
        "beside_p50_s": percentile(waits, 50),
        "beside_p99_s": p99[1],
        "p99_times": p99[1] / p99[0],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload")
    parser.add_argument("--times", type=float, default=4.0, help="how many times the peak is asked for")
    parser.add_argument("--max-wait", type=float, default=30.0, help="of the server")
    parser.add_argument("--users", type=int, default=96, help="who ask for the peak; more than the server's rows")
    parser.add_argument("--tokens", type=int, nargs=2, default=(32, 96), help="least and most of an answer")
    parser.add_argument("--flood-tokens", type=int, default=16, help="of each of the 1,024 answers of one request")
    parser.add_argument("--only", choices=("overload", "fairness"))
    parser.add_argument("--part", default="now", help="name of this run in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overload.json")
    parser.add_argument("options", nargs="*", help="further options of the server, after --")
    args = parser.parse_args()
    command = [sys.executable, "-m", "manyheads", "serve", str(args.model), "--host", "127.0.0.1", "--port", str(PORT)]
    command += ["--max-queue", "16384", "--max-wait", str(args.max_wait), *args.options]
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {"overload": overload, "fairness": fairness}
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": vars(args) | {"model": args.model.name, "out": args.out.name},
    }
    for name, part in parts.items():
        if args.only in (None, name):
            others = Others()
            with server(command, f"http://127.0.0.1:{PORT}"):
                result[name] = asyncio.run(part(args))
            result[name]["other_work"] = others.share()
            result[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in result[name].items()}
            table(["", name], list(result[name].items()))
    save(args.out, args.part, result)


if __name__ == "__main__":
    main()
