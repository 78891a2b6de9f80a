"""How exact `manyheads bench` measures: a server with known delays, asked in both loops; writes bench_mock.json.

    python benchmarks/bench_mock.py [--check]

Every case says what the server did by its schedule and what was reported. `--check` fails where they differ by more
than 2 %. Other work on the machine delays the server itself, so that runs on a busy machine say little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT, machine, table, undisturbed, write_json

from manyheads.bench import result
from manyheads.cli import main as manyheads
from tests.bench.mock import Script, running

CASES = {
    "one token a chunk": (["users", "--users", "4"], Script(ttft=0.2, gap=0.02, chunks=50)),
    "four tokens a chunk": (["users", "--users", "4"], Script(ttft=0.2, gap=0.04, chunks=25, tokens_per_chunk=4)),
    "quick server": (["users", "--users", "2"], Script(ttft=0.05, gap=0.01, chunks=100)),
    "16 users, chat": (["users", "--users", "16", "--chat"], Script(ttft=0.2, gap=0.05, chunks=20)),
    "open loop": (["rate", "--rates", "8"], Script(ttft=0.2, gap=0.02, chunks=25, tokens_per_chunk=2)),
    "two workers": (["users", "--users", "4", "--workers", "2"], Script(ttft=0.2, gap=0.02, chunks=50)),
}


def measure(argv: list[str], script: Script, hold: float) -> list[list[Any]]:
    """Rows of what was and what was reported, in milliseconds (tokens: counts)."""
    tokens = script.chunks * script.tokens_per_chunk
    with running(script) as url, tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = ["--hold", str(hold), "--settle", "2", "--no-limit", "--output-tokens", str(tokens)]
        manyheads(["bench", *argv, *given, "--url", url, "-o", folder])
        level = result.load(Path(folder)).levels[0]
    assert level.ttft
    assert level.tpot
    assert level.gap
    assert level.e2e
    decode = script.gap * (script.chunks - 1)
    rows: list[list[Any]] = [
        ["TTFT, mean ms", script.ttft * 1e3, level.ttft.mean * 1e3],
        ["TTFT, p50 ms", script.ttft * 1e3, level.ttft.p50 * 1e3],
        ["TPOT, mean ms", decode / (tokens - 1) * 1e3, level.tpot.mean * 1e3],
        ["TPOT, p50 ms", decode / (tokens - 1) * 1e3, level.tpot.p50 * 1e3],
        ["gap, p50 ms", script.gap * 1e3, level.gap.p50 * 1e3],
        ["gap, mean ms", script.gap * 1e3, level.gap.mean * 1e3],
        ["latency, mean ms", (script.ttft + decode) * 1e3, level.e2e.mean * 1e3],
        ["latency, p50 ms", (script.ttft + decode) * 1e3, level.e2e.p50 * 1e3],
        ["tokens", tokens, level.output_tokens],
        ["tokens a chunk", script.tokens_per_chunk, level.tokens_per_chunk],
    ]
    if argv[0] == "users":
        rows.append(["output tokens/s", level.load * tokens / (script.ttft + decode), level.output_tokens_per_s])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", type=float, default=20.0, help="seconds of each case")
    parser.add_argument("--tries", type=int, default=3, help="of a case that other work disturbs")
    parser.add_argument("--check", action="store_true", help="fail where a figure is off by more than 2 %%")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/bench_mock.json")
    args = parser.parse_args()
    where = machine()
    cases = {}
    others = {}
    worst = 0.0
    for name, (argv, script) in CASES.items():
        measured, share = undisturbed(functools.partial(measure, argv, script, args.hold), args.tries)
        rows = [[*row, round(row[2] / row[1] - 1, 5)] for row in measured]
        others[name] = share
        worst = max(worst, *(abs(row[3]) for row in rows))
        cases[name] = [dict(zip(("figure", "was", "reported", "error"), row, strict=True)) for row in rows]
        print(f"{name}: {' '.join(argv)}")
        table(["", "was", "reported", "error, %"], [[row[0], row[1], row[2], 100 * row[3]] for row in rows])
    write_json(args.out, {"machine": where, "worst_error": worst, "other_work": others, "cases": cases})
    print(f"worst error: {worst:.2%}")
    return 1 if args.check and worst > 0.02 else 0


if __name__ == "__main__":
    sys.exit(main())
