"""`manyheads bench` against an independent client, guidellm, at one server and two loads; writes bench_guidellm.json.

    python benchmarks/bench_guidellm.py --guidellm /path/to/venv/bin/guidellm [--mock]     # pip install guidellm, 0.8

The clients take turns (ours, theirs, theirs, ours, …), since a shared machine's speed wanders; medians are compared.
Both ask for 128 tokens in and 100 out, wait for a settled load before they count, and have one process for the
requests. The server decodes plainly: with speculation its speed would depend on the clients' different texts. Its
engine has one thread, so that the clients do not slow it in different ways where cores are few. `--mock` asks a server
with known delays and two tokens a chunk. guidellm calls our TPOT "inter-token latency".
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

from common import BUILTIN, ROOT, machine, table, undisturbed

from manyheads.bench import result
from manyheads.bench.server import started
from tests.bench.mock import Script, running

SETTLE = 3
"""Seconds before a turn counts, and for guidellm as many after it, in which its last answers end."""
FIGURES = ("requests/s", "output tokens/s", "TTFT, mean ms", "TPOT, mean ms", "latency, mean s")


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
            url, _ = stack.enter_context(started("builtin", ["--no-speculative", "--num-threads", "1"]))
        for users in args.users:
            others: list[float] = []
            turns: dict[str, list[list[float]]] = {"manyheads": [], "guidellm": []}
            for i in range(args.rounds):
                pair = [("manyheads", ours), ("guidellm", theirs)]
                for name, client in pair if i % 2 == 0 else pair[::-1]:
                    figures, share = undisturbed(functools.partial(client, url, users, args), args.tries)
                    turns[name].append(figures)
                    others.append(share)
                    print(users, name, [round(value, 3) for value in figures], flush=True)
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
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
