"""Faults against a real server: what is promised in docs/reliability.md, tried out.

    python benchmarks/chaos.py                          # all of them; writes results/chaos.json
    python benchmarks/chaos.py --only killed --short    # one, in its short form
    python benchmarks/chaos.py --device cuda --model MODEL -- --max-model-len 4096    # options of serve behind --
    python benchmarks/chaos.py --write-docs             # the table in docs/reliability.md, from the results

Client and server share the processors. Each fault has a server of its own; one that does not start, or that does not
give whole answers undisturbed, ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chaos_rows as rows
from chaos_hostile import FEW_FILES, hold
from chaos_hostile import OPTIONS as HOSTILE_OPTIONS
from chaos_rows import Row, Size
from chaos_server import Server, poison, started
from chaos_soak import OPTIONS as SOAK_OPTIONS
from chaos_soak import soak
from common import BUILTIN, ROOT, machine, save, table, write_between

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table of results: written by benchmarks/chaos.py --write-docs -->", "<!-- end of the table -->"
ROWS = ("chaos.json", "busy.json")
"""Parts of these results that have `fault`, `aim`, `found` and `met` are rows of the table."""
DRAIN = 30.0
RESTARTS = ("--max-restarts", "1000")


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    fault: str
    aim: str
    run: Callable[[Server, Size, argparse.Namespace], Awaitable[Row]]
    options: Sequence[str] = ()
    """Of `serve`."""
    poisoned: bool = False
    """Whether the model has a token that gives NaN."""


FAULTS = {
    "killed": Fault(
        "engine killed (-9) at random times, with streams and plain requests open",
        "every text the same, token for token; ready again within the time of a start + 2 s",
        lambda server, size, args: rows.killed(server, size),
        RESTARTS,
    ),
    "stopped": Fault(
        "engine stopped (SIGSTOP)",
        "noticed within `--watchdog`, every text the same",
        lambda server, size, args: rows.stopped(server, size, args.watchdog),
        (*RESTARTS, "--watchdog", "{watchdog:g}"),
    ),
    "poison": Fault(
        "requests whose logits are NaN, beside others",
        "an error for each of them, every other text the same",
        lambda server, size, args: rows.poisoned(server, size, args.poison),
        poisoned=True,
    ),
    "server_killed": Fault(
        "API server killed (-9)",
        "engine gone within 1 s, no file, socket or shared memory left",
        lambda server, size, args: rows.server_killed(server, size),
    ),
    "drained": Fault(
        "SIGTERM with streams open",
        "`/ready` flips, all finish within `--drain-timeout`, exit 0",
        lambda server, size, args: rows.drained(server, size, DRAIN),
        ("--drain-timeout", f"{DRAIN:g}"),
    ),
    "soak": Fault(
        "50 % random disconnects, pages for a tenth of what could be needed",
        "none lost, no page leaked, memory flat after the first tenth",
        lambda server, size, args: soak(server, size, args.seconds or (20 if args.short else 300)),
        SOAK_OPTIONS,
    ),
    "hostile": Fault(
        "clients that hold connections: 1,200 half-open, 40 that never read, 200 idle under `ulimit -n 64`",
        "others served throughout, log below 100 kB, all dropped in time",
        lambda server, size, args: _hold(server, size, args),
        HOSTILE_OPTIONS,
    ),
}


async def _hold(server: Server, size: Size, args: argparse.Namespace) -> Row:
    options = ["--device", args.device, *HOSTILE_OPTIONS, *args.options]
    async with started(args.model, options, files=FEW_FILES) as few_files:
        return await hold(server, few_files, size)


async def run(name: str, args: argparse.Namespace) -> Row:
    """Starts a server and shows it a fault."""
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if fault.poisoned:
            model = Path(folder) / "model"
            args.poison = poison(Path(args.model), model)
        options = ["--device", args.device, *(each.format_map(vars(args)) for each in fault.options), *args.options]
        size = rows.SHORT if args.short else Size()
        if args.kills:
            size = replace(size, kills=args.kills, stops=args.kills)
        async with started(model, options) as server:
            row = await fault.run(server, size, args)
    on_gpu = "" if args.device == "cpu" else f" (on {_gpu()})"
    return {"fault": fault.fault + on_gpu, "aim": fault.aim, **row}


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def write_docs(results: Path, page: Path) -> None:
    """Writes the table of all results between the page's two marks. Raises ValueError if the page lacks them."""
    parts = [part for name in ROWS for part in _parts(results / name)]
    found = [part for part in parts if isinstance(part, dict) and {"fault", "aim", "found", "met"} <= part.keys()]
    found += [row for part in _parts(results / "overload.json") for row in overloaded(part)]
    lines = ["| fault | aim | found | met |", "|---|---|---|---|"]
    lines += [f"| {r['fault']} | {r['aim']} | {r['found']} | {'yes' if r['met'] else '**no**'} |" for r in found]
    write_between(page, BEGIN, END, lines)


def _parts(path: Path) -> list[Any]:
    return list(json.loads(path.read_text()).values()) if path.exists() else []


def overloaded(part: dict[str, Any]) -> list[Row]:
    """The rows of a result of overload.py."""
    found, wait = [], float(part["settings"]["max_wait"])
    if o := part.get("overload"):
        error = o["retry_after_error_median"]
        found.append(
            {
                "fault": f"{float(part['settings']['times']):g} times the load that can be served, open loop",
                "aim": "goodput ≥ 95 % of the peak; first token p99 ≤ `--max-wait`; `Retry-After` off by < 30 %",
                "found": f"goodput {o['goodput_of_peak']:.0%}; p99 {o['first_token_p99_s']:.1f} s "
                f"(--max-wait {wait:g}); `Retry-After` off by {error:.0%}",
                "met": o["goodput_of_peak"] >= 0.95 and o["first_token_p99_s"] <= wait and error < 0.3,
            }
        )
    if f := part.get("fairness"):
        options = part["settings"].get("options") or []
        with_options = f" (with `{' '.join(options)}`)" if options else ""
        found.append(
            {
                "fault": f"16 prompts × n = 64 of one client, beside one-token requests of another{with_options}",
                "aim": "the latter's p99 ≤ 3 times its time alone",
                "found": f"{f['p99_times']:.1f} times: {f['beside_p99_s']:.2f} s, alone {f['alone_p99_s']:.2f} s",
                "met": f["p99_times"] <= 3,
            }
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--short", action="store_true", help="fewer rounds with fewer requests")
    parser.add_argument("--kills", type=int, help="rounds of `killed` and `stopped` (default: 20 and 5)")
    parser.add_argument("--watchdog", type=float, default=3.0, help="of `stopped`, in seconds (default: 3)")
    parser.add_argument("--seconds", type=float, help="of the soak (default: 300; --short: 20)")
    parser.add_argument("--model", default=str(BUILTIN), help="a folder (default: the built-in model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    parser.add_argument("--write-docs", action="store_true", help="write the table and run nothing")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="more options of `manyheads serve`")
    args = parser.parse_args()
    if args.write_docs:
        write_docs(args.out.parent, PAGE)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends, too
    shown = []
    for name in args.only:
        row = {"machine": machine(), **asyncio.run(run(name, args))}
        save(args.out, name if args.device == "cpu" else f"{name}-{args.device}", row)
        shown.append([row["fault"], row["found"], "yes" if row["met"] else "NO"])
        print(name, shown[-1][1:], *row.get("wrong", ()), sep="\n  ", flush=True)
    table(["fault", "found", "met"], shown)
    if any(met == "NO" for *_, met in shown):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
