"""Mixed traffic over HTTP against any OpenAI server, from several processes: how long clients wait at each rate.

    python benchmarks/traffic.py OUT.json NAME --url URL --tokenizer MODEL/tokenizer.json --rates 5,15,30,45
    python benchmarks/traffic.py OUT.json --table          # of all systems in the file, as Markdown
    python benchmarks/traffic.py OUT.json --plot FILE.svg  # or .png; needs matplotlib

What `manyheads bench mix` draws (Poisson arrivals, lognormal prompts and answers; prompts cut from Spec-Bench) without
its packages, for machines that have none of them. Prompts are sent as token ids, answers run to their length, and a
request counts as good within both limits. A stall is seen where a client reads: the longest time to a first token, and
the longest gap between two events of a stream, with the seconds from the start of the rate to that of the wait.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import random
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, percentile, save, table

PROMPTS, ANSWERS = (250, 0.9, 16, 1400), (150, 0.8, 8, 600)
"""Median, the standard deviation of the logarithm, least and most, in tokens."""
FIRST_SECONDS, TOKEN_SECONDS = 0.5, 0.02
"""The limits: of the first token, and of each of the others on average."""
GOOD = 0.95
"""A rate holds if this share of its requests is within both."""
WORKERS = 6
"""Processes of clients."""
LEAD_SECONDS = 1.5
"""They have so long to start."""
INK, PAPER = "#1f2328", "#ffffff"
"""Of a picture; where pages are dark, an SVG has others:"""
DARK = (
    "@media (prefers-color-scheme: dark) {"
    + "".join(
        f' [style*="{name}: {light}"] {{ {name}: {dark} !important }}'
        for name in ("fill", "stroke")
        for light, dark in ((INK, "#e6edf3"), (PAPER, "#0d1117"))
    )
    + " }"
)


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
    gap: float = 0.0
    """The longest time between two events,"""
    gap_at: float = 0.0
    """which began so long after the first request could be sent."""

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
    sent, first, tokens, gap, gap_at = time.time(), None, 0, 0.0, 0.0
    last = sent
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 22)
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data)
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            return Answer(ask.at, None, time.time() - sent, 0, status.strip())
        async for line in reader:
            if line.startswith(b"data: {"):
                before, last = last, time.time()
                if first is None:
                    first = last
                elif last - before > gap:
                    gap, gap_at = last - before, before - start
                if b'"completion_tokens"' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        writer.close()
    except (OSError, ValueError) as error:
        return Answer(ask.at, None, time.time() - sent, 0, f"{type(error).__name__}: {error}")
    whole = None if tokens == ask.max_tokens else f"{tokens} tokens of {ask.max_tokens}"
    return Answer(ask.at, first - sent if first else None, last - sent, tokens, whole, gap, gap_at)


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
    return figures([answer for part in parts for answer in part], rate, seed)


def figures(answers: list[Answer], rate: float, seed: int) -> dict[str, Any]:
    """What is told of a rate."""
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
    waited = max(done, key=lambda answer: answer.first or 0.0, default=None)
    stalled = max(done, key=lambda answer: answer.gap, default=None)
    if waited is not None and stalled is not None:
        found |= {"first_s_max": round(waited.first or 0.0, 4), "first_max_at_s": round(waited.at, 2)}
        found |= {"gap_s_max": round(stalled.gap, 4), "gap_max_at_s": round(stalled.gap_at, 2)}
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


def by_rate(part: dict[str, Any]) -> dict[float, list[dict[str, Any]]]:
    """What was measured of a system at each rate, once for each seed."""
    found: dict[float, list[dict[str, Any]]] = {}
    for row in sorted(part["rows"], key=lambda row: float(row["rate"])):
        found.setdefault(row["rate"], []).append(row)
    return found


def highest(part: dict[str, Any]) -> list[float]:
    """For each seed the highest rate that holds, as all lower ones do; 0 where none does."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(part["rows"], key=lambda row: float(row["rate"])):
        found.setdefault(row["seed"], []).append(row)
    holds = [itertools.takewhile(lambda row: row["good"] >= GOOD, rows) for rows in found.values()]
    return [max((float(row["rate"]) for row in rows), default=0.0) for rows in holds]


def over_seeds(values: Sequence[float | None], form: str) -> str:
    """The median, and of several seeds the extremes; nothing where it was not measured."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, least, most = (format(of(known), form) for of in (statistics.median, min, max))
    return middle if len(known) == 1 else f"{middle} ({least}–{most})"


def show(file: Path) -> None:
    """Tables of all systems in a file of results: the median over seeds, and the extremes."""
    rows, rates = [], []
    for name, part in json.loads(file.read_text()).items():
        for rate, same in by_rate(part).items():
            cells = [
                " / ".join(over_seeds([row.get(key) for row in same], form) for key in keys)
                for keys, form in (
                    (("first_s_p50", "first_s_p99"), ".3f"),
                    (("first_s_max",), ".3f"),
                    (("token_ms_p50", "token_ms_p99"), ".1f"),
                    (("gap_s_max",), ".3f"),
                    (("good",), ".2f"),
                    (("tokens_per_s",), ",.0f"),
                )
            ]
            rows.append([name, f"{rate:g}", *cells])
        rates.append([name, over_seeds(highest(part), "g"), str(len(highest(part)))])
    head = ["first token p50 / p99, s", "longest", "token p50 / p99, ms", "longest gap, s", "good", "tokens/s"]
    table(["system", "requests/s", *head], rows)
    table(["system", f"highest requests/s with {GOOD:.0%} within both limits", "seeds"], rates)


def plot(file: Path, picture: Path) -> None:
    """Draw the share of good requests and tokens/s by rate, of all systems in a file of results."""
    import matplotlib  # NOTE: here, since machines that measure may lack it

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": file.stem, "font.family": "sans-serif", "axes.grid": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.alpha": 0.25}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style | {"figure.facecolor": PAPER, "axes.facecolor": "none"}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        shares, tokens = figure.subplots(1, 2)
        for i, (name, part) in enumerate(json.loads(file.read_text()).items()):
            rates = by_rate(part)
            look: dict[str, Any] = {"color": f"C{i}", "marker": "os^Dv"[i % 5], "markersize": 4, "label": name}
            look["linestyle"] = "--" if name.lower().startswith("vllm") else "-"
            for axes, key, scale in ((shares, "good", 100), (tokens, "tokens_per_s", 1)):
                values = [[scale * row[key] for row in same] for same in rates.values()]
                axes.plot(list(rates), [statistics.median(same) for same in values], **look)
                axes.fill_between(list(rates), [*map(min, values)], [*map(max, values)], color=f"C{i}", alpha=0.2, lw=0)
        shares.axhline(100 * GOOD, color="#888888", ls=":", lw=1)
        limits = f"first token within {FIRST_SECONDS:g} s, {TOKEN_SECONDS * 1e3:g} ms a token"
        shares.set_title(f"% of requests within both limits\n({limits})", fontsize=10)
        shares.set_ylim(0, 104)
        tokens.set_title("tokens/s", fontsize=10)
        tokens.set_ylim(bottom=0)
        tokens.yaxis.set_major_formatter("{x:,.0f}")
        for axes in (shares, tokens):
            axes.set_xlabel("requests/s")
        figure.legend(*shares.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        figure.savefig(picture, dpi=150, metadata={"Date": None} if picture.suffix == ".svg" else None)
    if picture.suffix == ".svg":
        head, body = picture.read_text().split("</metadata>", 1)
        picture.write_text(f"{head}</metadata>\n <style>{DARK}</style>{body}")


def rates_of(text: str) -> list[float]:
    """Requests/s, with commas between them."""
    return [float(rate) for rate in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is sent, and for how long."""
    parser.add_argument("--prompts", type=Path, default=Path("spec_bench.jsonl"), help="lines with `turns`")
    parser.add_argument("--rates", type=rates_of, default=[5.0, 15.0])
    parser.add_argument("--once", type=rates_of, default=[], help="more rates, for the first seed alone")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--hold", type=float, default=20.0, help="seconds of arrivals at each rate")


def points(args: argparse.Namespace) -> list[tuple[int, float]]:
    """Seeds and rates, in the order of their measurement."""
    first, *others = args.seeds
    return [(first, rate) for rate in sorted(args.once + args.rates)] + [
        (seed, rate) for seed in others for rate in args.rates
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("name", nargs="?", help="of the system, in the results")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer.json")
    add_options(parser)
    parser.add_argument("--table", action="store_true", help="show what the file has, and measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .svg or .png")
    args = parser.parse_args()
    if args.table or args.plot:
        if args.table:
            show(args.out)
        if args.plot:
            plot(args.out, args.plot)
        return
    if args.name is None or args.tokenizer is None:
        parser.error("NAME and --tokenizer are needed")
    texts, model = texts_of(args.prompts, args.tokenizer), model_of(args.url)
    import torch  # NOTE: not in the processes of clients, which have to start soon

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows: list[dict[str, Any]] = []
    for seed, rate in points(args):
        rows.append(measure(args.url, model, rate, args.hold, seed, texts))
        print(json.dumps(rows[-1]), flush=True)
        save(args.out, args.name, {"machine": machine() | {"gpu": gpu}, "rows": rows})


if __name__ == "__main__":
    main()
