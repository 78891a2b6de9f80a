"""The figures of docs/analysis.md: `manyheads bench` on manyheads, with and without speculation, and on medusa-llm.

    python benchmarks/load.py                # measures, all systems in turns; reports go to results/load/
    python benchmarks/load.py --show         # tables of the results that are there, and the plots of docs/images/

The reports are those of `manyheads bench`, so that `manyheads bench --compare` also reads them. medusa-llm runs behind
FastAPI as in the first version (first_version/README.md), with a lock around its model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common import BUILTIN, ROOT, machine, table, undisturbed
from cpu import PORTS, export_reference, reference_server

from manyheads.bench import plots, result
from manyheads.bench.result import Level, Result
from manyheads.bench.server import started

SYSTEMS = {"manyheads": "manyheads", "plain": "manyheads, no speculation", "medusa-llm": "medusa-llm behind FastAPI"}
TESTS = {
    "first": ["first"],
    "users": ["users", "--users", "1,2,4,8,16,32,64", "--hold", "10", "--prompt-tokens", "7"],
    "chat": ["users", "--users", "1,2,4,8,16", "--hold", "10", "--prompt-tokens", "7", "--chat"],
    "rate": ["rate", "--hold", "10", "--prompt-tokens", "7"],
}
LEFT_OUT = {("chat", "medusa-llm"), ("rate", "plain"), ("rate", "medusa-llm")}
"""The first version has no chats; one system's overload says it all."""
SLOW = ["--users", "1,2,4,8,16", "--hold", "30", "--settle", "8"]
"""The sweep of medusa-llm, which answers a request in seconds and not in tenths of them."""


@contextlib.contextmanager
def serving(system: str, args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server, while the block lasts."""
    if system != "medusa-llm":
        with started(str(args.model), ["--no-speculative"] if system == "plain" else []) as (url, _):
            yield url
        return
    with contextlib.ExitStack() as stack:
        heads = export_reference(args, stack.enter_context(tempfile.TemporaryDirectory()), None)
        stack.enter_context(reference_server(args, heads, "--one-at-a-time"))
        yield f"http://127.0.0.1:{PORTS['medusa-llm']}"


def measure(test: str, system: str, target: Path, args: argparse.Namespace) -> None:
    """One run; its report goes to `target`, with what other work took of the cores among its notes."""

    def run() -> Result:
        with serving(system, args) as url, tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, "--url", url, "-o", folder], check=True, cwd=ROOT)
            return result.load(Path(folder))

    argv = TESTS[test] + (SLOW if system == "medusa-llm" and test == "users" else [])
    command = [sys.executable, "-m", "manyheads", "bench", *argv, "--name", SYSTEMS[system]]
    found, share = undisturbed(run, args.tries)
    found.notes.append(f"other work took {share:.1%} of the cores meanwhile")
    result.save(found, target)


def runs(test: str, system: str, folder: Path) -> list[Result]:
    """The reports that are there."""
    return [result.load(path) for path in sorted(folder.glob(f"{test}-{system}-*.json"))]


def median(levels: Sequence[Level], take: Callable[[Level], float | None]) -> float | None:
    """Of the rounds' figures."""
    values = [value for value in map(take, levels) if value is not None]
    return statistics.median(values) if values else None


def together(rounds: Sequence[Result]) -> Result:
    """One result whose plotted figures are the medians of the rounds'."""
    made = rounds[0]
    for i, level in enumerate(made.levels):
        same = [r.levels[i] for r in rounds]
        level.output_tokens_per_s = median(same, lambda v: v.output_tokens_per_s) or 0.0
        level.tokens_per_step = median(same, lambda v: v.tokens_per_step)
        for name in ("ttft", "tpot", "e2e"):
            for place in ("p50", "p90", "p99"):
                value = median(same, lambda v: getattr(getattr(v, name), place, None))  # noqa: B023 (called at once)
                if value is not None:
                    setattr(getattr(level, name), place, value)
        level.requests_per_s = median(same, lambda v: v.requests_per_s) or 0.0
    return made


def show(folder: Path, images: Path) -> None:
    """Tables, and plots over the number of users."""
    for test in TESTS:
        found = {system: runs(test, system, folder) for system in SYSTEMS}
        for system, rounds in found.items():
            if rounds:
                answered, failed = sum(r.whole.completed for r in rounds), sum(r.whole.failed for r in rounds)
                host = [m.host / 2**30 for r in rounds for m in r.memory if m.host]
                cpu = [v.generator.cpu for r in rounds for v in r.levels if v.generator.cpu is not None]
                print(f"{test}: {SYSTEMS[system]}, {len(rounds)} runs, {answered} answers, {failed} failures, ", end="")
                print(f"{min(host):.2f} to {max(host):.2f} GiB, generator {max(cpu):.0%} of a core at most")
        figures: dict[str, Callable[[Level], float | None]] = {
            "requests/s": lambda v: v.requests_per_s,
            "goodput": lambda v: v.goodput,
            "under way": lambda v: v.in_flight,
            "tokens/s": lambda v: v.output_tokens_per_s,
            "latency p50 s": lambda v: v.e2e and v.e2e.p50,
            "p90 s": lambda v: v.e2e and v.e2e.p90,
            "p99 s": lambda v: v.e2e and v.e2e.p99,
            "TTFT p50 ms": lambda v: v.ttft and v.ttft.p50 * 1e3,
            "p99 ms": lambda v: v.ttft and v.ttft.p99 * 1e3,
            "TPOT p50 ms": lambda v: v.tpot and v.tpot.p50 * 1e3,
            "tokens/step": lambda v: v.tokens_per_step,
        }
        rows = []
        for system, rounds in found.items():
            for i, level in enumerate(rounds[0].levels if rounds else []):
                same = [r.levels[i] for r in rounds]
                speeds = [v.output_tokens_per_s for v in same]
                row = [median(same, take) for take in figures.values()]
                rows.append([f"{level.load:g}", SYSTEMS[system], *row, f"{min(speeds):.0f} to {max(speeds):.0f}"])
        table(["load", "", *figures, "tokens/s, runs"], sorted(rows, key=lambda row: float(row[0])))
    medians = [together(rounds) for system in SYSTEMS if (rounds := runs("users", system, folder))]
    if not medians:
        return
    loads = sorted({level.load for one in medians for level in one.levels})
    throughput = plots.by_load(medians, "Throughput by users", "output tokens/s", {"": lambda v: v.output_tokens_per_s})
    latency = plots.by_load(medians, "Median latency by users", "seconds", {"": lambda v: v.e2e and v.e2e.p50})
    latency.axes.set_yscale("log")
    for name, plot, zero in (("throughput", throughput, True), ("latency", latency, False)):
        plot.axes.set_facecolor("white")
        plot.figure.set_facecolor("white")
        (images / f"load-{name}.svg").write_text(plot.svg(whole_x=loads, zero=zero) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN, help="base model (default: the built-in)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2], help="numbers of the rounds to run")
    parser.add_argument("--tries", type=int, default=3, help="of a run that other work disturbs")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/load")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--reference-python", default="/tmp/refenv/bin/python", help="see first_version/README.md")
    args = parser.parse_args()
    args.heads = args.reference_tree = None
    if not args.show:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
        for number in args.rounds:
            for test in args.tests:
                for system in args.systems if number % 2 else args.systems[::-1]:
                    # the rates of an automatic sweep end where the server does: those of two rounds may differ
                    if (test, system) not in LEFT_OUT and (test != "rate" or number == 1):
                        measure(test, system, args.out / f"{test}-{system}-{number}.json", args)
    show(args.out, args.images)


if __name__ == "__main__":
    main()
