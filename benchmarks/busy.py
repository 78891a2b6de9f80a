"""How the server does on a machine whose processors others use too.

One client asks servers in turns: one started while nobody else computed, one started beside six busy processes, and
some with a fixed tree or a fixed number of threads. Six processes stay, go, or come later; then two stay. Given are
tokens a second, and after how many steps trees were drafted.

    python benchmarks/busy.py            # writes results/busy.json; --short takes three minutes
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, get_json, machine, save, server, table

PORT = 8031
BUSY = "while True: pass"
SETTLED = 200
"""Steps after which a server must have found its way."""
PROMPTS = (
    "Write a short story about a dog and a boat.",
    "What is the capital of France, and why do people visit it?",
    "Explain how rain is made.",
    "Give me three tips for a good night's sleep.",
    "Describe a walk through a forest in autumn.",
)
KINDS = {"default": [], "tree of 8": ["--tree-size", "8"], "1 thread": ["--num-threads", "1"]}
KINDS |= {"2 threads": ["--num-threads", "2"], "plain": ["--no-speculative"]}


class Server:
    """A running server, and what it has done."""

    def __init__(self, stack: contextlib.ExitStack, kind: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "manyheads", "serve", "--host", "127.0.0.1", "--port", str(port), *KINDS[kind]]
        began = time.perf_counter()
        stack.enter_context(server(command, self.url))
        self.start_seconds = round(time.perf_counter() - began, 1)

    def ask(self, turn: int, tokens: int) -> dict[str, float]:
        """One answer: its tokens a second, and the steps and drafted tokens of it."""
        before = self.counters()
        body = {
            "model": "builtin",
            "messages": [{"role": "user", "content": PROMPTS[turn % len(PROMPTS)]}],
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        began = time.perf_counter()
        reply = get_json(f"{self.url}/v1/chat/completions", body, timeout=300)
        seconds = time.perf_counter() - began
        time.sleep(0.3)  # counters are told that often
        after = self.counters()
        done = {name: after[name] - before[name] for name in after}
        return {"tokens_per_s": round(reply["usage"]["completion_tokens"] / seconds, 1), **done}

    def counters(self) -> dict[str, float]:
        """Steps and drafted tokens, ever."""
        lines = [line for line in get_json(f"{self.url}/metrics").splitlines() if not line.startswith("#")]
        values = {line.split("{")[0].split()[0]: line.split()[-1] for line in lines}
        names = {"steps": "engine_steps", "drafted": "spec_decode_num_draft_tokens"}
        return {key: float(values[f"manyheads_{name}_total"]) for key, name in names.items()}

    def settle(self, tokens: int) -> float:
        """Let `SETTLED` steps pass; returns after how many the first tree was drafted, or infinity."""
        steps, turn, first = 0.0, 0, float("inf")
        while steps < SETTLED:
            done = self.ask(turn, tokens)
            steps, turn = steps + done["steps"], turn + 1
            if done["drafted"]:
                first = min(first, steps)
        return first


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes compute while the block lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_turns(servers: dict[str, Server], rounds: int, tokens: int) -> dict[str, Any]:
    """Ask all servers by turns, after those that choose by themselves have settled."""
    first = {name: one.settle(tokens) for name, one in servers.items() if name not in KINDS or not KINDS[name]}
    done: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for turn in range(rounds):
        for name, one in list(servers.items())[:: 1 if turn % 2 else -1]:
            done[name].append(one.ask(turn, tokens if name != "2 threads" else tokens // 3))
    result: dict[str, Any] = {}
    for name, answers in done.items():
        rates = [answer["tokens_per_s"] for answer in answers]
        drafted = sum(answer["drafted"] for answer in answers) / sum(answer["steps"] for answer in answers)
        result[name] = {"tokens_per_s": statistics.median(rates), "rates": rates, "drafted_per_step": round(drafted, 2)}
        if name in first:
            result[name]["first_draft_within"] = first[name] if first[name] < float("inf") else None
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--short", action="store_true", help="three rounds of 60 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "busy.json")
    args = parser.parse_args()
    if args.short:
        args.rounds, args.tokens = 3, 60
    result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "tokens": args.tokens, "start_seconds": {}}
    with contextlib.ExitStack() as stack:
        servers = {kind: Server(stack, kind, PORT + i) for i, kind in enumerate(KINDS)}
        six = {name: servers[name] for name in ("default", "tree of 8", "1 thread", "plain")}
        result["start_seconds"]["alone"] = {name: one.start_seconds for name, one in servers.items()}
        result["alone"] = in_turns(six, args.rounds, args.tokens)
        with busy(6):
            six["started beside six"] = Server(stack, "default", PORT + len(KINDS))
            one_thread = Server(stack, "1 thread", PORT + len(KINDS) + 1)
            starts = {"default": six["started beside six"].start_seconds, "1 thread": one_thread.start_seconds}
            result["start_seconds"]["beside six"] = starts
            result["beside six"] = in_turns(six, args.rounds, args.tokens)
        result["six are gone"] = in_turns(six, args.rounds, args.tokens)
        with busy(2):
            two = {name: servers[name] for name in ("default", "1 thread", "2 threads")}
            result["beside two"] = in_turns(two, args.rounds, args.tokens)
    rows = []
    for case in ("alone", "beside six", "six are gone", "beside two"):
        for name, found in result[case].items():
            share = found["tokens_per_s"] / max(other["tokens_per_s"] for other in result[case].values())
            drafts = found.get("first_draft_within"), found["drafted_per_step"]
            rows.append([case, name, found["tokens_per_s"], share, *drafts])
    table(["machine", "server", "tokens/s", "of the best", "first draft within steps", "drafted a step"], rows)
    print("seconds to start:", result["start_seconds"])
    save(args.out, "builtin, short" if args.short else "builtin", result)


if __name__ == "__main__":
    main()
