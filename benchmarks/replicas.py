"""Several replicas on this machine: speed, deaths, shared beginnings, and scaling under load.

    python benchmarks/replicas.py                       # every part
    python benchmarks/replicas.py --only killed --kills 10
    python benchmarks/replicas.py --only speed --model SmolLM2-135M-Instruct.Q4_1.gguf

Each part is put into benchmarks/results/replicas.json; the speed of another model under its name.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
from chaos_client import Answer, Ask, ask, difference, exchange, get, mixture, parse
from chaos_server import Server, started
from common import BUILTIN, ROOT, machine, save

from manyheads.bench.prompts import OPENINGS, SUBJECTS

PARTS = ("speed", "killed", "prefixes", "scaling")
OPTIONS = ("--device", "cpu", "--num-threads", "1", "--max-model-len", "2048", "--max-wait", "120")
PORT = 18765


def replicas(count: int, model: Path = BUILTIN) -> contextlib.AbstractAsyncContextManager[Server]:
    """A server with so many replicas of a model, one thread each."""
    return started(model, ["--replicas", str(count), *OPTIONS])


def completion(prompt: str, max_tokens: int, **more: Any) -> Ask:
    """Of exactly so many tokens."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **more}
    return Ask("/v1/completions", body)


async def users(url: str, count: int, seconds: float, request: Callable[[random.Random], Ask]) -> list[Answer]:
    """Answers to users who ask one request after the other for so long."""
    end = time.monotonic() + seconds
    answers: list[Answer] = []

    async def user(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            answers.append(await ask(url, request(chance)))

    await asyncio.gather(*(user(seed) for seed in range(count)))
    return answers


def failed(answers: list[Answer]) -> int:
    """How many are no whole answers."""
    return sum(answer.error is not None or answer.status != 200 for answer in answers)


def sentence(chance: random.Random) -> str:
    return chance.choice(OPENINGS).format(chance.choice(SUBJECTS))


async def by_engine(url: str, name: str) -> dict[str, float]:
    """A figure of /metrics for each replica."""
    _, text = await get(url, "/metrics")
    found = re.findall(rf'^manyheads_{name}{{engine="([^"]+)"}} (\S+)$', text, re.MULTILINE)
    return {engine: float(value) for engine, value in found}


async def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Requests a second of one replica and of two, in turns; the better of each counts."""
    found: dict[int, list[float]] = {1: [], 2: []}
    lost = 0
    for _ in range(args.rounds):
        for count, rates in found.items():
            async with replicas(count, args.model) as server:
                await users(server.url, 8, 3.0, lambda chance: completion(sentence(chance), 32))
                began = time.monotonic()
                answers = await users(server.url, 16, args.seconds, lambda chance: completion(sentence(chance), 96))
                rates.append(len(answers) / (time.monotonic() - began))
                lost += failed(answers)
    return {
        "requests_per_second": {str(count): [round(rate, 2) for rate in rates] for count, rates in found.items()},
        "ratio": round(max(found[2]) / max(found[1]), 2),
        "failed": lost,
    }


def actors(server: Server) -> list[psutil.Process]:
    """The replicas' processes."""
    there = psutil.Process(server.process.pid).children(recursive=True)
    found = []
    for process in there:
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
    return found


async def killed(args: argparse.Namespace) -> dict[str, Any]:
    """A replica is killed again and again while 32 streams run; texts are those of the undisturbed server."""
    asks = mixture(32, streams=32, seed=1, max_tokens=400)
    rounds, different, lost, pauses = 0, 0, 0, list[float]()
    async with replicas(2) as server:
        wanted = await asyncio.gather(*(ask(server.url, request) for request in asks))
        for number in range(args.kills):
            running = asyncio.gather(*(ask(server.url, request) for request in asks))
            await asyncio.sleep(1.0 + 0.2 * (number % 5))
            victims = actors(server)
            victims[number % len(victims)].kill()
            began = time.monotonic()
            answers = await running
            rounds += 1
            lost += failed(answers)
            different += sum(difference(a, b) is not None for a, b in zip(wanted, answers, strict=True))
            while len(actors(server)) < 2:
                await asyncio.sleep(0.2)
            pauses.append(round(time.monotonic() - began, 1))
        resumed = await server.metric("requests_resumed_total")
    return {
        "kills": rounds,
        "streams": 32 * rounds,
        "lost": lost,
        "different": different,
        "resumed": resumed,
        "seconds_until_two_again": pauses,
    }


async def prefixes(args: argparse.Namespace) -> dict[str, Any]:
    """Chats with eight system prompts of some 1,700 tokens: what the prefix caches find, and who gets how much."""
    chance = random.Random(5)
    systems = [" ".join(sentence(chance) for _ in range(170)) for _ in range(8)]
    found: dict[str, Any] = {}
    for count in (1, 2):
        async with replicas(count) as server:
            length = await num_tokens(server.url, systems[0])

            def chat(chance: random.Random) -> Ask:
                messages = [
                    {"role": "system", "content": chance.choice(systems)},
                    {"role": "user", "content": sentence(chance)},
                ]
                return Ask("/v1/chat/completions", {"messages": messages, "max_tokens": 32, "temperature": 0.0})

            answers = await users(server.url, 12, args.seconds, chat)
            await asyncio.sleep(3.0)
            hits, queries = [await server.metric(f"prefix_cache_{name}_total") for name in ("hits", "queries")]
            tokens = await by_engine(server.url, "engine_prompt_tokens_total")
        found[str(count)] = {
            "requests": len(answers),
            "failed": failed(answers),
            "hits": round(hits / queries, 3),
            "system_tokens": length,
            "prompt_tokens_by_engine": list(tokens.values()),
        }
    of_two = found["2"]["prompt_tokens_by_engine"]
    found["hits_ratio"] = round(found["2"]["hits"] / found["1"]["hits"], 3)
    found["imbalance"] = round(max(of_two) / (sum(of_two) / len(of_two)), 3) if of_two else None
    return found


async def num_tokens(url: str, text: str) -> int:
    """How many tokens a text has."""
    _, body = parse(await exchange(url, "POST", "/tokenize", {"prompt": text}))
    return int(json.loads(body)["count"])


@contextlib.asynccontextmanager
async def cluster() -> AsyncGenerator[None, None]:
    """A Ray cluster of one machine, with Serve's HTTP on PORT."""
    ray, env = str(Path(sys.executable).parent / "ray"), os.environ | {"RAY_worker_niceness": "0"}
    start = [ray, "start", "--head", "--num-cpus", "8", "--include-dashboard", "false", "--disable-usage-stats"]
    await asyncio.to_thread(subprocess.run, start, check=True, env=env, capture_output=True)
    try:
        serve = [str(Path(sys.executable).parent / "serve"), "start", "--http-port", str(PORT)]
        await asyncio.to_thread(subprocess.run, serve, check=True, capture_output=True, env=env)
        yield
    finally:
        await asyncio.to_thread(subprocess.run, [ray, "stop", "--force"], check=True, capture_output=True)


async def deploy(*options: str) -> None:
    """`manyheads deploy`, to its end."""
    command = [sys.executable, "-m", "manyheads", "deploy", str(BUILTIN), "--device", "cpu", "--num-threads", "1"]
    done = await asyncio.to_thread(subprocess.run, [*command, *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


async def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """From one replica to two, back to one, and another version of the settings, while eight users ask."""
    url = f"http://127.0.0.1:{PORT}"
    steps = {"up": ("--replicas", "2"), "down": ("--replicas", "1"), "upgrade": ("--replicas", "1", "--tree-size", "8")}
    found: dict[str, Any] = {}
    async with cluster():
        await deploy("--replicas", "1")
        for name, options in steps.items():
            change = asyncio.create_task(deploy(*options))
            answers: list[Answer] = []
            while not change.done():
                answers += await users(url, 8, 5.0, lambda chance: completion(sentence(chance), 48, stream=True))
            answers += await users(url, 8, 10.0, lambda chance: completion(sentence(chance), 48, stream=True))
            await change
            found[name] = {"requests": len(answers), "failed": failed(answers)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--model", type=Path, default=BUILTIN, help="of the part `speed`")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "replicas.json")
    args = parser.parse_args()
    parts: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]]
    parts = {"speed": speed, "killed": killed, "prefixes": prefixes, "scaling": scaling}
    for name in args.only or PARTS:
        where = machine()
        result = asyncio.run(parts[name](args))
        print(name, json.dumps(result))
        part = name if args.model == BUILTIN else f"{name} {args.model.stem}"
        save(args.out, part, {"machine": where, **result})


if __name__ == "__main__":
    main()
