"""`manyheads bench` against an independent client, guidellm, at one server and two loads; writes bench_guidellm.json.

    python benchmarks/bench_guidellm.py --guidellm /path/to/venv/bin/guidellm [--mock]     # pip install guidellm, 0.8

The clients take turns (ours, theirs, theirs, ours, …), since a shared machine's speed wanders; medians are compared.
Both ask for 128 tokens in and 100 out, wait for a settled load before they count, and have one process for the
requests. The server decodes plainly and without a prefix cache: its speed would depend on the clients' different texts.
It has the first core to itself, the clients have the others: where cores are few they slow it in different ways.
`--mock` asks a server with known delays and two tokens a chunk. guidellm calls our TPOT "inter-token latency".

The server's own means are taken from its /metrics in each turn, too: how far a client is from them is the client's
doing, how far they are from each other is what the machine and the clients did to the server.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import BUILTIN, ROOT, get_json, machine, table, undisturbed, write_json

from manyheads.bench import result
from manyheads.bench.server import started
from tests.bench.mock import Script, running

SETTLE = 3
"""Seconds before a turn counts, and for guidellm as many after it, in which its last answers end."""
SERVER = tuple(
    f"manyheads_{name}_seconds"
    for name in ("time_to_first_token", "request_time_per_output_token", "e2e_request_latency")
)
FIGURES = ("requests/s", "output tokens/s", "TTFT, mean ms", "TPOT, mean ms", "latency, mean s")


def own(url: str) -> dict[str, float]:
    """Sums and counts of the server's own histograms; none of a mock."""
    with contextlib.suppress(OSError):
        lines = get_json(f"{url}/metrics").splitlines()
        return {name: float(value) for name, value in (line.split(" ") for line in lines if line.startswith(SERVER))}
    return {}


def between(before: dict[str, float], after: dict[str, float]) -> list[float]:
    """The server's own means of a turn: TTFT and TPOT in ms, latency in s; those of settling are among them."""
    means = []
    for name, unit in zip(SERVER, (1e3, 1e3, 1.0), strict=True):
        total, count = (after[name + end] - before.get(name + end, 0.0) for end in ("_sum", "_count"))
        means.append(unit * total / count)
    return means


def ours(url: str, users: int, args: argparse.Namespace) -> list[float]:
    """Our figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "manyheads", "bench", "users", "--users", str(users), "--url", url]
        command += ["--settle", str(SETTLE), "--hold", str(args.seconds), "--no-limit", "-o", folder]
        command += ["--prompt-tokens", "128", "--output-tokens", "100"]
        subprocess.run(command, check=True, capture_output=True)
        level = result.load(Path(folder)).levels[0]
    assert level.ttft
    assert level.tpot
    assert level.e2e
    speed = [level.requests_per_s, level.output_tokens_per_s]
    return [*speed, level.ttft.mean * 1e3, level.tpot.mean * 1e3, level.e2e.mean]


def theirs(url: str, users: int, args: argparse.Namespace) -> list[float]:
    """guidellm's figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [args.guidellm, "run", "--disable-console", "--output", f"kind=json,path={out}"]
        command += ["--backend", f"kind=openai_http,target={url},request_format=/v1/completions"]
        command += ["--profile", f"kind=concurrent,streams={users},warmup={SETTLE},cooldown={SETTLE}"]
        command += ["--constraint", f"kind=max_duration,seconds={args.seconds + 2 * SETTLE}"]
        command += ["--tokenizer", f"kind=hf_auto,model={BUILTIN}"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=128,output_tokens=100"]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        subprocess.run(command, check=True, capture_output=True, env=env, cwd=folder)
        metrics: dict[str, Any] = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    names = ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")
    speed = [metrics[name]["successful"]["mean"] for name in ("requests_per_second", "output_tokens_per_second")]
    return [*speed, *(metrics[name]["successful"]["mean"] for name in names)]


def turn(client: Any, url: str, users: int, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """A client's figures, and the server's own meanwhile."""
    before = own(url)
    figures = client(url, users, args)
    after = own(url)
    return figures, between(before, after) if after else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, help="the command")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each client")
    parser.add_argument("--tries", type=int, default=3, help="of a turn that other work disturbs")
    parser.add_argument("--mock", action="store_true", help="ask a server with known delays instead")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn, after it has settled")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/bench_guidellm.json")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "server": "mock" if args.mock else "builtin", "loads": {}}
    with contextlib.ExitStack() as stack:
        if args.mock:
            url = stack.enter_context(running(Script(ttft=0.2, gap=0.02, chunks=50, tokens_per_chunk=2)))
        else:
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cores)})
            options = ["--no-speculative", "--no-prefix-caching", "--num-threads", "1"]
            url, _ = stack.enter_context(started("builtin", options))
            os.sched_setaffinity(0, cores - {min(cores)})
        for users in args.users:
            others: list[float] = []
            server: dict[str, list[list[float]]] = {"manyheads": [], "guidellm": []}
            turns: dict[str, list[list[float]]] = {"manyheads": [], "guidellm": []}
            for i in range(args.rounds):
                pair = [("manyheads", ours), ("guidellm", theirs)]
                for name, client in pair if i % 2 == 0 else pair[::-1]:
                    (figures, told), share = undisturbed(functools.partial(turn, client, url, users, args), args.tries)
                    turns[name].append(figures)
                    server[name] += [told] if told else []
                    others.append(share)
                    print(users, name, [round(value, 3) for value in figures + told], flush=True)
            middle = {
                name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in turns.items()
            }
            rows = [
                [figure, a, b, 100 * (a / b - 1) if b else None]
                for figure, a, b in zip(FIGURES, middle["manyheads"], middle["guidellm"], strict=True)
            ]
            print(f"{users} users")
            table(["", "manyheads bench", "guidellm", "difference, %"], rows)
            found["loads"][users] = {"figures": FIGURES, "turns": turns, "difference_%": [row[3] for row in rows]}
            found["loads"][users]["other_work"] = others
            if server["manyheads"]:
                rows = []
                for i, figure in enumerate(FIGURES[2:]):
                    row: list[Any] = [figure]
                    for name, of_server in server.items():
                        ratios = [turns[name][k][2 + i] / told[i] for k, told in enumerate(of_server)]
                        row += [statistics.median(told[i] for told in of_server), 100 * (statistics.median(ratios) - 1)]
                    rows.append(row)
                head = [
                    "the server's own",
                    "with manyheads bench",
                    "it is off by, %",
                    "with guidellm",
                    "it is off by, %",
                ]
                table(head, rows)
                found["loads"][users] |= {"server": server, "off_by_%": rows}
    write_json(args.out, found)


if __name__ == "__main__":
    main()
