"""Mixed traffic over HTTP against any OpenAI server, from several processes: how long clients wait at each rate.

    python benchmarks/traffic.py OUT.json NAME --url URL --tokenizer MODEL/tokenizer.json --rates 5,15,30,45
    python benchmarks/traffic.py OUT.json --table          # of all systems in the file, as Markdown

What `manyheads bench mix` draws (Poisson arrivals, lognormal prompts and answers; prompts cut from Spec-Bench) without
its packages, for machines that have none of them. Prompts are sent as token ids, answers run to their length, and a
request counts as good within both limits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import statistics
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, percentile, save, table

PROMPTS, ANSWERS = (250, 0.9, 16, 1400), (150, 0.8, 8, 600)
"""Median, the standard deviation of the logarithm, least and most, in tokens."""
FIRST_SECONDS, TOKEN_SECONDS = 0.5, 0.02
"""The limits: of the first token, and of each of the others on average."""
WORKERS = 6
"""Processes of clients."""
LEAD_SECONDS = 1.5
"""They have so long to start."""


@dataclass(frozen=True)
class Ask:
    """A request that is to be sent."""

    at: float
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """How a request went, in seconds since it was sent."""

    at: float
    first: float | None
    last: float
    tokens: int
    error: str | None

    @property
    def token_seconds(self) -> float:
        """Of each token behind the first."""
        return (self.last - (self.first or 0.0)) / max(1, self.tokens - 1)

    @property
    def is_good(self) -> bool:
        """Whether it was answered within both limits."""
        in_time = self.first is not None and self.first < FIRST_SECONDS
        return self.error is None and in_time and self.token_seconds < TOKEN_SECONDS


def draw(rate: float, seconds: float, seed: int, texts: list[list[int]]) -> list[Ask]:
    """The requests of so many seconds; the same for every server."""
    chance, at, asks = random.Random(f"{seed} {rate:g}"), 0.0, []
    while (at := at + chance.expovariate(rate)) < seconds:
        num_prompt, num_answer = (length(chance, *of) for of in (PROMPTS, ANSWERS))
        prompt: list[int] = []
        while len(prompt) < num_prompt:
            prompt += chance.choice(texts)
        asks.append(Ask(at, prompt[:num_prompt], num_answer))
    return asks


def length(chance: random.Random, median: int, sigma: float, least: int, most: int) -> int:
    """A random number of tokens."""
    return int(min(most, max(least, chance.lognormvariate(math.log(median), sigma))))


async def answer(url: str, model: str, ask: Ask, start: float) -> Answer:
    """Send a request when its time has come, and read its stream to the end."""
    await asyncio.sleep(max(0.0, start + ask.at - time.time()))
    body: dict[str, Any] = {"model": model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    data, where = json.dumps(body).encode(), urllib.parse.urlparse(url)
    head = f"Host: {where.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(data)}"
    sent, first, tokens = time.time(), None, 0
    last = sent
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 22)
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data)
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            return Answer(ask.at, None, time.time() - sent, 0, status.strip())
        async for line in reader:
            if line.startswith(b"data: {"):
                last = time.time()
                first = first or last
                if b'"completion_tokens"' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        writer.close()
    except (OSError, ValueError) as error:
        return Answer(ask.at, None, time.time() - sent, 0, f"{type(error).__name__}: {error}")
    whole = None if tokens == ask.max_tokens else f"{tokens} tokens of {ask.max_tokens}"
    return Answer(ask.at, first - sent if first else None, last - sent, tokens, whole)


def work(url: str, model: str, asks: list[Ask], start: float) -> list[Answer]:
    """What one process of clients does."""

    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(answer(url, model, ask, start) for ask in asks))

    return asyncio.run(all_of_them())


def measure(url: str, model: str, rate: float, seconds: float, seed: int, texts: list[list[int]]) -> dict[str, Any]:
    """The figures of a rate in requests/s."""
    asks, start = draw(rate, seconds, seed, texts), time.time() + LEAD_SECONDS
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        parts = pool.starmap(work, [(url, model, asks[i::WORKERS], start) for i in range(WORKERS)])
    answers = [answer for part in parts for answer in part]
    done = [answer for answer in answers if answer.error is None]
    took = max(answer.at + answer.last for answer in answers)
    found: dict[str, Any] = {"rate": rate, "seed": seed, "sent": len(answers), "completed": len(done)}
    found["errors"] = sorted({answer.error for answer in answers if answer.error})[:3]
    found["good"] = round(sum(answer.is_good for answer in answers) / len(answers), 4)
    found["tokens_per_s"] = round(sum(answer.tokens for answer in done) / took)
    for name, values in (
        ("first_s", [answer.first or 0.0 for answer in done]),
        ("token_ms", [answer.token_seconds * 1e3 for answer in done if answer.tokens > 1]),
        ("whole_s", [answer.last for answer in done]),
    ):
        for share in (50, 99):
            found[f"{name}_p{share}"] = round(percentile(values, share) or math.nan, 4)
    return found | {"seconds": round(took, 1)}


def texts_of(prompts: Path, tokenizer: Path) -> list[list[int]]:
    """Tokens that prompts are cut from: lines with `turns`, by a tokenizer.json."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    return [encode(" ".join(json.loads(line)["turns"])).ids for line in prompts.read_text().splitlines()]


def model_of(url: str) -> str:
    """The first model that a server has."""
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        return str(json.load(reply)["data"][0]["id"])


def show(file: Path) -> None:
    """A table of all systems in a file of results, the median over seeds."""
    rows = []
    for name, part in json.loads(file.read_text()).items():
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in part["rows"]:
            by_rate.setdefault(row["rate"], []).append(row)
        for rate, same in by_rate.items():

            def middle(key: str, same: list[dict[str, Any]] = same) -> float:
                return float(statistics.median(row[key] for row in same))

            first = f"{middle('first_s_p50'):.3f} / {middle('first_s_p99'):.3f}"
            token = f"{middle('token_ms_p50'):.1f} / {middle('token_ms_p99'):.1f}"
            rows.append([name, f"{rate:g}", first, token, f"{middle('good'):.2f}", f"{middle('tokens_per_s'):,.0f}"])
    table(["system", "requests/s", "first token p50 / p99, s", "token p50 / p99, ms", "good", "tokens/s"], rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is sent, and for how long."""
    parser.add_argument("--prompts", type=Path, default=Path("spec_bench.jsonl"), help="lines with `turns`")
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")], default=[5.0, 15.0])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--hold", type=float, default=20.0, help="seconds of arrivals at each rate")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("name", nargs="?", help="of the system, in the results")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer.json")
    add_options(parser)
    parser.add_argument("--table", action="store_true", help="show what the file has, and measure nothing")
    args = parser.parse_args()
    if args.table:
        show(args.out)
        return
    if args.name is None or args.tokenizer is None:
        parser.error("NAME and --tokenizer are needed")
    texts, model = texts_of(args.prompts, args.tokenizer), model_of(args.url)
    import torch  # NOTE: not in the processes of clients, which have to start soon

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for rate in args.rates:
            rows.append(measure(args.url, model, rate, args.hold, seed, texts))
            print(json.dumps(rows[-1]), flush=True)
            save(args.out, args.name, {"machine": machine() | {"gpu": gpu}, "rows": rows})


if __name__ == "__main__":
    main()
