"""Mixed traffic below, at and above what a server can do: `manyheads bench mix` at 0.5, 1 and 1.5 of its capacity.

    python benchmarks/mix.py                                   # on a CPU; writes results/mix_cpu.json
    python benchmarks/mix.py --hold 5 --seeds 0                # a quick look
    python benchmarks/mix.py --system ours= --system plain=--no-speculative         # several servers, in turns

Capacity is the requests/s that the first server answers when far more are asked, and the rates of all servers are
shares of it. A server that sheds load well still does at 1.5 of its capacity what it does at best. Prompts and answers
are a quarter of the defaults of `mix`, so that enough of them are answered in the time. Client and server share the
machine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import BUILTIN, ROOT, Others, machine, save, table

from manyheads.bench.measure import measure
from manyheads.bench.progress import Progress
from manyheads.bench.result import Level
from manyheads.bench.server import started
from manyheads.cli import make_parser
from manyheads.cli.bench import bench_options

SHARES = (0.5, 1.0, 1.5)
"""These shares of the capacity are asked for."""
FLOOD = 64.0
"""So many requests/s are asked for first; twice as many if the server answers them."""
FIGURES = ("goodput", "attained", "requests_per_s", "output_tokens_per_s", "tokens_per_step", "sent", "completed")


def levels(url: str, rates: list[float], seed: int, args: argparse.Namespace, *more: str) -> list[Level]:
    """Hold these rates at a server that runs, and return their figures."""
    argv = [
        "mix",
        "--url",
        url,
        "--rates",
        ",".join(f"{rate:.3g}" for rate in rates),
        "--seed",
        str(seed),
        "--no-limit",
    ]
    argv += ["--prompt-tokens", args.prompt_tokens, "--output-tokens", args.output_tokens, "--hold", f"{args.hold:g}"]
    argv += ["--ttft-ms", f"{args.ttft_ms:g}", "--tpot-ms", f"{args.tpot_ms:g}", *more]
    return measure(bench_options(make_parser().parse_args(["bench", *argv])), Progress())[0].levels


def capacity(url: str, args: argparse.Namespace) -> float:
    """Return the requests/s that are answered when far more are asked, once all rows of the server are taken."""
    asked = FLOOD
    while True:
        (level,) = levels(url, [asked], 1000, args, "--settle", "8", "--drain", "1")
        if level.overloaded:
            return level.requests_per_s
        asked *= 2


def figures(level: Level) -> dict[str, Any]:
    """Return what goes into the results, with times in seconds."""
    found: dict[str, Any] = {name: getattr(level, name) for name in FIGURES}
    for name in ("ttft", "tpot"):
        summary = getattr(level, name)
        found |= {f"{name}_{p}_s": getattr(summary, p) if summary else None for p in ("p50", "p99")}
    found["failures"] = level.failures
    found["generator_bound"] = level.generator.bound
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def summary(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians over rounds, for each share of the capacity, and the last share against the best."""
    found: dict[str, Any] = {}
    for name in ("goodput", "output_tokens_per_s", "requests_per_s"):
        medians = [statistics.median(row[i][name] for row in rounds) for i in range(len(SHARES))]
        found[name] = [round(median, 3) for median in medians]
        found[f"{name}_of_peak"] = round(medians[-1] / max(medians), 3) if max(medians) else None
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    text = "a server: its name, and its options of `manyheads serve`; may be given several times"
    parser.add_argument("--system", action="append", metavar="NAME=OPTIONS", help=text)
    parser.add_argument("--capacity", type=float, help="requests/s (default: it is measured)")
    parser.add_argument("--prompt-tokens", default="lognormal:62,0.9,4,350")
    parser.add_argument("--output-tokens", default="lognormal:37,0.8,2,150")
    parser.add_argument("--ttft-ms", type=float, default=500.0)
    parser.add_argument("--tpot-ms", type=float, default=20.0)
    parser.add_argument("--hold", type=float, default=30.0, help="seconds of each rate")
    parser.add_argument("--seeds", default="0,1,2", help="of the rounds")
    parser.add_argument("--part", default="now", help="name of this run in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mix_cpu.json")
    args = parser.parse_args()
    parts = [text.partition("=") for text in args.system or ["manyheads="]]
    systems = {name: options for name, _, options in parts}
    settings = vars(args) | {"model": args.model.name, "out": args.out.name, "system": systems, "shares": SHARES}
    result: dict[str, Any] = {"machine": machine(), "settings": settings}
    most: float | None = args.capacity
    rounds: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in systems}
    others = Others()
    for seed in map(int, args.seeds.split(",")):
        for name, options in systems.items():
            with started(str(args.model), options.split()) as (url, _):
                most = most or capacity(url, args)
                rates = [share * most for share in SHARES]
                rounds[name].append([figures(level) for level in levels(url, rates, seed, args)])
    result["capacity_requests_per_s"] = round(most or 0.0, 3)
    result["other_work"] = round(others.share(), 4)
    result["systems"] = {name: summary(found) | {"rounds": found} for name, found in rounds.items()}
    for name, found in result["systems"].items():
        rows = [[key, *found[key], found[f"{key}_of_peak"]] for key in FIGURES if f"{key}_of_peak" in found]
        table([name, *(f"{share:g} of capacity" for share in SHARES), "last of peak"], rows)
    save(args.out, args.part, result)


if __name__ == "__main__":
    main()
