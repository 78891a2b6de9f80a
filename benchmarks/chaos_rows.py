"""The faults of chaos.py. Each runs against a server that takes requests, and returns a row of the table:
what was found in words, whether that meets the aim, and the raw figures."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
from chaos_client import Ask, Load, ask, get, mixture
from chaos_server import Server

Row = dict[str, Any]
READY_WITHIN = 2.0
"""Seconds beyond those of a start that a restart may take."""
GONE_WITHIN = 1.0
"""After the server has been killed, its engine may be there for so many seconds."""
FLIPPED_WITHIN = 0.5
"""Seconds after SIGTERM until /ready says no."""
COUNTS = ("engine_restarts_total", "requests_resumed_total")
NOTICED_WITHIN = 1.5
"""Seconds beyond the watchdog's: the engine may have spoken just before, and a process takes a moment to end."""


@dataclass(frozen=True)
class Size:
    """How long the faults go on."""

    streams: int = 32
    plain: int = 16
    kills: int = 20
    stops: int = 5
    poisons: int = 10
    poisoned: int = 16
    drained: int = 24
    soak_clients: int = 48
    soak_words: int = 150
    max_tokens: int = 120

    def asks(self, streams: int, plain: int, seed: int) -> list[Ask]:
        """A mixture of so many streams and plain requests."""
        return mixture(streams + plain, streams, seed, self.max_tokens)


SHORT = Size(
    streams=5,
    plain=3,
    kills=2,
    stops=1,
    poisons=2,
    poisoned=6,
    drained=6,
    soak_clients=12,
    soak_words=40,
    max_tokens=80,
)


async def killed(server: Server, size: Size) -> Row:
    """The engine is killed at random times, with requests of all kinds open."""
    load = await Load.prepare(server.url, size.asks(size.streams, size.plain, 1))
    rounds, wrong = await _strikes(server, load, size.kills, signal.SIGKILL)
    slowest = max(r["ready_s"] for r in rounds)
    resumed = sum(r["resumed"] for r in rounds)
    asked = len(load.asks) * len(rounds)
    return {
        "found": f"{asked - len(wrong):,} of {asked:,} answers the same, {resumed:,} texts went on in another engine; "
        f"ready after {_median(rounds, 'ready_s'):.1f} s, at most {slowest:.1f} s; start {server.start_seconds:.1f} s",
        "met": not wrong and resumed > 0 and slowest <= server.start_seconds + READY_WITHIN,
        "start_s": round(server.start_seconds, 2),
        "wrong": wrong[:5],
        "rounds": rounds,
    }


async def stopped(server: Server, size: Size, watchdog: float) -> Row:
    """The engine is stopped, as a driver that hangs would stop it."""
    load = await Load.prepare(server.url, size.asks(size.streams, size.plain, 2))
    rounds, wrong = await _strikes(server, load, size.stops, signal.SIGSTOP)
    slowest = max(r["gone_s"] for r in rounds)
    resumed = sum(r["resumed"] for r in rounds)
    asked = len(load.asks) * len(rounds)
    return {
        "found": f"noticed after {_median(rounds, 'gone_s'):.1f} s, at most {slowest:.1f} s (--watchdog {watchdog:g}); "
        f"{asked - len(wrong):,} of {asked:,} answers the same, {resumed:,} texts went on in another engine",
        "met": not wrong and resumed > 0 and slowest <= watchdog + NOTICED_WITHIN,
        "watchdog_s": watchdog,
        "wrong": wrong[:5],
        "rounds": rounds,
    }


async def _strikes(server: Server, load: Load, count: int, number: int) -> tuple[list[Row], list[str]]:
    """Sends the engine a signal at a random time, so many times; one after all answers to the one before have ended."""
    chance, rounds, wrong = random.Random(count), [], []
    for _ in range(count):
        share = chance.uniform(0.02, 0.8)
        restarts, resumed = [await server.metric(name) for name in COUNTS]
        answers = load.open()
        await load.until(share, answers)
        engine = server.engine
        if engine is None:
            raise RuntimeError(f"there is no engine: {server.log[-2000:]}")
        struck = time.monotonic()
        engine.send_signal(number)
        gone = await _seconds_until(lambda: _has_ended(engine), struck)  # noqa: B023 (it is awaited here)
        while await server.metric(COUNTS[0]) == restarts or (await get(server.url, "/ready"))[0] != 200:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server has ended: {server.log[-2000:]}")
            await asyncio.sleep(0.05)
        ready = time.monotonic() - struck
        differences = load.differences(await answers)
        row = {"at": share, "gone_s": gone, "ready_s": ready, "all_ended_s": time.monotonic() - struck}
        rounds.append({key: round(value, 3) for key, value in row.items()})
        rounds[-1] |= {"resumed": int(await server.metric(COUNTS[1]) - resumed), "wrong": len(differences)}
        wrong += differences
        print(rounds[-1], flush=True)
    return rounds, wrong


async def poisoned(server: Server, size: Size, token: int) -> Row:
    """A request makes the model give NaN, at its prompt or in the middle of its answer, beside others.

    Args:
        token: this one gives NaN.
    """
    # some may draw the token by themselves, if the model is a random one
    load = await Load.prepare(server.url, size.asks(size.poisoned // 2, size.poisoned, 3), left_out="model_error")
    load = Load(server.url, load.asks[: size.poisoned], load.wanted[: size.poisoned])
    counts = {"poisons": 0, "model_error": 0, "others": 0, "restarts": 0}
    wrong: list[str] = []
    for number in range(size.poisons):
        answers = load.open()
        await load.until(0.3 * number / size.poisons, answers)
        poisons = await asyncio.gather(*(ask(server.url, _poison(token, kind)) for kind in range(4)))
        for kind, answer in enumerate(poisons):
            counts["poisons"] += 1
            # of a stream with a token the status may have been sent before the error was known
            if answer.code == "model_error" and (answer.status == 500 or (kind == 3 and answer.status == 200)):
                counts["model_error"] += 1
            else:
                wrong.append(f"poison {kind}: {answer.status} {answer.error} {answer.code}")
        differences = load.differences(await answers)
        counts["others"] += len(load.asks) - len(differences)
        wrong += differences
    counts["restarts"] = int(await server.metric(COUNTS[0]))
    asked = size.poisons * len(load.asks)
    return {
        "found": f"{counts['model_error']} of {counts['poisons']} poisons got their error; "
        f"{counts['others']} of {asked} other answers the same; {counts['restarts']} restarts",
        "met": not wrong and not counts["restarts"],
        "wrong": wrong[:5],
        **counts,
    }


def _poison(token: int, kind: int) -> Ask:
    """NaN comes with the prompt (kinds 0 and 1) or after the first token of the answer; odd kinds stream."""
    body: dict[str, Any] = {"prompt": [5, 6, token, 7] if kind < 2 else [5, 6, 7], "max_tokens": 50, "temperature": 0.0}
    if kind in (1, 2):
        body["logprobs"] = 2
    if kind >= 2:
        body["logit_bias"] = {str(token): 100}
    if kind % 2:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Ask("/v1/completions", body)


async def server_killed(server: Server, size: Size, left_out: str = "") -> Row:
    """The API server is killed with requests open. It is the last fault that this server sees.

    Args:
        left_out: see `Load.prepare`.
    """
    load = await Load.prepare(server.url, size.asks(size.streams, size.plain, 4), left_out)
    answers = load.open()
    await load.until(0.1, answers)
    engine = server.engine
    assert engine is not None
    before = time.monotonic()
    server.process.kill()
    server.process.wait()
    gone = await _seconds_until(lambda: _has_ended(engine), before)
    await asyncio.sleep(max(0.0, 1.0 - gone))
    left = server.left_over()
    await answers
    return {
        "found": f"engine gone after {gone:.2f} s, {len(left)} files, sockets or pieces of shared memory left",
        "met": gone <= GONE_WITHIN and not left,
        "engine_gone_s": round(gone, 3),
        "left": left[:5],
    }


async def drained(server: Server, size: Size, seconds: float) -> Row:
    """SIGTERM comes with streams open. It is the last fault that this server sees.

    Args:
        seconds: the server's --drain-timeout.
    """
    load = await Load.prepare(server.url, size.asks(size.drained, 0, 5))
    answers = load.open()
    await load.until(0.1, answers)
    before = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    while (await get(server.url, "/ready"))[0] == 200:
        await asyncio.sleep(0.01)
    flipped = time.monotonic() - before
    still_open = not answers.done()
    late = await ask(server.url, load.asks[0])
    refused = late.status == 503 and "retry-after" in late.headers
    wrong = load.differences(await answers)
    status = await asyncio.to_thread(server.process.wait, seconds + 10)
    took, left = time.monotonic() - before, server.left_over()
    asked = len(load.asks)
    return {
        "found": f"/ready flipped after {flipped * 1000:.0f} ms; {asked - len(wrong)} of {asked} streams whole; "
        f"a late request was {'' if refused else 'not '}refused; exit {status} after {took:.1f} s",
        "met": flipped <= FLIPPED_WITHIN and refused and still_open and not wrong and status == 0 and not left,
        "flipped_s": round(flipped, 4),
        "ended_s": round(took, 2),
        "wrong": wrong[:5],
        "left": left[:5],
    }


def _has_ended(process: psutil.Process) -> bool:
    """Whether a process is no more; one that nobody has waited for yet is none."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def _seconds_until(condition: Callable[[], bool], start: float, most: float = 60.0) -> float:
    while not condition() and time.monotonic() - start < most:
        await asyncio.sleep(0.01)
    return time.monotonic() - start


def _median(rounds: list[Row], name: str) -> float:
    return statistics.median(float(r[name]) for r in rounds)
