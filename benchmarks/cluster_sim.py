"""Many replicas, simulated: what routing, autoscaling and failures do to goodput, tail latency and cost.

    python benchmarks/cluster_sim.py calibrate --url http://127.0.0.1:8000 -o costs.json    # a server that runs
    python benchmarks/cluster_sim.py validate             # 4 real replicas on this machine against the simulation
    python benchmarks/cluster_sim.py compare              # routings, scaling, failures; writes results/cluster_sim.json

`compare` takes the costs of an H200 with a 7B model (`results/cluster/h200_7b.json`) unless --costs names others. The
parts are in `cluster/`; what they leave out is told in docs/scale.md.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import time
from pathlib import Path
from typing import Any

from cluster.calibrate import Calibration
from cluster.cluster import Cluster, Plan
from cluster.costs import StepCosts
from cluster.experiments import EXPERIMENTS
from cluster.real import Text, drive, replicas
from cluster.report import latency
from cluster.traffic import Request, Traffic, read_lengths
from common import BUILTIN, ROOT, SPEC_BENCH, Others, machine, save, table

RESULTS = ROOT / "benchmarks" / "results"
PACE = "0.2,0.006,0.003"
"""Of the paced replicas: what a step takes at least, for each row, and for each prompt token, in seconds."""
ROWS, PROMPTS = (1, 2, 4, 8, 16), (32, 96, 160, 256)
MAX_ROWS, MAX_PROMPT_TOKENS = 16, 256
LONGEST = (200, 150)
"""Prompts and answers are cut to so many tokens for real replicas, which share a small machine."""
PERCENTILES = [f"{name}_p{p}_s" for name in ("ttft", "tpot", "whole") for p in (50, 95, 99)]
COMPARED = ["requests_per_s", "output_tokens_per_s", "tokens_per_step", *PERCENTILES]


def calibrate(args: argparse.Namespace) -> None:
    """Measure a server that runs."""
    text = Text(args.model, args.text)
    costs = asyncio.run(
        Calibration(args.url, text, args.max_rows, args.max_prompt_tokens).run(ROWS, PROMPTS, args.rounds)
    )
    costs.save(args.out, {"machine": machine(), "server": args.url})
    print(args.out.read_text())


def validate(args: argparse.Namespace) -> None:
    """Run the same requests through real replicas and through the simulation."""
    text, others = Text(args.model, args.text), Others()
    options = [f"--max-num-seqs={MAX_ROWS}", f"--max-num-batched-tokens={MAX_PROMPT_TOKENS}", "--max-wait=300"]
    result: dict[str, Any] = {"machine": machine(), "pace": args.pace, "replicas": args.replicas, "runs": []}
    with replicas(args.replicas, args.model, args.pace, options) as urls:
        costs = StepCosts.mean(asyncio.run(_calibrate_all(urls, text, args.rounds)))
        result["costs"] = {"decode": costs.decode, "prefill": costs.prefill, "gain": costs.gain, "once": costs.once}
        result["costs"] |= {"spread": costs.spread, "overhead": costs.overhead}
        print(result["costs"], flush=True)
        for i, (routing, share) in enumerate((routing, share) for routing in args.routings for share in args.shares):
            meanwhile = Others()
            run = _both(costs, urls, text, routing, share, args, i)
            result["runs"].append(run | {"other_work": round(meanwhile.share(), 3)})
            rows = [[key, run["real"][key], run["simulated"][key], run["ratio"][key]] for key in COMPARED]
            table([f"{routing}, {run['rate']:.2g}/s", "real", "simulated", "simulated / real"], rows)
    save(args.out, args.part, result | {"other_work": round(others.share(), 3)})


async def _calibrate_all(urls: list[str], text: Text, rounds: int) -> list[StepCosts]:
    """Measure all replicas at once, for they share the machine."""
    each = [Calibration(url, text, MAX_ROWS, MAX_PROMPT_TOKENS, i) for i, url in enumerate(urls)]
    return await asyncio.gather(*(one.run(ROWS, PROMPTS, rounds) for one in each))


def _both(
    costs: StepCosts, urls: list[str], text: Text, routing: str, share: float, args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Drive the replicas at a share of their capacity, then simulate the same; returns the figures of both."""
    lengths = tuple((min(pair[0], LONGEST[0]), min(pair[1], LONGEST[1])) for pair in read_lengths())
    prompt, output = (sum(pair[i] for pair in lengths) / len(lengths) for i in (0, 1))
    rate = share * len(urls) * costs.capacity(prompt, output)
    traffic = Traffic(
        rate=rate, seconds=args.hold, systems=8, system_tokens=args.system_tokens, lengths=lengths, spread=costs.spread
    )
    requests = traffic.draw(seed)
    simulated = copy.deepcopy(requests)
    steps = sum(drive(urls, requests, text, routing, seed))
    outcome = Cluster(costs, Plan(replicas=len(urls), routing=routing, seed=seed), simulated).run()
    found = {name: _figures(those, args.settle) for name, those in (("real", requests), ("simulated", simulated))}
    gained = sum(request.output - 1 for request in requests)
    found["real"]["tokens_per_step"] = round(gained / (steps - len(requests)), 3)
    found["simulated"]["tokens_per_step"] = round(gained / outcome.row_steps, 3)
    ratio = {key: round(found["simulated"][key] / found["real"][key], 3) for key in COMPARED}
    return {
        "routing": routing,
        "share": share,
        "rate": round(rate, 3),
        "requests": len(requests),
        **found,
        "ratio": ratio,
    }


def _figures(requests: list[Request], settle: float) -> dict[str, Any]:
    """Figures of those that came after the first seconds, by the time until the last one ended."""
    counted = [request for request in requests if request.at >= settle]
    return latency(counted, max(request.last for request in counted) - settle, ttft=1.0, tpot=0.1)


def compare(args: argparse.Namespace) -> None:
    """Simulate the experiments and write their figures."""
    costs = StepCosts.load(args.costs)
    for name in args.only or EXPERIMENTS:
        began = time.perf_counter()
        header, rows = EXPERIMENTS[name](costs, args.price)
        table(header, rows)
        records = [dict(zip(header, row, strict=True)) for row in rows]
        took = round(time.perf_counter() - began, 1)
        origin = {"machine": machine(), "costs": args.costs.name, "price_per_hour": args.price, "seconds": took}
        save(args.out, name, origin | {"rows": records})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--model", type=Path, default=BUILTIN)
    measured.add_argument("--text", type=Path, default=SPEC_BENCH, help="lines with `turns`, of which prompts are cut")
    measured.add_argument("--rounds", type=int, default=2)
    one = commands.add_parser("calibrate", parents=[measured], help=calibrate.__doc__)
    one.add_argument("--url", required=True)
    one.add_argument("--max-rows", type=int, required=True, help="the server's --max-num-seqs")
    one.add_argument("--max-prompt-tokens", type=int, default=2048, help="the server's --max-num-batched-tokens")
    one.add_argument("-o", "--out", type=Path, required=True)
    one.set_defaults(run=calibrate)
    two = commands.add_parser("validate", parents=[measured], help=validate.__doc__)
    two.add_argument("--replicas", type=int, default=4)
    two.add_argument("--pace", default=PACE, help="seconds of a step: base,row,token; empty for the machine's own")
    two.add_argument("--routings", nargs="+", default=["two choices", "prefix unless busy"])
    two.add_argument("--shares", nargs="+", type=float, default=[0.4, 0.7], help="of the capacity")
    two.add_argument("--hold", type=float, default=120.0, help="seconds of each run")
    two.add_argument("--settle", type=float, default=10.0, help="seconds that do not count")
    two.add_argument("--system-tokens", type=int, default=96)
    two.add_argument("--part", default="validation")
    two.add_argument("--out", type=Path, default=RESULTS / "cluster_sim.json")
    two.set_defaults(run=validate)
    three = commands.add_parser("compare", help=compare.__doc__)
    three.add_argument("--costs", type=Path, default=RESULTS / "cluster" / "h200_7b.json")
    three.add_argument("--price", type=float, default=4.0, help="of a replica for an hour")
    three.add_argument("--only", nargs="+", choices=EXPERIMENTS)
    three.add_argument("--out", type=Path, default=RESULTS / "cluster_sim.json")
    three.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
